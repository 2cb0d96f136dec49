"""The audit trail of one process, in memory."""

from collections import deque
from collections.abc import Sequence

from viralfx.core.clock import Clock
from viralfx.domain.audit import ANY_EVENT, PRUNED_AT_ONCE, AuditEvent, AuditFilter

MAX_KEPT = 1000
"""Events that are kept; then each new one replaces the oldest."""


class MemoryAuditStore:
    """Keeps the last events of this process."""

    kept = "memory"

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._events: deque[AuditEvent] = deque(maxlen=MAX_KEPT)

    async def write(self, events: Sequence[AuditEvent]) -> None:
        """See :class:`viralfx.domain.audit.AuditStore`."""
        known = {each.id for each in self._events}
        self._events.extend(each for each in events if each.id not in known)

    async def read(
        self, wanted: AuditFilter = ANY_EVENT, *, before: str | None = None, limit: int = 100
    ) -> Sequence[AuditEvent]:
        """See :class:`viralfx.domain.audit.AuditStore`."""
        found = sorted(self._events, key=lambda each: each.id, reverse=True)
        fit = [
            each for each in found if (before is None or each.id < before) and _fits(each, wanted)
        ]
        return fit[:limit]

    async def prune(self, older_than: float, limit: int = PRUNED_AT_ONCE) -> int:
        """See :class:`viralfx.domain.audit.AuditStore`."""
        now = self._clock.now()
        old = [each for each in self._events if (now - each.at).total_seconds() > older_than]
        for each in old[:limit]:
            self._events.remove(each)
        return len(old[:limit])


def _fits(event: AuditEvent, wanted: AuditFilter) -> bool:
    return (
        (wanted.since is None or event.at >= wanted.since)
        and (wanted.until is None or event.at < wanted.until)
        and wanted.actor in (None, event.actor)
        and wanted.action in (None, event.action)
        and wanted.outcome in (None, event.outcome)
    )
