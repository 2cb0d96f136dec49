"""The program under the kernel's own memory limit."""

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from tests.system.control_group import control_group
from tests.system.service import ROOT, clean_environment

Limited = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def limited() -> Iterator[Limited]:
    """Return a function that runs a command within ``mebibytes`` MiB."""
    with control_group() as group:

        def run(*arguments: str, mebibytes: int) -> subprocess.CompletedProcess[str]:
            group.limit(mebibytes)
            enter = f'echo $$ > {group.path}/cgroup.procs; exec "$@"'
            return subprocess.run(
                ["/bin/sh", "-c", enter, "sh", sys.executable, "-m", "viralfx", *arguments],
                cwd=ROOT,
                env={**clean_environment(), "PORT": "0"},
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )

        yield run


@pytest.mark.each_python
@pytest.mark.parametrize("command", ["serve", "worker", "doctor"])
def test_too_little_memory_to_start_is_reported(limited: Limited, command: str) -> None:
    """The process logs the reason instead of being killed silently."""
    done = limited(command, mebibytes=32)

    assert (done.returncode, done.stderr) == (
        3,
        (
            "viralfx: the memory limit is 32 MiB, but a start needs 64 MiB;"
            " raise it to 256 MiB or more\n"
        ),
    )


@pytest.mark.parametrize(("mebibytes", "verdict"), [(76, "warn"), (256, "pass")])
def test_the_doctor_measures(limited: Limited, mebibytes: int, verdict: str) -> None:
    """The doctor compares the memory of an idle application with the limit in force."""
    done = limited("doctor", mebibytes=mebibytes)
    (line,) = [line for line in done.stdout.splitlines() if f"of {mebibytes} MiB" in line]

    assert line.startswith(f"{verdict}    memory ")
