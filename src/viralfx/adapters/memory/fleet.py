"""The fleet in the memory of this process, which is all of it that it knows."""

from collections import Counter, deque
from collections.abc import Sequence
from datetime import datetime

from viralfx.core.clock import Clock
from viralfx.domain.fleet import MAX_ENDED, CheckChange, Fleet, Instance, InstanceReport
from viralfx.domain.health.model import State

_MAX_CHANGES = 10_000


class MemoryFleetStore:
    """Keeps the reports that this process makes, and a limited number of changes."""

    kept = "memory"

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._reports: dict[str, tuple[InstanceReport, datetime, float]] = {}
        self._changes: deque[CheckChange] = deque(maxlen=_MAX_CHANGES)

    async def report(self, report: InstanceReport, changes: Sequence[CheckChange] = ()) -> None:
        """See :class:`viralfx.domain.fleet.FleetStore`."""
        self._reports[report.instance] = (report, self._clock.now(), self._clock.monotonic())
        stored = {(each.instance, each.number) for each in self._changes} if changes else set()
        for change in changes:
            if (change.instance, change.number) not in stored:
                self._changes.append(change)

    async def fleet(self) -> Fleet:
        """See :class:`viralfx.domain.fleet.FleetStore`."""
        ended = Counter[str]()
        shown: list[Instance] = []
        for each in (known := self._instances()):
            ended[each.state] += 1
            if each.state not in {"silent", State.STOPPED} or ended[each.state] <= MAX_ENDED:
                shown.append(each)
        return Fleet(instances=shown, more=len(known) - len(shown))

    async def runs(self, instance: str) -> Sequence[Instance]:
        """See :class:`viralfx.domain.fleet.FleetStore`."""
        if instance not in self._reports:
            return []
        own, _, _ = self._reports[instance]
        known = self._instances()
        return [
            each for each in known if (each.report.host, each.report.role) == (own.host, own.role)
        ]

    def _instances(self) -> list[Instance]:
        now = self._clock.monotonic()
        found = [
            Instance(report=report, seen_at=seen_at, age=now - moment)
            for report, seen_at, moment in self._reports.values()
        ]
        return sorted(found, key=lambda each: each.seen_at, reverse=True)

    async def changes(
        self, *, check: str | None = None, instance: str | None = None, limit: int = 200
    ) -> Sequence[CheckChange]:
        """See :class:`viralfx.domain.fleet.FleetStore`."""
        found = [
            each
            for each in self._changes
            if check in (None, each.check) and instance in (None, each.instance)
        ]
        return sorted(found, key=lambda each: each.at, reverse=True)[:limit]

    async def history(self, instances: Sequence[str], since: datetime) -> Sequence[CheckChange]:
        """See :class:`viralfx.domain.fleet.FleetStore`."""
        last: dict[tuple[str, str], CheckChange] = {}
        found: list[CheckChange] = []
        for each in sorted(self._changes, key=lambda one: one.at):
            if each.instance not in instances:
                continue
            if each.at >= since:
                found.append(each)
            else:
                last[each.instance, each.check] = each
        return sorted([*last.values(), *found], key=lambda each: each.at)

    async def prune(self, older_than: float, limit: int = 10_000) -> int:
        """See :class:`viralfx.domain.fleet.FleetStore`."""
        now, clock_now = self._clock.monotonic(), self._clock.now()
        old = [name for name, (_, _, at) in self._reports.items() if now - at > older_than]
        for name in old[:limit]:
            del self._reports[name]
        changes, dropped = self._changes, 0
        while (
            changes and dropped < limit and (clock_now - changes[0].at).total_seconds() > older_than
        ):
            changes.popleft()
            dropped += 1
        return len(old[:limit]) + dropped

    def moved(self) -> bool:
        """Return False: a process in memory has no connection."""
        return False
