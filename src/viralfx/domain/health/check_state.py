"""The state of each check, and the totals over all checks. Pure: no tasks, no clock."""

import heapq
import math
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import NamedTuple

from viralfx.domain.health.model import (
    CheckPolicy,
    CheckReport,
    Details,
    Health,
    HealthReport,
    Observation,
    Status,
    Transition,
)


class _Recorded(NamedTuple):
    observation: Observation
    correlation_id: str


class CheckTracker:
    """Derives the published status of one check from its observations.

    The published status gets worse when the last ``failure_threshold`` observations are worse: it
    becomes the mildest of them. It gets better when the last ``recovery_threshold`` observations
    are better: it becomes the worst of them. The first observation is published at once. So a
    status is published only if it, or a more extreme one, was observed throughout.
    """

    def __init__(self, name: str, policy: CheckPolicy, created_at: datetime) -> None:
        self.name = name
        self.policy = policy
        self._recent: deque[_Recorded] = deque(
            maxlen=max(policy.failure_threshold, policy.recovery_threshold)
        )
        self._published: Status | None = None
        self._shown: _Recorded | None = None
        self._recorded_at: float | None = None
        self._checked_at: datetime | None = None
        self._response_time: float | None = None
        self._evaluated: Status | None = None
        self._since = created_at
        self._empty_details: Details = {}
        """Empty details of the type that the check uses: an object or a list."""

    @property
    def reported(self) -> bool:
        """True once the check has an observation."""
        return self._shown is not None

    @property
    def passing(self) -> bool:
        """True if both the published status and the last observation pass."""
        if self._published is not Status.PASS:
            return False
        return self._recent[-1].observation.status is Status.PASS

    @property
    def stale_at(self) -> float:
        """Monotonic time at which the last result becomes stale; infinite before the first."""
        if self._recorded_at is None:
            return float("inf")
        return self._recorded_at + self.policy.oldest_allowed

    def record(
        self,
        observation: Observation,
        *,
        response_time: float,
        correlation_id: str,
        monotonic: float,
        at: datetime,
    ) -> None:
        """Record an observation; ``monotonic`` and ``at`` are its completion time."""
        self._recent.append(_Recorded(observation, correlation_id))
        if observation.details:
            self._empty_details = {} if isinstance(observation.details, Mapping) else ()
        self._recorded_at = monotonic
        self._checked_at = at
        self._response_time = response_time
        if observation.status is self._published:
            # The usual case: the newest observation confirms the published status.
            self._shown = self._recent[-1]
            return
        newest_first = list(reversed(self._recent))
        self._published = self._sustained([seen.observation.status for seen in newest_first])
        # Show the newest observation with the published status, so that message, details, code and
        # correlation id belong to that status.
        matching = (s for s in newest_first if s.observation.status is self._published)
        self._shown = next(matching, self._shown)

    def _sustained(self, newest_first: list[Status]) -> Status:
        if self._published is None:
            return newest_first[0]
        worse = newest_first[: self.policy.failure_threshold]
        if len(worse) == self.policy.failure_threshold:
            mildest = min(worse, key=lambda status: status.severity)
            if mildest.severity > self._published.severity:
                return mildest
        better = newest_first[: self.policy.recovery_threshold]
        if len(better) == self.policy.recovery_threshold:
            worst = max(better, key=lambda status: status.severity)
            if worst.severity < self._published.severity:
                return worst
        return self._published

    def evaluate(self, monotonic: float, at: datetime) -> tuple[CheckReport, Transition | None]:
        """Return the check's report, and a transition if the status changed since the last call."""
        status, message, code, details = self._verdict(monotonic)
        correlation_id = self._shown.correlation_id if self._shown else None
        transition = None
        if self.reported and status is not self._evaluated:
            transition = Transition(
                check=self.name,
                old=self._evaluated,
                new=status,
                code=code,
                message=message,
                at=at,
                correlation_id=correlation_id,
            )
            self._evaluated = status
            self._since = at
        report = CheckReport(
            name=self.name,
            status=status,
            message=message,
            details=details,
            code=code,
            correlation_id=correlation_id,
            response_time=self._response_time,
            checked_at=self._checked_at,
            since=self._since,
            policy=self.policy,
            live_details=self._shown.observation.live_details if self._shown else None,
        )
        return report, transition

    def _verdict(self, monotonic: float) -> tuple[Status, str, str | None, Details]:
        if self._shown is None:
            return Status.FAIL, f"{self.name} has not been checked yet", "pending", {}
        shown = self._shown.observation
        if shown.status is not Status.FAIL and monotonic >= self.stale_at:
            message = f"{self.name} has no result newer than {self.policy.oldest_allowed:g} s"
            return Status.FAIL, message, "stale", shown.details
        if shown.status is Status.PASS:
            return shown.status, shown.message, None, shown.details
        # A failed attempt has no details; a client that expects a list must still get a list.
        details = shown.details or self._empty_details
        return shown.status, shown.message, shown.code or str(shown.status), details


