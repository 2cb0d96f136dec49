"""The order in which waiting jobs are due, kept so that none but the first is looked at."""

from collections.abc import Iterator
from datetime import datetime
from heapq import heapify, heappop, heappush

Entry = tuple[datetime, str]
_SLACK = 64


class DueOrder:
    """Job ids by when they are due, then by id. Every step costs the logarithm of their number."""

    def __init__(self) -> None:
        self._kept: dict[str, Entry] = {}
        # What was discarded stays in the heap until it comes first or is too much of it.
        self._heap: list[Entry] = []

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, job_id: str, due: datetime) -> None:
        """Add a job that is not in here."""
        entry = (due, job_id)
        self._kept[job_id] = entry
        heappush(self._heap, entry)

    def discard(self, job_id: str) -> None:
        """Take a job out, if it is in here."""
        self._kept.pop(job_id, None)
        if len(self._heap) > 2 * len(self._kept) + _SLACK:
            self._heap = list(self._kept.values())
            heapify(self._heap)

    def first(self) -> Entry | None:
        """Return what is due first; None when there is nothing."""
        while self._heap:
            entry = self._heap[0]
            if self._kept.get(entry[1]) is entry:
                return entry
            heappop(self._heap)
        return None

    def pop_until(self, due: datetime) -> Iterator[Entry]:
        """Take out what is due at a time, the longest due first."""
        while (entry := self.first()) is not None and entry[0] <= due:
            heappop(self._heap)
            del self._kept[entry[1]]
            yield entry
