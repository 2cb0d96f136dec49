"""The contract of ``AuditStore``, run against every adapter.

A new adapter adds a row to ``STORES``.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from tests.integration.postgres_clients import config_of, opened
from tests.servers.pgbouncer import POOLED, Poolers
from tests.servers.postgres import Database

from viralfx.adapters.memory import MemoryAuditStore
from viralfx.adapters.postgres import PostgresAuditStore
from viralfx.core.clock import SystemClock
from viralfx.core.ids import new_job_id
from viralfx.domain.audit import AuditEvent, AuditFilter, AuditStore, AuditUnavailableError

NOON = datetime(2026, 1, 6, 12, 0, 0, 123456, tzinfo=UTC)
Make = Callable[[pytest.FixtureRequest], AbstractAsyncContextManager[AuditStore]]


def event(**more: object) -> AuditEvent:
    """Return an event that is later than those before."""
    known = AuditEvent(
        id=new_job_id(),
        at=NOON,
        actor="management",
        address="192.0.2.7",
        action="logger.level",
        target="größe <script>",
        outcome="done",
        before="log",
        after="error",
        detail="a detail",
        correlation_id="planted",
        instance="pod-1-17-ab",
    )
    return replace(known, **more)  # type: ignore[arg-type]


@asynccontextmanager
async def _memory(_: pytest.FixtureRequest) -> AsyncIterator[AuditStore]:
    yield MemoryAuditStore(SystemClock())


@asynccontextmanager
async def _postgres(request: pytest.FixtureRequest) -> AsyncIterator[AuditStore]:
    database: Database = request.getfixturevalue("ledger_database")
    database.execute("delete from viralfx_audit_events")
    async with opened(config_of(database)) as pool:
        yield PostgresAuditStore(pool)


def _behind(mode: str, prepared: int) -> Make:
    @asynccontextmanager
    async def made(request: pytest.FixtureRequest) -> AsyncIterator[AuditStore]:
        database: Database = request.getfixturevalue("ledger_database")
        poolers: Poolers = request.getfixturevalue("shared_pgbouncer")
        database.execute("delete from viralfx_audit_events")
        pooler = poolers(database.server, mode, max_prepared_statements=prepared)
        async with opened(config_of(database, through=pooler, pooler=mode)) as pool:
            yield PostgresAuditStore(pool)

    return made


STORES: dict[str, Make] = {"memory": _memory, "postgres": _postgres}
POOLERS = {f"pgbouncer {mode} {number}": _behind(mode, number) for mode, number in POOLED}


@pytest.fixture(
    params=[
        *(pytest.param(make, id=name) for name, make in STORES.items()),
        *(pytest.param(make, id=name, marks=pytest.mark.soak) for name, make in POOLERS.items()),
    ]
)
async def store(request: pytest.FixtureRequest) -> AsyncIterator[AuditStore]:
    """Return each store in turn, empty."""
    make: Make = request.param
    async with make(request) as store:
        yield store


async def test_events_come_back_whole_and_the_latest_first(store: AuditStore) -> None:
    """Also one without the fields that may be missing."""
    bare = dict.fromkeys(("address", "before", "after", "detail", "correlation_id"))
    events = [event(), event(**bare, instance=""), event(at=NOON + timedelta(seconds=1))]
    await store.write(events[:1])
    await store.write(events[1:])

    assert list(await store.read()) == events[::-1]
    assert (await store.read())[0].at.utcoffset() == timedelta(0)


async def test_a_repeated_write_stores_each_event_once(store: AuditStore) -> None:
    """The response of a write may be lost; the process then writes it again."""
    events = [event() for _ in range(3)]
    await store.write(events[:2])
    await store.write(events)
    await store.write([])

    assert list(await store.read()) == events[::-1]


async def test_a_text_with_any_character_is_stored(store: AuditStore) -> None:
    """An event that no store takes would hold up all those behind it."""
    await store.write([event(actor="a\0\udcff", target="\0", detail="\ud800")])

    assert len(await store.read()) == 1
    assert list(await store.read(AuditFilter(actor="\0"))) == []


async def test_events_are_found_by_each_field_of_a_filter(store: AuditStore) -> None:
    """A filter with several fields matches events that match all of them."""
    hour = timedelta(hours=1)
    first = event(at=NOON, actor="api", action="job.retry")
    second = event(at=NOON + hour, action="job.retry", outcome="refused")
    third = event(at=NOON + 2 * hour)
    await store.write([first, second, third])

    async def found(**wanted: object) -> list[AuditEvent]:
        return list(await store.read(AuditFilter(**wanted)))  # type: ignore[arg-type]

    assert await found(actor="api") == [first]
    assert await found(action="job.retry") == [second, first]
    assert await found(outcome="refused") == [second]
    assert await found(since=NOON + hour) == [third, second]
    assert await found(until=NOON + hour) == [first]
    assert await found(action="job.retry", since=NOON + hour) == [second]
    assert await found(actor="unknown") == []


async def test_pages_have_each_event_once(store: AuditStore) -> None:
    """Also while further events arrive; the last page is shorter."""
    events = [event() for _ in range(5)]
    await store.write(events)
    pages = [list(await store.read(limit=2))]
    await store.write([event()])
    while pages[-1]:
        pages.append(list(await store.read(before=pages[-1][-1].id, limit=2)))

    assert [len(page) for page in pages] == [2, 2, 1, 0]
    assert [each for page in pages for each in page] == events[::-1]


async def test_old_events_are_pruned(store: AuditStore) -> None:
    """The oldest first, up to a limit."""
    now = datetime.now(UTC)
    ages = [event(at=now - timedelta(days=days)) for days in (100, 95, 91, 89)]
    await store.write(ages)

    assert await store.prune(90 * 86400.0, 2) == 2
    assert list(await store.read()) == [ages[3], ages[2]]
    assert await store.prune(90 * 86400.0) == 1
    assert await store.prune(90 * 86400.0) == 0
    assert list(await store.read()) == [ages[3]]


async def test_a_missing_table_is_an_error_of_the_port(database: Database) -> None:
    """It names the remedy, and Postgres takes the events once the table is there."""
    async with opened(config_of(database)) as pool:
        store = PostgresAuditStore(pool)
        for call in (store.write([event()]), store.read(), store.prune(1.0)):
            with pytest.raises(AuditUnavailableError, match="run `viralfx migrate`"):
                await call
