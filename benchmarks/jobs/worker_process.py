"""A worker process and its count of jobs. Standard library only: peers import it."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from benchmarks.jobs.counter import COUNTS, Count, CountReader
from benchmarks.jobs.cpu_seconds import cpu_seconds

STOP_SECONDS = 10.0


class WorkerProcess:
    """Runs a worker with this interpreter, and stops it at the end of the block.

    A slow stop is not an error: the worker is then killed with its children.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = arguments
        self._folder = tempfile.TemporaryDirectory()
        self._counts = CountReader(Path(self._folder.name))
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed at the end

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, *self._arguments],
            env={**os.environ, COUNTS: self._folder.name},
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # some workers leave child processes behind
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
        """Whether it has ended."""
        return self._process.poll() is not None

    def count(self) -> Count:
        """Return the jobs that it has run so far."""
        return self._counts.read()

    def cpu_seconds(self) -> float:
        """Return the processor time of the process that runs the jobs."""
        return cpu_seconds(self._counts.pids())

    def said(self) -> str:
        """Return the end of its output."""
        self._output.seek(0)
        return self._output.read().decode(errors="replace")[-4000:]
