"""The fleet: all processes that share a ledger, and the changes of their checks.

Each process reports itself: with every beat it replaces its own row, so that a process that died
stays visible with its last state. No process calls another one.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Protocol

from viralfx.core.clock import Clock, finished_within, ignore_error, supervised, wait_for
from viralfx.core.errors import ViralFXError
from viralfx.domain.health.check_runner import CheckCompleted
from viralfx.domain.health.model import HealthReport, Lifecycle, State, StateChanged, Transition
from viralfx.domain.health.monitor import HealthMonitor, MonitorEvent

_logger = logging.getLogger("viralfx.fleet")

BEAT_SECONDS = 5.0
"""The time between two reports of a process that does not change: a transaction each time."""
SILENT_AFTER_SECONDS = 3 * BEAT_SECONDS
"""The age of a report from which the process counts as silent."""
RETENTION_SECONDS = 7 * 86400.0
"""How long rows of processes and changes are kept."""
MAX_ENDED = 200
"""Silent processes that a fleet has at most, and stopped ones: deployments leave many."""
MAX_BUFFERED_CHANGES = 1000
"""Changes that a process keeps while they cannot be written; then the oldest ones are dropped."""
_MIN_GAP_SECONDS = 0.2
"""The least time between two reports, however often the process changes."""
_PRUNE_SECONDS = 3600.0
_PRUNED_AT_ONCE = 10_000
_WRITE_SECONDS = 4.0
"""Time limit of one report."""
_LAST_WRITE_SECONDS = 2.0
"""Time limit of the last one: a database that does not answer must not delay the stop."""
_CANCEL_SECONDS = 0.2


class FleetUnavailableError(ViralFXError):
    """The store of the fleet did not answer in time, or its tables are missing."""


class Role(StrEnum):
    """The purpose of a process."""

    API = "api"
    WORKER = "worker"


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceReport:
    """The report of a process about itself."""

    instance: str
    """Unique to one run of one process."""
    host: str
    role: str
    version: str
    environment: str
    started_at: datetime
    state: str
    """A :class:`State`; :data:`State.STOPPED` is the last word of an ordered stop."""
    reason: str
    health: str
    checks: Mapping[str, str]
    """The status of each check."""
    jobs: int = 0
    """How many jobs it runs."""
    queues: Sequence[str] = ()
    """The queues that it consumes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A process as the store knows it."""

    report: InstanceReport
    seen_at: datetime
    """The time of the last report, by the store."""
    age: float
    """Seconds since then, by the store's clock."""
    connected: bool | None = None
    """Whether its connection to the store is open; None: unknown, as behind a pooler."""

    @property
    def state(self) -> str:
        """The state of the process; ``silent`` if it no longer reports."""
        if self.report.state == State.STOPPED:
            return self.report.state
        if self.age > SILENT_AFTER_SECONDS or self.connected is False:
            return "silent"
        return self.report.state


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The processes that report, and of the silent and of the stopped ones the last few each."""

    instances: Sequence[Instance]
    """Those that reported last come first."""
    more: int
    """How many others are known, which have ended earlier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckChange:
    """A change of the status of a check of an instance."""

    instance: str
    number: int
    """Counts the changes of the instance, so that a repeated write stores each once."""
    check: str
    at: datetime
    old: str | None
    new: str
    code: str | None


class FleetStore(Protocol):
    """Port: keeps the fleet.

    Each method is atomic and raises :class:`FleetUnavailableError` if the store does not answer in
    time. Cancelling a call leaves the store consistent.
    """

    kept: str
    """Where: ``postgres``, or ``memory`` for a store that knows this process only."""

    async def report(self, report: InstanceReport, changes: Sequence[CheckChange] = ()) -> None:
        """Replace the report of an instance, and add its changes.

        A change with the number of a stored one is skipped, so a repeated call stores it once.
        """
        ...

    async def fleet(self) -> Fleet:
        """Return the fleet, with at most :data:`MAX_ENDED` silent and as many stopped processes."""
        ...

    async def runs(self, instance: str) -> Sequence[Instance]:
        """Return the last instances with the host and role of one, which is among them.

        Those that reported last come first; empty for an unknown one.
        """
        ...

    async def changes(
        self,
        *,
        check: str | None = None,
        instance: str | None = None,
        limit: int = 200,
    ) -> Sequence[CheckChange]:
        """Return changes, the latest first."""
        ...

    async def history(self, instances: Sequence[str], since: datetime) -> Sequence[CheckChange]:
        """Return the changes of some instances since a time, the earliest first.

        For each check of an instance also the last change before that time.
        """
        ...

    async def prune(self, older_than: float, limit: int = _PRUNED_AT_ONCE) -> int:
        """Delete up to ``limit`` rows of each kind that are older than some seconds.

        An instance is as old as its last report. Returns how many.
        """
        ...

    def moved(self) -> bool:
        """Return True if :attr:`Instance.connected` of this process needs a new report."""
        ...


