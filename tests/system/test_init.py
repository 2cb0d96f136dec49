"""PID 1 in a separate namespace, as in the image: no signal is lost at any moment."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.servers.debian import program
from tests.servers.fixtures import or_skip
from tests.servers.ports import free_port
from tests.servers.supply import UnavailableError
from tests.servers.waiting import wait_until
from tests.soak import cycles
from tests.system.service import ROOT, clean_environment

pytestmark = pytest.mark.timeout(300)

SERVICE = (sys.executable, "-m", "viralfx")
MOMENTS = len(cycles(100, usual=6))
EARLIEST, LATEST = 0.001, 1.0
"""Seconds after the init starts the service, between which SIGTERM is sent."""


def namespace() -> list[str]:
    """Return the command that runs another one as PID 1 of a new namespace, or skip."""
    with or_skip():
        found = shutil.which("unshare")
        if found is None:
            raise UnavailableError("unshare (util-linux) is not on PATH")
        prefix = [found, "--pid", "--fork", "--kill-child"]
        if os.geteuid() == 0:
            # Highest priority: on a busy machine the init itself would start late.
            prefix = ["nice", "-n", "-20", *prefix]
        else:
            prefix.append("--map-root-user")
        tried = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
        if tried.returncode != 0:
            raise UnavailableError(f"no PID namespace can be made: {tried.stderr.strip()}")
        return prefix


def init() -> list[str]:
    """Return the image's entry point, up to the program that it runs, or skip."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    (found,) = re.findall(r"^ENTRYPOINT (.+)$", text, re.MULTILINE)
    name, *arguments = json.loads(found)
    assert arguments.pop() == "viralfx"
    with or_skip():
        return [str(program(name)), *arguments]


@contextlib.contextmanager
def first_process(
    command: list[str], log: Path, **variables: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command as PID 1 of a namespace; yield the ``unshare`` that waits for it."""
    environment = {**clean_environment(), "PORT": str(free_port()), **variables}
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [*namespace(), *command],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()  # --kill-child: kills everything in the namespace


def executed(unshare: subprocess.Popen[bytes]) -> int:
    """Wait, without a pause, until the child of ``unshare`` runs the command; return its PID."""
    parent = unshare.pid
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            for child in children(parent):
                program = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")[0]
                if program and not program.endswith(b"unshare"):
                    return int(child)
    raise AssertionError("the command was not started")


def children(pid: int) -> list[str]:
    """Return the PIDs of a process's children."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()


def exit_code(process: subprocess.Popen[bytes], log: Path, *, seconds: float = 60) -> int:
    """Wait for the exit code; after a lost signal the process would go on."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"still running: {log.read_text()}") from None


def stopped_after(
    moment: float, log: Path, sent: signal.Signals = signal.SIGTERM
) -> tuple[float, int | str]:
    """Send a signal ``moment`` seconds after the start; return 0, or the exit code with the log."""
    command = [*init(), *SERVICE, "serve"]
    with first_process(command, log) as process:
        pid = executed(process)
        # It takes signals before; until then the kernel drops those to a PID 1.
        wait_until(lambda: children(pid), what="the init starts the service")
        time.sleep(moment)  # the moment itself is the subject
        os.kill(pid, sent)
        try:
            code = exit_code(process, log)
        except AssertionError as error:
            return moment, str(error)
        return moment, f"exit code {code}: {log.read_text()}" if code else 0


@pytest.mark.soak
def test_sigterm_at_any_moment_of_the_start_ends_it_with_0(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """From a millisecond after the init starts the service to a second after it."""
    seed = int(os.environ.get("VIRALFX_TEST_SEED", time.time_ns() % 10**9))
    print(f"VIRALFX_TEST_SEED={seed}")  # noqa: T201 - to repeat it
    record_property("moments of SIGTERM", MOMENTS)
    record_property("seed", f"VIRALFX_TEST_SEED={seed}")
    chosen = random.Random(seed)  # noqa: S311 - no secret
    # Half of them before Python has a handler.
    moments = [EARLIEST, LATEST]
    moments += [chosen.uniform(EARLIEST, 0.1) for _ in range(MOMENTS // 2 - 1)]
    moments += [chosen.uniform(0.1, LATEST) for _ in range(MOMENTS // 2 - 1)]
    init(), namespace()

    ended = [stopped_after(moment, tmp_path / "log") for moment in moments]

    assert [one for one in ended if one[1] != 0] == []


@pytest.mark.usefixtures("default_sighup")
def test_a_hangup_before_the_service_can_handle_it_ends_it_with_0(tmp_path: Path) -> None:
    """SIGHUP is SIGTERM, from the first millisecond on."""
    assert stopped_after(EARLIEST, tmp_path / "log", signal.SIGHUP) == (EARLIEST, 0)


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 124, 130])
def test_the_exit_code_is_the_services(code: int, tmp_path: Path) -> None:
    """Each exit code of docs/shutdown.md passes through."""
    log = tmp_path / "log"
    command = [*init(), sys.executable, "-c", f"import os; os._exit({code})"]
    with first_process(command, log) as process:
        assert exit_code(process, log) == code, log.read_text()


@pytest.mark.each_python
def test_the_init_forwards_the_heap_report_signal(tmp_path: Path) -> None:
    """SIGUSR2 to PID 1 reaches the service, which then stops as usual."""
    log = tmp_path / "log"
    command = [*init(), *SERVICE, "serve"]
    with first_process(command, log, HEAP_SNAPSHOT_DIR=str(tmp_path)) as process:
        pid = executed(process)
        wait_until(lambda: b"Listening" in log.read_bytes(), what=log.read_text)
        os.kill(pid, signal.SIGUSR2)
        wait_until(lambda: list(tmp_path.glob("heap*")), seconds=120, what=log.read_text)
        os.kill(pid, signal.SIGTERM)

        assert exit_code(process, log) == 0
