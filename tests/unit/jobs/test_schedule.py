"""Times of schedules: cron expressions in time zones, changes of the clock, and missed times."""

from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise, takewhile
from typing import Annotated, Any, Literal, NewType, Optional, TypedDict, TypeVar
from zoneinfo import ZoneInfo

import msgspec
import pytest
from cronsim import CronSim
from hypothesis import given, settings
from hypothesis import strategies as st

from viralfx.adapters.codec import MsgspecCodec
from viralfx.jobs.codec import PayloadError
from viralfx.jobs.schedule import HOURLY, Schedule, ScheduleState, times_of
from viralfx.jobs.tasks import declared_task, task

BERLIN, NEW_YORK, LORD_HOWE, APIA = (
    "Europe/Berlin",
    "America/New_York",
    "Australia/Lord_Howe",
    "Pacific/Apia",
)


def scheduled(cron: str, timezone: str = "UTC", *, catch_up: bool = False) -> Schedule:
    """Return a schedule of a task."""
    return Schedule(task="t", cron=cron, timezone=timezone, catch_up=catch_up)


def local(schedule: Schedule, day: str, days: int = 1) -> list[str]:
    """Return the local times with their offsets from a day on, for so many days."""
    zone = ZoneInfo(schedule.timezone)
    begin = datetime.fromisoformat(day).replace(tzinfo=zone)
    end = (begin + timedelta(days=days)).astimezone(UTC)
    found: list[str] = []
    for time in schedule.times_after(begin.astimezone(UTC) - timedelta(seconds=1)):
        if time >= end:
            return found
        found.append(time.astimezone(zone).strftime("%d %H:%M %z"))
    return found


@pytest.mark.parametrize(
    ("cron", "timezone", "day", "expected"),
    [
        # The clock is put forward over 02:30: it runs when that happens, once.
        ("30 2 * * *", BERLIN, "2026-03-29", ["29 03:00 +0200"]),
        ("0,30 2 * * *", BERLIN, "2026-03-29", ["29 03:00 +0200"]),
        ("30 2 * * *", NEW_YORK, "2026-03-08", ["08 03:00 -0400"]),
        ("15 2 * * *", LORD_HOWE, "2026-10-04", ["04 02:30 +1100"]),
        # The clock is put back over 02:30: it runs the first time.
        ("30 2 * * *", BERLIN, "2026-10-25", ["25 02:30 +0200"]),
        ("30 1 * * *", NEW_YORK, "2026-11-01", ["01 01:30 -0400"]),
        ("45 1 * * *", LORD_HOWE, "2026-04-05", ["05 01:45 +1100"]),
        # With a star as minute or hour, and with seconds, it follows the clock.
        (
            "*/30 2 * * *",
            BERLIN,
            "2026-10-25",
            ["25 02:00 +0200", "25 02:30 +0200", "25 02:00 +0100", "25 02:30 +0100"],
        ),
        ("*/30 2 * * *", BERLIN, "2026-03-29", []),
        ("0 30 2 * * *", BERLIN, "2026-10-25", ["25 02:30 +0200", "25 02:30 +0100"]),
        ("0 30 2 * * *", BERLIN, "2026-03-29", []),
        # Half an hour: 02:00 comes once, an hour and a half after 01:00.
        ("0 0 2 * * *", LORD_HOWE, "2026-04-05", ["05 02:00 +1030"]),
        ("*/15 2 * * *", LORD_HOWE, "2026-10-04", ["04 02:30 +1100", "04 02:45 +1100"]),
        # A day that an island at the date line left out.
        ("0 12 * * *", APIA, "2011-12-29", ["29 12:00 -1000", "31 00:00 +1400", "31 12:00 +1400"]),
    ],
)
def test_a_change_of_the_clock(cron: str, timezone: str, day: str, expected: list[str]) -> None:
    """The clock is put forward, put back, by half an hour, or by a day."""
    assert local(scheduled(cron, timezone), day, 3 if timezone == APIA else 1) == expected


def test_an_hourly_schedule_runs_each_hour_of_the_short_and_the_long_day() -> None:
    """23 and 25 times."""
    hourly = scheduled("0 * * * *", BERLIN)

    assert len(local(hourly, "2026-03-29")) == 23
    assert len(local(hourly, "2026-10-25")) == 25


