"""The audit trail: batches, outages, the end, and the limit of refusals."""

import asyncio
from collections.abc import Sequence

import pytest
from tests.manual_clock import ManualClock

from viralfx.adapters.memory import MemoryAuditStore
from viralfx.core.errors import LedgerUnavailableError
from viralfx.domain.audit import (
    MAX_TEXT_CHARACTERS,
    MAX_WAITING,
    PRUNED_AT_ONCE,
    Action,
    AuditEntry,
    AuditEvent,
    AuditTrail,
    AuditUnavailableError,
    RefusalLimit,
)
from viralfx.jobs.model import JobNotFoundError

STORED = "Audit trail is not stored"


class FailingStore(MemoryAuditStore):
    """A store that fails or hangs while a test wants it to."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.clock = clock
        self.error: Exception | None = None
        self.hangs = False
        self.batches: list[int] = []

    async def write(self, events: Sequence[AuditEvent]) -> None:
        """Fail, hang or keep the events."""
        if self.hangs:
            await self.clock.sleep(1e9)
        if self.error is not None:
            raise self.error
        self.batches.append(len(events))
        await super().write(events)


@pytest.fixture
def store(clock: ManualClock) -> FailingStore:
    """Return a store in manual time."""
    return FailingStore(clock)


@pytest.fixture
def trail(clock: ManualClock, store: FailingStore) -> AuditTrail:
    """Return a trail that is not open."""
    return AuditTrail(store, clock=clock, instance="pod-1", retention=3600.0)


def entry(target: str = "root") -> AuditEntry:
    """Return an entry."""
    return AuditEntry(action=Action.LEVEL, actor="management", address="::1", target=target)


async def test_events_are_stored_a_moment_later_and_together(
    trail: AuditTrail, store: FailingStore, clock: ManualClock
) -> None:
    """Those of before the start, too; listeners get each at once."""
    seen: list[AuditEvent] = []
    trail.subscribe(seen.append)
    trail.record(entry("first"))
    assert [each.target for each in seen] == ["first"]
    await trail.open()
    for number in range(4):
        trail.record(entry(str(number)))
    await clock.advance(1.0)

    assert store.batches == [5]
    assert list(await store.read()) == seen[::-1]
    assert {each.instance for each in seen} == {"pod-1"}
    trail.stop()


@pytest.mark.parametrize(
    "error", [AuditUnavailableError("the disk is full"), OSError("other"), None], ids=repr
)
async def test_an_outage_is_one_line_and_loses_what_does_not_fit(
    trail: AuditTrail,
    store: FailingStore,
    clock: ManualClock,
    error: Exception | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of a store that fails in any way, or hangs; the first events are stored later."""
    store.error, store.hangs = error, error is None
    await trail.open()
    for number in range(MAX_WAITING + 7):
        trail.record(entry(str(number)))
    await clock.advance(60.0)
    assert (trail.lost, trail.waiting) == (7, MAX_WAITING)
    assert [record.message for record in caplog.records].count(STORED) == 1

    store.error, store.hangs = None, False
    await clock.advance(60.0)
    assert (trail.lost, trail.waiting, sum(store.batches)) == (7, 0, MAX_WAITING)
    assert caplog.records[-1].message == "Audit trail is stored again"
    assert vars(caplog.records[-1])["lost"] == 7
    trail.stop()


async def test_the_end_stores_the_events_that_wait(trail: AuditTrail, store: FailingStore) -> None:
    """More than one batch; later events are lost, and counted."""
    await trail.open()
    for number in range(450):
        trail.record(entry(str(number)))
    await trail.close(5.0)
    trail.record(entry("late"))

    assert store.batches == [200, 200, 50]
    assert trail.lost == 1


async def test_the_end_does_not_wait_for_a_store_that_hangs(
    trail: AuditTrail, store: FailingStore, clock: ManualClock
) -> None:
    """It takes two seconds at most, less with a smaller budget, and counts the lost events."""
    store.hangs = True
    await trail.open()
    trail.record(entry())
    began = clock.monotonic()
    task = asyncio.ensure_future(trail.close(15.0))
    await clock.advance(2.5)
    assert task.done()
    assert clock.monotonic() - began <= 3.0
    assert trail.lost == 1