class FleetReporter:
    """Reports this process to the store: at once after each change, and with every beat.

    While the store fails, the changes of checks stay in a buffer; they are written with the first
    report that succeeds. It never raises: a fleet that cannot be written must not stop a process.
    """

    def __init__(
        self,
        store: FleetStore,
        *,
        describe: Callable[[], InstanceReport],
        monitor: HealthMonitor,
        lifecycle: Lifecycle,
        clock: Clock,
        beat: float = BEAT_SECONDS,
    ) -> None:
        """``describe`` returns the report of this process as of now."""
        self._store = store
        self._describe = describe
        self._clock = clock
        self._beat = beat
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._changes: deque[CheckChange] = deque(maxlen=MAX_BUFFERED_CHANGES)
        self._number = 0
        self._next_prune = clock.monotonic()
        self._writing = asyncio.Lock()
        self._closed = False
        self._complained = False
        monitor.subscribe(self._on_health)
        lifecycle.subscribe(self._on_state)

    @property
    def buffered(self) -> int:
        """How many changes wait to be written."""
        return len(self._changes)

    async def open(self) -> None:
        """Begin to report, on the running loop. A second call does nothing."""
        if self._task is None:
            self._task = supervised(self._run(), "fleet")

    def stop(self) -> None:
        """Report no more."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()

    async def close(self, budget: float) -> None:
        """Write the last report, with the state ``stopped``, within ``budget``; never raises."""
        self.stop()
        if self._task is None:
            return
        last = asyncio.ensure_future(self._write(stopped=True))
        if not await finished_within(last, min(budget, _LAST_WRITE_SECONDS), self._clock):
            last.cancel()
            await finished_within(last, _CANCEL_SECONDS, self._clock)

    async def _run(self) -> None:
        while not self._closed:
            self._wake.clear()
            written = await self._write()
            if written and self._clock.monotonic() >= self._next_prune:
                await self._prune()
            await self._clock.sleep(_MIN_GAP_SECONDS)
            await wait_for(self._wake, self._beat - _MIN_GAP_SECONDS, self._clock)

    async def _write(self, *, stopped: bool = False) -> bool:
        async with self._writing:
            changes = tuple(self._changes)
            report = self._describe()
            if stopped:
                report = replace(report, state=str(State.STOPPED))
            if not await self._succeeds(self._store.report(report, changes)):
                return False
            self._complained = False
            written = {change.number for change in changes}
            while self._changes and self._changes[0].number in written:
                self._changes.popleft()
            return True

    async def _succeeds(self, call: Coroutine[Any, Any, object]) -> bool:
        """Return True if a call of the store ends in time and without an error."""
        task = asyncio.ensure_future(call)
        try:
            if not await finished_within(task, _WRITE_SECONDS, self._clock):
                return False
            task.result()
        except FleetUnavailableError as error:
            # The loss of the database is a log line of its own; this one is also for a schema that
            # is behind, and for a right that is missing.
            if not self._complained:
                self._complained = True
                _logger.info("Fleet is not recorded", extra={"detail": str(error)})
            return False
        finally:
            task.cancel()
            task.add_done_callback(ignore_error)
        return True

    async def _prune(self) -> None:
        self._next_prune = self._clock.monotonic() + _PRUNE_SECONDS
        await self._succeeds(self._store.prune(RETENTION_SECONDS))

    def _on_health(self, event: MonitorEvent) -> None:
        if isinstance(event, Transition):
            self._number += 1
            self._changes.append(
                CheckChange(
                    instance=self._describe().instance,
                    number=self._number,
                    check=event.check,
                    at=event.at,
                    old=None if event.old is None else str(event.old),
                    new=str(event.new),
                    code=event.code,
                )
            )
            self._wake.set()
        elif isinstance(event, CheckCompleted) and self._store.moved():
            self._wake.set()

    def _on_state(self, _: StateChanged) -> None:
        self._wake.set()


def held_report(
    *,
    instance: str,
    host: str,
    role: str,
    version: str,
    environment: str,
    started_at: datetime,
    lifecycle: Lifecycle,
    report: HealthReport,
    jobs: int,
    queues: Sequence[str],
) -> InstanceReport:
    """Return the report of a process from its parts."""
    last = lifecycle.history[-1] if lifecycle.history else None
    return InstanceReport(
        instance=instance,
        host=host,
        role=role,
        version=version,
        environment=environment,
        started_at=started_at,
        state=str(lifecycle.state),
        reason="" if last is None else last.reason,
        health=str(report.health),
        checks={name: str(check.status) for name, check in report.checks.items()},
        jobs=jobs,
        queues=tuple(queues),
    )


# -- history -------------------------------------------------------------------------------------

UNKNOWN = "unknown"
"""The status of a check while no process of the host ran."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The status of a check from a time on, to the next segment."""

    at: datetime
    status: str
    instance: str