FIELDS = {
    "minute": ["*/7", "0", "15", "30,45", "59"],
    "hour": ["*", "*/2", "0", "1", "2", "1-3", "23"],
    "day": ["*", "4,5,29"],
}
CHANGES = [  # two hours before each
    (BERLIN, datetime(2026, 3, 28, 23, tzinfo=UTC)),
    (BERLIN, datetime(2026, 10, 24, 23, tzinfo=UTC)),
    (NEW_YORK, datetime(2026, 3, 8, 5, tzinfo=UTC)),
    (NEW_YORK, datetime(2026, 11, 1, 4, tzinfo=UTC)),
    (LORD_HOWE, datetime(2026, 4, 4, 13, tzinfo=UTC)),
    (LORD_HOWE, datetime(2026, 10, 3, 13, 30, tzinfo=UTC)),
    ("Asia/Beirut", datetime(2026, 3, 28, 20, tzinfo=UTC)),
    ("Pacific/Chatham", datetime(2026, 4, 4, 12, tzinfo=UTC)),
]


def by_hand(cron: str, timezone: str, begin: datetime, hours: int) -> list[datetime]:
    """Return each minute whose local time matches, by the library's parser alone."""
    zone, parsed = ZoneInfo(timezone), CronSim(cron, begin)
    found = []
    for minutes in range(1, hours * 60 + 1):
        time = begin + timedelta(minutes=minutes)
        at = time.astimezone(zone)
        fields = at.minute in parsed.minutes and at.hour in parsed.hours
        if fields and at.month in parsed.months and parsed.match_day(at.date()):
            found.append(time)
    return found


@settings(max_examples=20)
@given(
    minute=st.sampled_from(FIELDS["minute"]),
    hour=st.sampled_from(FIELDS["hour"]),
    day=st.sampled_from(FIELDS["day"]),
    place=st.sampled_from(CHANGES),
)
def test_the_times_are_those_whose_local_time_matches(
    minute: str, hour: str, day: str, place: tuple[str, datetime]
) -> None:
    """Around a change of the clock, and the same ones backwards."""
    timezone, begin = place
    end = begin + timedelta(hours=4)
    schedule = scheduled(f"0 {minute} {hour} {day} * *", timezone)
    forward = list(takewhile(lambda time: time <= end, schedule.times_after(begin)))
    expected = by_hand(schedule.cron, timezone, begin, 4)
    # At midnight of a day without midnight the library returns the moment of the change.
    matching = [each for each in forward if each in expected or timezone != "Asia/Beirut"]

    assert matching == expected
    for earlier, later in pairwise(forward[:10]):
        assert schedule.last_before(later) == earlier
        assert schedule.last_before(later + timedelta(microseconds=1)) == later


@settings(max_examples=20)
@given(
    minute=st.sampled_from(["0", "15", "30,45", "59"]),
    hour=st.sampled_from(["0", "1", "2", "1-3", "23"]),
    place=st.sampled_from(CHANGES),
    offset=st.integers(0, 4 * 60),
)
def test_fixed_times_are_those_of_the_library(
    minute: str, hour: str, place: tuple[str, datetime], offset: int
) -> None:
    """Each of its times once, from any moment on."""
    timezone, begin = place
    schedule = scheduled(f"{minute} {hour} * * *", timezone)
    start = begin - timedelta(days=2)
    library = CronSim(schedule.cron, start.astimezone(ZoneInfo(timezone)))
    times = sorted({next(library).astimezone(UTC) for _ in range(20)})
    moment = begin + timedelta(minutes=offset)

    assert schedule.next_after(moment) == next(time for time in times if time > moment)
    assert schedule.last_before(moment) == [time for time in times if time < moment][-1]


@settings(max_examples=50)
@given(st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1)))  # noqa: DTZ001 - made aware below
def test_full_hours_are_those_of_the_library(moment: datetime) -> None:
    """Hours in UTC are calculated without it, as the built-in tasks need them."""
    after = moment.replace(tzinfo=UTC)
    library = (each.astimezone(UTC) for each in CronSim(HOURLY, after))

    assert list(islice(scheduled(HOURLY).times_after(after), 3)) == list(islice(library, 3))