async def test_a_trail_without_a_store_has_listeners(clock: ManualClock) -> None:
    """As in parts of a test; nothing is lost, since nothing is to be stored."""
    trail, seen = AuditTrail(clock=clock), list[AuditEvent]()
    trail.subscribe(seen.append)
    await trail.open()
    trail.record(entry())
    await trail.close(1.0)

    assert (len(seen), trail.lost, trail.waiting) == (1, 0, 0)


async def test_the_error_of_an_action_decides_its_outcome(trail: AuditTrail) -> None:
    """A text of another library may have values, so only its type is recorded."""
    seen: list[AuditEvent] = []
    trail.subscribe(seen.append)
    errors = (JobNotFoundError("no job"), LedgerUnavailableError("lost"), KeyError("a secret"))
    for error in errors:
        with (
            pytest.raises(type(error)),
            trail.recorded(Action.RETRY, actor="api", address="192.0.2.7", target="1"),
        ):
            raise error
    with trail.recorded(Action.RETRY, actor="api") as made:
        made.after = "waiting"

    assert [(each.outcome, each.detail, each.after) for each in seen] == [
        ("refused", "JobNotFoundError: no job", None),
        ("failed", "LedgerUnavailableError: lost", None),
        ("failed", "KeyError", None),
        ("done", None, "waiting"),
    ]


async def test_a_long_text_is_cut(trail: AuditTrail) -> None:
    """Clients choose some of the texts, such as the path of a refused request."""
    seen: list[AuditEvent] = []
    trail.subscribe(seen.append)
    trail.record(entry("x" * 10_000))

    assert len(seen[0].target) == MAX_TEXT_CHARACTERS


async def test_old_events_are_pruned(
    trail: AuditTrail, store: FailingStore, clock: ManualClock
) -> None:
    """By the retention, also in a process without further events."""
    await trail.open()
    trail.record(entry())
    await clock.advance(3000.0)
    assert len(await store.read()) == 1
    await clock.advance(9000.0)
    assert len(await store.read()) == 0
    trail.stop()


class FullStore(FailingStore):
    """A store with many old events, of which each step of the retention takes some time."""

    old = 5 * PRUNED_AT_ONCE + 1

    async def prune(self, older_than: float, limit: int = PRUNED_AT_ONCE) -> int:
        """Delete some of them."""
        assert older_than == 3600.0
        await self.clock.sleep(0.1)
        deleted = min(limit, self.old)
        self.old -= deleted
        return deleted


async def test_the_retention_deletes_all_old_events(clock: ManualClock) -> None:
    """In steps, between which new events are stored; not ten thousand in an hour."""
    store = FullStore(clock)
    trail = AuditTrail(store, clock=clock, retention=3600.0)
    await trail.open()
    trail.record(entry("first"))
    await clock.advance(0.2)
    trail.record(entry("second"))
    await clock.advance(10.0)

    assert (store.old, store.batches, trail.waiting) == (0, [1, 1], 0)
    trail.stop()


async def test_one_refusal_of_an_address_is_recorded_in_a_minute(clock: ManualClock) -> None:
    """The next one has the number of the others."""
    limit = RefusalLimit(clock.monotonic)
    assert [limit.others("192.0.2.7") for _ in range(1000)] == [0] + [None] * 999
    assert limit.others("192.0.2.8") == 0
    await clock.advance(60.0)
    assert limit.others("192.0.2.7") == 999


async def test_refusals_of_many_addresses_are_limited_together(clock: ManualClock) -> None:
    """A client with a network of IPv6 has more addresses than a table should have rows."""
    limit = RefusalLimit(clock.monotonic)
    recorded = [limit.others(f"2001:db8::{number:x}") for number in range(5000)]
    assert recorded.count(0) == 60
    assert len(limit._sources) == 1000
    await clock.advance(60.0)
    assert limit.others("2001:db8::1") == 0
