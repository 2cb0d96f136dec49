"""The program under the kernel's own memory limit."""

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.system.service import ROOT, clean_environment, wait_for

_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
Limited = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def limited() -> Iterator[Limited]:
    """Return what runs a command of the program within so many MiB."""
    group, file = _V1 / f"viralfx-{uuid.uuid4().hex[:8]}", "memory.limit_in_bytes"
    if not _V1.is_dir():
        group, file = _V2 / group.name, "memory.max"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")

    def run(*arguments: str, mebibytes: int) -> subprocess.CompletedProcess[str]:
        (group / file).write_text(str(mebibytes * 2**20))
        enter = f'echo $$ > {group}/cgroup.procs; exec "$@"'
        return subprocess.run(
            ["/bin/sh", "-c", enter, "sh", sys.executable, "-m", "viralfx", *arguments],
            cwd=ROOT,
            env={**clean_environment(), "PORT": "0"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    try:
        if not (group / file).exists():
            pytest.skip("the memory controller is not there for new control groups")
        yield run
    finally:
        wait_for(lambda: _removed(group), what="the control group is empty")


def _removed(group: Path) -> bool:
    with suppress(OSError):
        os.rmdir(group)  # noqa: PTH106 - its files are not to be removed, and cannot be
    return not group.exists()


@pytest.mark.parametrize("command", ["serve", "worker", "doctor"])
def test_too_little_to_start_is_told(limited: Limited, command: str) -> None:
    """Rather than being killed without a word."""
    done = limited(command, mebibytes=32)

    assert (done.returncode, done.stderr) == (
        3,
        (
            "viralfx: the memory limit is 32 MiB, and to start alone takes 64 MiB;"
            " raise it to 256 MiB or more\n"
        ),
    )


@pytest.mark.parametrize(("mebibytes", "verdict"), [(66, "fail"), (256, "pass")])
def test_the_doctor_measures(limited: Limited, mebibytes: int, verdict: str) -> None:
    """What the application holds before it works, against the limit in force."""
    done = limited("doctor", mebibytes=mebibytes)
    (line,) = [line for line in done.stdout.splitlines() if f"of {mebibytes} MiB" in line]

    assert line.startswith(f"{verdict}    memory ")
