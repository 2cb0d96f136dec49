"""Schedules: the runs of a task by a cron expression, and missed ones that are made up for."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice, takewhile
from typing import Protocol
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from viralfx.core.errors import ViralFXError, suggest
from viralfx.core.extras import MissingExtraError, needed_by

ON_TIME_SECONDS = 60.0
"""A run that was due longer ago than this when a worker finds it was missed."""
SHOWN_SECONDS = 86_400.0
"""A schedule that no worker declared for longer than this is in no list, unless it is paused."""
HOURLY = "0 * * * *"
"""Each full hour; in UTC it needs no extra, so that the built-in tasks need none."""
_MAX_CHARACTERS = 200
_ANY_MOMENT = datetime(2000, 1, 1, tzinfo=UTC)
_YEAR = timedelta(days=366)
_MAX_LOOK_BACK = timedelta(days=50 * 365)
_FIELDS = 5
_FIELDS_WITH_SECONDS = 6
_MONTH = -2

_HOW = "write five fields, minute hour day-of-month month day-of-week, as in '*/5 * * * *'"


class UnknownScheduleError(ViralFXError):
    """No task of this name has a schedule, here or at a worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleState:
    """A schedule as the ledger knows it. Times are UTC."""

    task: str
    cron: str
    timezone: str
    since: datetime
    """When a worker first declared the task with this expression and time zone."""
    last_run_at: datetime | None
    """The latest run for which a job was accepted."""
    seen_at: datetime = field(compare=False)
    """When a worker last declared it."""
    paused_at: datetime | None = None
    """When it was paused; None: it is not paused."""
    resumed_at: datetime | None = None
    """When its last pause ended."""

    @property
    def settled_until(self) -> datetime | None:
        """The moment up to which the ledger accepts no run any more; None: there is none."""
        return max(filter(None, (self.last_run_at, self.resumed_at)), default=None)

    @property
    def handled_until(self) -> datetime:
        """The moment up to which no run is left."""
        return max(self.since, self.settled_until or self.since)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleTimes:
    """The last run of a schedule and its next ones, in UTC."""

    task: str
    cron: str
    timezone: str
    last_run_at: datetime | None
    """The latest run for which a job was accepted."""
    next_runs: Sequence[datetime]
    """Empty if this process cannot calculate them, without the time zone or the extra ``cron``."""
    paused: bool = False
    """True if its runs are skipped until it is resumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledAcceptance:
    """The answer of the ledger to a job of a schedule."""

    created: bool
    """False if this run or a later one was taken before, or is skipped by a pause. True also if the
    job is a duplicate of an unfinished one, and so was not stored."""
    handled_until: datetime
    """The moment up to which no run is left; UTC."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A cron expression in a time zone, and the task that runs at its times.

    The expression has five fields. A sixth one, seconds before the others, is calculated too, but
    :meth:`require_five_fields` refuses it for a task. At changes of the local time it follows
    Debian's cron. If minute and hour are set, each time runs once on its day: one that does not
    exist runs when the clock has been put forward, and one that occurs twice runs the first time.
    An expression whose minute or hour begins with ``*``, or with seconds, runs at each moment whose
    local time it matches.

    Raises ``ValueError`` for an expression that is malformed or never fires and an unknown time
    zone, ``TypeError`` for a ``catch_up`` that is no bool, and :class:`MissingExtraError` without
    the extra ``cron``.
    """

    task: str
    cron: str
    timezone: str = "UTC"
    catch_up: bool = False

    def __post_init__(self) -> None:
        """Check everything."""
        catch_up: object = self.catch_up
        if not isinstance(catch_up, bool):
            problem = "must be True, for one run after missed ones, or False, for none"
            raise TypeError(self._problem("catch_up", catch_up, problem))
        try:
            ZoneInfo(self.timezone)
        except (ZoneInfoNotFoundError, ValueError, TypeError, OSError):
            # The three-letter names are no places: EST would be an answer to CEST.
            places = [each for each in available_timezones() if "/" in each or each == "UTC"]
            hint = suggest(str(self.timezone), places)
            problem = "is not a time zone of the IANA database, such as 'Europe/Berlin'"
            raise ValueError(
                self._problem("timezone", self.timezone, f"{problem}; {hint}" if hint else problem)
            ) from None
        cron: object = self.cron
        if not isinstance(cron, str) or len(cron) > _MAX_CHARACTERS:
            raise ValueError(self._problem("cron", self.cron, f"is no cron expression; {_HOW}"))
        if self._is_hourly:
            return
        with needed_by(f"@task({self.task!r}, cron=...)"):
            from cronsim import CronSimError  # noqa: PLC0415 - a process may have no schedules
        try:
            fires = self.next_after(_ANY_MOMENT) is not None
        except (CronSimError, ValueError) as error:
            if not _has_impossible_date(self.cron):
                problem = f"is no cron expression: {error}; {_HOW}"
                raise ValueError(self._problem("cron", self.cron, problem)) from None
            fires = False
        if not fires:
            problem = "never fires: no month has a day that matches all fields; change the day"
            raise ValueError(self._problem("cron", self.cron, problem))

    def require_five_fields(self) -> None:
        """Raise ``ValueError`` for an expression with seconds.

        Libraries differ about their place: the first or the last field.
        """
        if len(self.cron.split()) != _FIELDS:
            problem = f"has seconds, and a schedule has none; {_HOW}"
            raise ValueError(self._problem("cron", self.cron, problem))

    @property
    def _is_hourly(self) -> bool:
        return self.cron == HOURLY and self.timezone == "UTC"

    def _problem(self, name: str, value: object, problem: str) -> str:
        return f"@task({self.task!r}): {name}={value!r} {problem}"

    def next_after(self, moment: datetime) -> datetime | None:
        """Return the first time after a moment, in UTC; None if there is none in 50 years."""
        if self.timezone == "UTC":
            return self._first(moment, moment, with_zone=True)
        found = self._first(moment, moment, with_zone=True)
        also = self._first(moment, moment, with_zone=False)
        if found is None or (also is not None and also < found):
            found = also
        if found is not None and (change := _put_back(ZoneInfo(self.timezone), moment, found)):
            again = self._first(change - timedelta(seconds=1), moment, with_zone=True)
            found = found if again is None else min(found, again)
        return found

    def _first(self, start: datetime, after: datetime, *, with_zone: bool) -> datetime | None:
        # The search compares local times, of which some occur twice.
        times = self._search(start, with_zone=with_zone)
        return next((time for time in times if time > after), None)

    def last_before(self, moment: datetime) -> datetime | None:
        """Return the last time before a moment, in UTC; None if there is none in 50 years."""
        # Not by the library's search backwards, which may not end in a night in which a clock is
        # moved. There is no time between `until` and the moment.
        until, near = moment, timedelta(seconds=ON_TIME_SECONDS)
        while (found := self.next_after(moment - near)) is None or found >= moment:
            if near > _MAX_LOOK_BACK:
                return None
            until, near = moment - near, 2 * near
        while (later := self.next_after(found)) is not None and later < moment:
            middle = later + (until - later) / 2
            beyond = self.next_after(middle)
            if beyond is not None and beyond < moment:
                found = beyond
            else:
                found, until = later, middle
        return found

    def times_after(self, moment: datetime) -> Iterator[datetime]:
        """Yield the times after a moment, in UTC."""
        found: datetime | None = moment
        while found is not None and (found := self.next_after(found)) is not None:
            yield found

    def due(self, after: datetime, now: datetime) -> Sequence[datetime]:
        """Return the times after ``after`` and up to ``now`` that have to run, oldest first.

        These are all times of the last :data:`ON_TIME_SECONDS` seconds. The earlier ones were
        missed: with ``catch_up`` the latest of them has to run, unless a run is on time, which
        counts for it.
        """
        missed_until = now - timedelta(seconds=ON_TIME_SECONDS)
        on_time = takewhile(lambda time: time <= now, self.times_after(max(after, missed_until)))
        times = tuple(on_time)
        if times or not self.catch_up or after >= missed_until:
            return times
        latest = self.last_before(missed_until + timedelta(microseconds=1))
        return (latest,) if latest is not None and latest > after else ()

    def _search(self, moment: datetime, *, with_zone: bool) -> Iterator[datetime]:
        """Yield times from about a moment on, in UTC and in order.

        In a time zone the library walks in hours of elapsed time. So it passes over times if a
        clock is moved by half an hour, or not at a full hour. A search in local time finds those
        that occur once or a first time, one from the moment of the change those that occur again.
        """
        if self._is_hourly:
            yield from _full_hours_after(moment)  # it does not end
        from cronsim import CronSim  # noqa: PLC0415 - as above

        # The library is faster if it sees that it is UTC.
        zone = UTC if self.timezone == "UTC" else ZoneInfo(self.timezone)
        start = moment.astimezone(zone)
        start = start if with_zone else start.replace(tzinfo=None)
        for found in CronSim(self.cron, start):
            if with_zone:
                yield found.astimezone(UTC)
                continue
            local = found.replace(tzinfo=zone)
            moment = local.astimezone(UTC)
            if moment.astimezone(zone).replace(tzinfo=None) == found:
                yield moment


def _full_hours_after(moment: datetime) -> Iterator[datetime]:
    hour = moment.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    while True:
        hour += timedelta(hours=1)
        yield hour


def _put_back(zone: ZoneInfo, after: datetime, until: datetime) -> datetime | None:
    """Return the first moment at which the clocks of a zone are put back; None if they are not."""

    def offset(moment: datetime) -> timedelta:
        return moment.astimezone(zone).utcoffset() or timedelta()

    early = after
    while early < until and early < after + _YEAR:
        late = min(early + timedelta(days=1), until)
        if offset(late) < (before := offset(early)):
            while late - early > timedelta(seconds=1):
                middle = early + (late - early) / 2
                early, late = (middle, late) if offset(middle) == before else (early, middle)
            return late.replace(microsecond=0)
        early = late
    return None


_next_times_of: dict[tuple[str, str], tuple[datetime, Sequence[datetime]]] = {}
"""The times after a moment, by expression and time zone: to find those of a year takes long."""
_MAX_KEPT_SCHEDULES = 10_000


def _next_times(schedule: Schedule, now: datetime, count: int) -> Sequence[datetime]:
    key = schedule.cron, schedule.timezone
    since, known = _next_times_of.pop(key, (now, ()))
    times = [time for time in known if time > now] if since <= now else []
    missing = islice(schedule.times_after(times[-1] if times else now), max(0, count - len(times)))
    times += missing
    _next_times_of[key] = now, times
    if len(_next_times_of) > _MAX_KEPT_SCHEDULES:
        del _next_times_of[next(iter(_next_times_of))]  # that of the longest ago
    return tuple(times[:count])


def times_of(
    states: Iterable[ScheduleState], declared: Iterable[Schedule], now: datetime, count: int
) -> Sequence[ScheduleTimes]:
    """Return the schedules that the ledger knows or this process declares, by task.

    Without those that no worker has declared for :data:`SHOWN_SECONDS`: their tasks were probably
    removed. ``count`` is the number of next times.
    """
    found = {
        each.task: ScheduleTimes(
            task=each.task,
            cron=each.cron,
            timezone=each.timezone,
            last_run_at=None,
            next_runs=_next_times(each, now, count),
        )
        for each in declared
    }
    shown_since = now - timedelta(seconds=SHOWN_SECONDS)
    for state in states:
        known = found.get(state.task)
        if known is None and state.paused_at is None and state.seen_at < shown_since:
            continue
        if known is None or (known.cron, known.timezone) != (state.cron, state.timezone):
            # Another version of the service declared it.
            try:
                schedule = Schedule(task=state.task, cron=state.cron, timezone=state.timezone)
                times = _next_times(schedule, now, count)
            except (ValueError, MissingExtraError):
                times = ()
        else:
            times = tuple(known.next_runs)
        found[state.task] = ScheduleTimes(
            task=state.task,
            cron=state.cron,
            timezone=state.timezone,
            last_run_at=state.last_run_at,
            next_runs=times,
            paused=state.paused_at is not None,
        )
    return [found[task] for task in sorted(found)]


class ScheduleStore(Protocol):
    """The part of the ledger that stores the schedules of the fleet."""

    async def declare_schedules(
        self, schedules: Sequence[Schedule], forget_after: float
    ) -> Sequence[ScheduleState]:
        """Store the schedules that a worker knows, and return their states.

        A new schedule, or one whose expression or time zone changed, begins now. Schedules that no
        worker declared for ``forget_after`` seconds are deleted, unless they are paused.
        """
        ...

    async def pause_schedule(self, task: str) -> bool:
        """Accept no job for the times of a schedule until it is resumed.

        The pause of a paused schedule does not begin again. A paused schedule is not deleted.
        Returns False if there is no schedule of ``task``.
        """
        ...

    async def resume_schedule(self, task: str) -> bool:
        """End the pause of a schedule; its times up to now get no job.

        Returns False if there is no schedule of ``task``.
        """
        ...

    async def schedules(self) -> Sequence[ScheduleState]:
        """Return the schedules that workers declared, in the order of their tasks."""
        ...


def _has_impossible_date(cron: str) -> bool:
    """Return True if only the combination of day and month makes an expression malformed."""
    fields = cron.split()
    if not 1 - _MONTH < len(fields) <= _FIELDS_WITH_SECONDS:
        return False
    month, fields[_MONTH] = fields[_MONTH], "*"
    from cronsim import CronSim, CronSimError  # noqa: PLC0415 - as above

    try:
        CronSim(" ".join(fields), _ANY_MOMENT)
        CronSim(f"* * * {month} *", _ANY_MOMENT)
    except (CronSimError, ValueError):
        return False
    return True