@dataclass(slots=True, kw_only=True)
class CheckHistory:
    """The statuses of a check over some hours."""

    segments: list[Segment] = field(default_factory=list)
    uptime: float | None = None
    """The share of the known time in which it did not fail; None if nothing is known."""


def predecessors(instances: Sequence[Instance], of: InstanceReport) -> Sequence[Instance]:
    """Return the earlier runs of a process, the earliest first.

    They ran on the same host in the same role, one after the other; a process that ran beside a
    later one is none of them.
    """
    found: list[Instance] = []
    limit = of.started_at
    others = [
        each
        for each in instances
        if (each.report.host, each.report.role) == (of.host, of.role)
        and each.report.instance != of.instance
    ]
    for each in sorted(others, key=lambda one: one.seen_at, reverse=True):
        if each.seen_at <= limit + timedelta(seconds=1):
            found.append(each)
            limit = each.report.started_at
    return found[::-1]


def histories(
    runs: Sequence[Instance],
    changes: Sequence[CheckChange],
    since: datetime,
    until: datetime,
) -> Mapping[str, CheckHistory]:
    """Return the history of each check over the runs of a process, which are in order.

    ``changes`` are those of :meth:`FleetStore.history`, and the last run goes on.
    """
    by_run: dict[str, list[CheckChange]] = {}
    for change in changes:
        by_run.setdefault(change.instance, []).append(change)
    found: dict[str, CheckHistory] = {}
    for position, run in enumerate(runs):
        name = run.report.instance
        for change in by_run.get(name, ()):
            history = found.setdefault(change.check, CheckHistory())
            _append(history, Segment(at=max(change.at, since), status=change.new, instance=name))
        if position < len(runs) - 1 and run.seen_at > since:
            for check in run.report.checks:
                history = found.setdefault(check, CheckHistory())
                _append(history, Segment(at=run.seen_at, status=UNKNOWN, instance=name))
    for history in found.values():
        history.uptime = _uptime(history.segments, until)
    return found


def _append(history: CheckHistory, segment: Segment) -> None:
    segments = history.segments
    if segments and segments[-1].at >= segment.at:
        segments.pop()
    if not segments or segments[-1].status != segment.status:
        segments.append(segment)


def _uptime(segments: Sequence[Segment], until: datetime) -> float | None:
    known = failing = 0.0
    ends = [*(each.at for each in segments[1:]), until]
    for segment, end in zip(segments, ends, strict=True):
        seconds = max(0.0, (end - segment.at).total_seconds())
        if segment.status != UNKNOWN:
            known += seconds
            failing += seconds if segment.status == "fail" else 0.0
    return None if known == 0.0 else 1.0 - failing / known
