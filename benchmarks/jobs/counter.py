"""Counts the jobs that ran in a worker's process. Standard library only: peers import it."""

import mmap
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

COUNTS = "BENCH_COUNTS"
"""Environment variable: the folder with a file for each process that runs jobs."""
_NUMBERS = 3
_SIZE = 8 * _NUMBERS


@dataclass(frozen=True)
class Count:
    """Jobs, and the times of the first and the last one, on a clock that all processes share."""

    jobs: int
    first: float
    last: float


class _Counter:
    """Counts in shared memory, so that the reader costs the worker nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # a worker may run jobs in threads
        self._folder = os.environ.get(COUNTS)
        self._numbers: memoryview[float] | None = None

    def count(self) -> None:
        if self._folder is None:
            return
        now = time.monotonic()
        with self._lock:
            numbers = self._numbers
            if numbers is None:
                numbers = self._numbers = _mapped(Path(self._folder) / str(os.getpid()))
                numbers[1] = now
            numbers[2] = now
            numbers[0] += 1


def _mapped(path: Path) -> "memoryview[float]":
    path.with_suffix(".part").write_bytes(bytes(_SIZE))
    with path.with_suffix(".part").open("r+b") as file:
        numbers = memoryview(mmap.mmap(file.fileno(), _SIZE)).cast("d")
    path.with_suffix(".part").rename(path)
    return numbers


ran = _Counter().count
"""Count one job; each job calls this once."""


class CountReader:
    """Reads the counts of all processes that run jobs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mapped: dict[Path, memoryview[float]] = {}

    def read(self) -> Count:
        """Return the sum; its times are 0 before the first job."""
        for path in self._folder.iterdir():
            if path not in self._mapped and not path.suffix:
                with path.open("r+b") as file:
                    self._mapped[path] = memoryview(mmap.mmap(file.fileno(), _SIZE)).cast("d")
        counted = [numbers.tolist() for numbers in self._mapped.values() if numbers[0]]
        return Count(
            jobs=int(sum(numbers[0] for numbers in counted)),
            first=min((numbers[1] for numbers in counted), default=0.0),
            last=max((numbers[2] for numbers in counted), default=0.0),
        )

    def pids(self) -> Iterable[str]:
        """Return the ids of these processes."""
        return [path.name for path in self._mapped]
