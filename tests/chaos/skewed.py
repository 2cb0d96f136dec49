"""The command line with a wall clock that is wrong by ``CHAOS_CLOCK_SKEW`` seconds."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from signal import Signals

from tests import forked
from tests.system.service import ROOT

from viralfx.__main__ import main
from viralfx.core.clock import SystemClock

SKEW = "CHAOS_CLOCK_SKEW"


def _skew(seconds: float) -> None:
    now, of_the_machine, nanoseconds = SystemClock.now, time.time, time.time_ns

    def wrong(self: SystemClock) -> datetime:
        return now(self) + timedelta(seconds=seconds)

    SystemClock.now = wrong  # type: ignore[method-assign]
    time.time = lambda: of_the_machine() + seconds
    time.time_ns = lambda: nanoseconds() + int(seconds * 1e9)


class SkewedProcess:
    """A running command with its own wall clock; both outputs go to a file."""

    def __init__(self, arguments: Sequence[str], environ: Mapping[str, str], log: Path) -> None:
        """Start it; the environment contains the seconds by which its clock is wrong."""
        self._popen: subprocess.Popen[bytes] | None = None
        if forked.FRESH:
            with log.open("wb") as file:
                self._popen = subprocess.Popen(
                    [sys.executable, "-m", "tests.chaos.skewed", *arguments],
                    cwd=ROOT,
                    env=environ,
                    stdout=file,
                    stderr=file,
                )
            return
        self._fork = forked.forks().Process(
            target=_run, args=(tuple(arguments), dict(environ), os.fspath(log))
        )
        self._fork.start()

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        return self._fork.exitcode if self._popen is None else self._popen.poll()

    def send_signal(self, number: Signals) -> None:
        """Send a signal, unless the process has ended."""
        pid = self._fork.pid if self._popen is None else self._popen.pid
        if self.returncode is None and pid is not None:
            os.kill(pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(Signals.SIGKILL)

    async def wait(self) -> int:
        """Return the exit code."""
        while (code := self.returncode) is None:  # noqa: ASYNC110 - the end sets no event
            await asyncio.sleep(1 / 50)
        return code


def _run(arguments: Sequence[str], environ: dict[str, str], log: str) -> None:
    """Run the command in a fork of the process that has imported its modules."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.close(file)
    os.chdir(ROOT)
    forked._adopt(environ)
    sys.argv = ["viralfx", *arguments]
    _skew(float(environ[SKEW]))
    sys.exit(main())


if __name__ == "__main__":
    _skew(float(os.environ[SKEW]))
    sys.exit(main())