NOON = datetime(2026, 1, 6, 12, 0, 20, tzinfo=UTC)


@pytest.mark.parametrize(
    ("catch_up", "hours", "minutes", "expected"),
    [
        (True, 5, 0, [12]),  # the time of now counts for the missed ones
        (True, 5, 30, [12]),
        (True, 5, 90, [13]),  # the latest one
        (False, 5, 0, [12]),
        (False, 5, 30, []),
        (True, 0, 30, []),  # nothing was missed
    ],
)
def test_missed_times(hours: int, minutes: int, expected: list[int], *, catch_up: bool) -> None:
    """Of those that are over a minute late the latest one runs, if any; the others run."""
    hourly, now = scheduled("0 * * * *", catch_up=catch_up), NOON + timedelta(minutes=minutes)

    assert [time.hour for time in hourly.due(NOON - timedelta(hours=hours), now)] == expected


def test_a_missed_time_of_years_ago_is_found() -> None:
    """However long no worker ran, and however seldom the task runs."""
    year = timedelta(days=365)
    leap_day = scheduled("0 0 29 2 *", catch_up=True)

    assert leap_day.due(NOON - 3 * year, NOON) == (datetime(2024, 2, 29, tzinfo=UTC),)
    assert leap_day.due(NOON - year, NOON) == ()
    assert len(scheduled("* * * * * *", catch_up=True).due(NOON - year, NOON)) == 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cron": "0 0 30 2 *"}, "never fires"),
        ({"cron": "0 0 31 4,6,9,11 *"}, "never fires"),
        ({"cron": "* * */20 * 1L"}, "never fires"),
        ({"cron": "61 * * * *"}, "Bad minute; write five fields"),
        ({"cron": "@daily"}, "write five fields"),
        ({"cron": ""}, "write five fields"),
        ({"cron": "* " * 200}, "write five fields"),
        ({"cron": 5}, "write five fields"),
        ({"cron": "0 0 * * *", "timezone": "Europe/Berln"}, r"did you mean Europe/Berlin\?"),
        ({"cron": "0 0 * * *", "timezone": "CEST"}, r"such as 'Europe/Berlin'$"),
        ({"cron": "0 0 * * *", "timezone": "../etc"}, "is not a time zone"),
        ({"cron": "0 0 * * *", "timezone": ""}, "is not a time zone"),
        ({"cron": "0 0 0 * * *"}, "has seconds, and a schedule has none; write five fields"),
        ({"timezone": "Europe/Berlin"}, "timezone has no schedule; add cron="),
        ({"catch_up": True}, "catch_up has no schedule; add cron="),
    ],
)
def test_a_schedule_that_is_not_valid_is_refused_at_its_declaration(
    options: dict[str, object], message: str
) -> None:
    """The error names the task and says what to write."""

    async def run(_: None) -> None: ...

    with pytest.raises(ValueError, match=message) as error:
        task("orders.report", **options)(run)  # type: ignore[arg-type]

    assert str(error.value).startswith("@task('orders.report'): ")


@pytest.mark.parametrize("catch_up", ["last", 1, None])
def test_catch_up_is_true_or_false(catch_up: object) -> None:
    """Any other value is refused at the declaration."""

    async def run(_: None) -> None: ...

    with pytest.raises(TypeError, match=r"^@task\('t'\): catch_up=.+ must be True, for one run"):
        task("t", cron="0 0 * * *", catch_up=catch_up)(run)  # type: ignore[arg-type]


def test_the_next_times_of_a_list_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are right at each moment, also before the one of the last list; most cost no search."""
    yearly = scheduled("0 3 1 1 *", BERLIN)
    searches = 0
    search = Schedule.next_after

    def counted(self: Schedule, moment: datetime) -> datetime | None:
        nonlocal searches
        searches += 1
        return search(self, moment)

    for days in (0, 1, 1, 200, 400, 5):
        now = NOON + timedelta(days=days)
        expected = tuple(islice(yearly.times_after(now), 5))
        with monkeypatch.context() as patched:
            patched.setattr(Schedule, "next_after", counted)
            (listed,) = times_of([], [yearly], now, 5)
        assert listed.next_runs == expected

    assert searches <= 5 + 2 + 5


def test_a_long_list_costs_its_searches_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop waits for a list, and pages ask for it again and again."""
    declared = [
        scheduled(f"{n % 60} {n // 60 % 24} {n // 1440 + 1} * *", "UTC") for n in range(1500)
    ]
    first = times_of([], declared, NOON, 1)
    with monkeypatch.context() as patched:
        patched.setattr(Schedule, "next_after", None)
        again = times_of([], declared, NOON, 1)

    assert first == again


