"""A worker process and what it tells. Standard library only: peers import it."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from benchmarks.jobs import tally

STOP_SECONDS = 10.0


class Working:
    """Runs a worker with this interpreter; at the end of the block it is told to leave.

    How it does is not looked at: it is killed, with its children, when it takes long.
    """

    def __init__(self, arguments: Sequence[str], jobs: int) -> None:
        """``jobs`` is how many it is to count as one series."""
        self._arguments, self._jobs = arguments, jobs
        self._folder = tempfile.TemporaryDirectory()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed at the end

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, *self._arguments],
            env={
                **os.environ,
                tally.EXPECTED: str(self._jobs),
                tally.REPORT: self._folder.name,
            },
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # some have children, and forget them
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._output.close()
        self._folder.cleanup()

    @property
    def ended(self) -> bool:
        """Whether it is gone."""
        return self._process.poll() is not None

    def tally(self, series: int) -> tally.Tally | None:
        """Return what it counted in one series; None while that is not complete."""
        return tally.read(Path(self._folder.name), series)

    def said(self) -> str:
        """Return the end of its output."""
        self._output.seek(0)
        return self._output.read().decode(errors="replace")[-4000:]
