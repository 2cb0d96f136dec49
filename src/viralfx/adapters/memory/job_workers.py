"""The workers that a ledger in memory knows: until when each lives, and what it consumes."""

from collections import Counter
from collections.abc import Collection

from viralfx.domain.clock import Clock


class MemoryWorkers:
    """Leases by worker."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._leases: dict[str, float] = {}
        self._consumed: dict[str, frozenset[str]] = {}

    def renew(self, worker: str, queues: Collection[str], lease: float) -> None:
        """Note a worker's queues, and that its lease is good for so many seconds."""
        self._leases[worker] = self._clock.monotonic() + lease
        self._consumed[worker] = frozenset(queues)

    def forget(self, worker: str) -> None:
        """Forget a worker, known or not."""
        self._leases.pop(worker, None)
        self._consumed.pop(worker, None)

    def is_alive(self, worker: str) -> bool:
        """Tell whether a worker's lease is good."""
        now = self._clock.monotonic()
        return self._leases.get(worker, now) > now

    @property
    def known(self) -> frozenset[str]:
        """All that were not forgotten, alive or not."""
        return frozenset(self._leases)

    def consumers(self) -> Counter[str]:
        """Count those alive by queue."""
        alive = (queues for worker, queues in self._consumed.items() if self.is_alive(worker))
        return Counter(queue for queues in alive for queue in queues)