def test_the_schedule_of_a_task_is_checked_once() -> None:
    """A search for its next time takes no longer than the check."""

    @task("t", cron="0 3 * * *")
    async def run(_: None) -> None: ...

    found = declared_task(run)
    assert found is not None
    assert found.schedule is found.schedule


def test_a_list_hides_schedules_that_no_worker_declared_for_a_day() -> None:
    """Unless they are paused, or this process declares them; their last time is shown then."""
    here = Schedule(task="here", cron=HOURLY)

    def state(task: str, hours: float, **more: Any) -> ScheduleState:
        seen_at = NOON - timedelta(hours=hours)
        return ScheduleState(
            task=task,
            cron=HOURLY,
            timezone="UTC",
            since=seen_at,
            last_run_at=seen_at,
            seen_at=seen_at,
            **more,
        )

    states = [
        state("here", 25.0),
        state("old", 25.0),
        state("paused", 2000.0, paused_at=NOON),
        state("seen", 23.0),
    ]
    listed = times_of(states, [here], NOON, 1)

    assert [each.task for each in listed] == ["here", "paused", "seen"]
    assert listed[0].last_run_at == states[0].last_run_at


class Row(TypedDict):
    """A payload."""

    number: int


Number = NewType("Number", int)
MaybeNumber = NewType("MaybeNumber", int | None)  # type: ignore[valid-newtype]
Bound = TypeVar("Bound", bound=int)
Free = TypeVar("Free")


@pytest.mark.parametrize(
    ("kind", "fits"),
    [
        (None, True),
        (Any, True),
        (object, True),
        (int | None, True),
        (Optional[Row], True),  # noqa: UP045 - the other spelling
        (Annotated[int | None, "a note"], True),
        (Literal["all", None], True),  # noqa: PYI061 - another spelling
        (MaybeNumber, True),
        (Free, True),
        (msgspec.Raw, True),
        (int, False),
        (str | int, False),
        (list[int], False),
        (dict[str, None], False),
        (Row, False),
        (Annotated[int, "a note"], False),
        (Literal["all"], False),
        (Number, False),
        (Bound, False),
        (Schedule, False),
    ],
    ids=str,
)
def test_the_payload_of_a_scheduled_task_is_null(kind: object, *, fits: bool) -> None:
    """A type that null does not fit is refused at the declaration, as the codec refuses it."""

    async def run(payload: object) -> None: ...

    run.__annotations__["payload"] = kind
    if fits:
        task("nightly", cron="0 3 * * *")(run)
        MsgspecCodec().decode(b"null", kind)
    else:
        with pytest.raises(TypeError, match="payload null, which its payload type does not allow"):
            task("nightly", cron="0 3 * * *")(run)
        with pytest.raises(PayloadError):
            MsgspecCodec().decode(b"null", kind)


def test_a_payload_without_a_type_may_be_null() -> None:
    """As may that of a task without a schedule."""

    @task("nightly", cron="0 3 * * *")
    async def run(payload) -> None: ...  # type: ignore[no-untyped-def]  # noqa: ANN001

    @task("at-once")
    async def other(payload: int) -> None: ...

    assert None not in (declared_task(run), declared_task(other))


def test_a_task_has_its_schedule() -> None:
    """None without a cron expression."""

    @task("a", cron="*/5 * * * *", timezone=BERLIN, catch_up=True)
    async def scheduled_task(_: None) -> None: ...

    @task("b")
    async def plain(_: None) -> None: ...

    first, second = declared_task(scheduled_task), declared_task(plain)
    assert first is not None
    assert second is not None
    assert first.schedule == Schedule(task="a", cron="*/5 * * * *", timezone=BERLIN, catch_up=True)
    assert second.schedule is None