class HealthTotals:
    """The current report of each check, and the health and readiness of all together.

    No update and no report iterates over all checks; tracking the age of a result costs at most
    O(log n) per update. If checks change while a caller holds a report, the checks are copied.
    Times are monotonic seconds.
    """

    def __init__(self, fail_open_after: float) -> None:
        """See :class:`viralfx.domain.health.monitor.HealthMonitor` for ``fail_open_after``."""
        self._fail_open_after = fail_open_after
        self._checks: dict[str, CheckReport] = {}
        self._snapshot: weakref.ref[_Snapshot] | None = None
        """The checks of the last report, as long as they are current."""
        self._order: dict[str, int] = {}
        self._expiry = _Expiry()
        self._started = False
        self._not_reported = 0
        self._not_passing = 0
        self._critical_failing = 0
        self._failing_gates: dict[str, CheckReport] = {}
        self._failing_local_gates = 0
        self._failing_names: tuple[str, ...] | None = ()
        """Names of the failing gates in order; None if the set has changed."""
        self._gates_failing_since: float | None = None

    def add(self, report: CheckReport) -> None:
        """Add a check that has not reported yet; ``started`` becomes False."""
        self._detach_snapshot()
        self._order[report.name] = len(self._order)
        self._checks[report.name] = report
        self._count(report, 1)
        self._failing_names = None
        self._started = False

    def update(self, report: CheckReport, stale_at: float) -> None:
        """Replace a check's report; ``stale_at`` is the time at which its result becomes stale."""
        self._detach_snapshot()
        name = report.name
        failed = name in self._failing_gates
        self._count(self._checks[name], -1)
        self._count(report, 1)
        if failed != (name in self._failing_gates):
            self._failing_names = None
        self._checks[name] = report
        # A failure does not become stale.
        self._expiry.set(name, math.inf if report.status is Status.FAIL else stale_at)

    def take_expired(self, now: float) -> list[str]:
        """Return the checks whose results became stale; the caller updates each of them."""
        return self._expiry.take(now)

    def in_order(self, names: list[str]) -> list[str]:
        """Sort names of checks in the order of registration."""
        return sorted(names, key=self._order.__getitem__) if len(names) > 1 else names

    def settle(self, now: float) -> None:
        """Update start-up and fail-open state; call it after each round of updates."""
        failing = len(self._failing_gates)
        self._started = self._started or not (self._not_reported or failing)
        if not failing or self._failing_local_gates or self._fail_open_after <= 0:
            self._gates_failing_since = None
        elif self._gates_failing_since is None:
            self._gates_failing_since = now

    def report(self, now: float) -> HealthReport:
        """Build the report for the monotonic time ``now``."""
        fail_open, opens_at = False, math.inf
        if self._gates_failing_since is not None:
            opens_at = self._gates_failing_since + self._fail_open_after
            fail_open = now >= opens_at
        # Reports share the snapshot until a check changes.
        snapshot = None if self._snapshot is None else self._snapshot()
        if snapshot is None:
            snapshot = _Snapshot(self._checks)
            self._snapshot = weakref.ref(snapshot)
        return HealthReport(
            checks=snapshot,
            health=self._health(),
            started=self._started,
            failing_gates=self._names_of_failing_gates(),
            fail_open=fail_open,
            valid_until=min(math.inf if fail_open else opens_at, self._expiry.next()),
        )

    def _detach_snapshot(self) -> None:
        if self._snapshot is None:
            return
        snapshot = self._snapshot()
        if snapshot is not None:
            snapshot.detach()
        self._snapshot = None

    def _health(self) -> Health:
        if self._critical_failing:
            return Health.UNHEALTHY
        return Health.DEGRADED if self._not_passing else Health.HEALTHY

    def _names_of_failing_gates(self) -> tuple[str, ...]:
        if self._failing_names is None:
            self._failing_names = tuple(self.in_order(list(self._failing_gates)))
        return self._failing_names

    def _count(self, report: CheckReport, by: int) -> None:
        if report.checked_at is None:
            self._not_reported += by
        if report.status is Status.PASS:
            return
        self._not_passing += by
        if report.status is not Status.FAIL:
            return
        policy = report.policy
        if policy.critical:
            self._critical_failing += by
        if policy.required_for_readiness:
            if by > 0:
                self._failing_gates[report.name] = report
            else:
                del self._failing_gates[report.name]
            if not policy.shared:
                self._failing_local_gates += by


class _Snapshot(Mapping[str, CheckReport]):
    """A view of the current checks; after :meth:`detach` a copy of them."""

    __slots__ = ("__weakref__", "_checks")

    def __init__(self, checks: dict[str, CheckReport]) -> None:
        self._checks = checks

    def detach(self) -> None:
        """Copy the checks before the shared ones change."""
        self._checks = self._checks.copy()

    def __getitem__(self, name: str) -> CheckReport:
        return self._checks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._checks)

    def __len__(self) -> int:
        return len(self._checks)

    def __repr__(self) -> str:
        return repr(self._checks)


class _Expiry:
    """The time at which each check's result becomes stale. A time is only set to a later one.

    The heap has at most one entry for a check. An entry keeps the time of its creation, which is
    never later than the current time of the check, and is corrected when it reaches the top. So
    setting a time costs a heap operation only for a check without an entry.
    """

    def __init__(self) -> None:
        self._times: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []
        self._queued: set[str] = set()

    def set(self, name: str, time: float) -> None:
        """Set the time of a check; infinity if its result does not become stale."""
        self._times[name] = time
        if time < math.inf and name not in self._queued:
            self._queued.add(name)
            heapq.heappush(self._heap, (time, name))

    def next(self) -> float:
        """Return the earliest time; infinity if there is none."""
        heap = self._heap
        while heap:
            queued, name = heap[0]
            time = self._times[name]
            if time == queued:
                return time
            if time < math.inf:
                heapq.heapreplace(heap, (time, name))
            else:
                self._pop()
        return math.inf

    def take(self, now: float) -> list[str]:
        """Remove and return the checks whose time has come."""
        taken: list[str] = []
        # Usually the first comparison decides: an entry is never later than the check's time.
        while self._heap and self._heap[0][0] <= now and self.next() <= now:
            taken.append(self._pop())
        return taken

    def _pop(self) -> str:
        _, name = heapq.heappop(self._heap)
        self._queued.discard(name)
        return name
