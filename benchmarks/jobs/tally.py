"""Counts in a worker's process what ran there. Standard library only: peers import it."""

import itertools
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

EXPECTED, REPORT = "BENCH_EXPECTED", "BENCH_REPORT"
"""Environment variables: after how many jobs to report each time, and into which folder."""


@dataclass(frozen=True)
class Tally:
    """When the first and the last of so many jobs ran, on the clock that all processes share."""

    first: float
    last: float
    cpu: float
    """Seconds of the worker's processor time between them."""


class _Counter:
    def __init__(self) -> None:
        self._each = int(os.environ.get(EXPECTED, "0"))
        self._numbers = itertools.count()  # threads may share it
        self._first = self._cpu = 0.0

    def count(self) -> None:
        if not self._each:
            return
        series, position = divmod(next(self._numbers), self._each)
        if position == 0:
            self._first, self._cpu = time.monotonic(), time.process_time()
        if position == self._each - 1:
            cpu = time.process_time() - self._cpu
            self._report(series, Tally(self._first, time.monotonic(), cpu))

    def _report(self, series: int, tally: Tally) -> None:
        report = _file(Path(os.environ[REPORT]), series)
        part = report.with_suffix(".part")
        part.write_text(json.dumps(asdict(tally)), encoding="ascii")
        part.rename(report)


ran = _Counter().count
"""To be called once by each job."""


def read(folder: Path, series: int) -> Tally | None:
    """Return what a worker reported of one series, counted from 0; None as long as it has not."""
    report = _file(folder, series)
    return Tally(**json.loads(report.read_text(encoding="ascii"))) if report.exists() else None


def _file(folder: Path, series: int) -> Path:
    return folder / f"{series}.json"
