"""The contract of ``StateStore``, run against every adapter.

A new adapter adds a row to ``ADAPTERS``.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tests.integration.postgres_clients import config_of, migrated, opened
from tests.servers.postgres import Database

from viralfx.adapters.memory import FileStateStore, MemoryStateStore
from viralfx.adapters.postgres import PostgresStateStore
from viralfx.domain.state import SavedState, StateStore

Make = Callable[[Path, pytest.FixtureRequest], AbstractAsyncContextManager[StateStore]]

LEAST = SavedState(
    saved_at=datetime(2026, 1, 6, 12, tzinfo=UTC), starts=1, uptime=0.0, health="healthy"
)
FULL = SavedState(
    saved_at=datetime(2026, 1, 6, 12, 0, 0, 123456, tzinfo=UTC),
    starts=2**40,
    uptime=3600.123456789,
    health="degraded",
    checks={"database": "pass", "größe": "fail"},
    transitions={"database": 7, "redis": 0},
    shutdown_reason='POST "/health/shutdown"\n\u2028',
    shutdown_phases={"stop accepting": "ok", "drain": "timeout"},
)


@asynccontextmanager
async def _memory(_: Path, __: pytest.FixtureRequest) -> AsyncIterator[StateStore]:
    yield MemoryStateStore()


@asynccontextmanager
async def _file(folder: Path, _: pytest.FixtureRequest) -> AsyncIterator[StateStore]:
    yield FileStateStore(folder)


@asynccontextmanager
async def _postgres(_: Path, request: pytest.FixtureRequest) -> AsyncIterator[StateStore]:
    config = await migrated(config_of(request.getfixturevalue("database")))
    async with opened(config) as database:
        yield PostgresStateStore(database, "pod-1")


ADAPTERS: dict[str, Make] = {"memory": _memory, "file": _file, "postgres": _postgres}


@pytest.fixture(params=list(ADAPTERS.values()), ids=list(ADAPTERS))
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[StateStore]:
    """Return each store in turn, empty."""
    make: Make = request.param
    async with make(tmp_path, request) as store:
        yield store


async def test_empty_store_has_nothing(store: StateStore) -> None:
    """The first start finds no state, and that is no error."""
    assert await store.load() is None


@pytest.mark.parametrize("state", [LEAST, FULL], ids=["least", "full"])
async def test_what_was_saved_is_loaded(store: StateStore, state: SavedState) -> None:
    """Every field comes back equal, the time with its zone."""
    await store.save(state)
    loaded = await store.load()

    assert state == loaded
    assert loaded is not None
    assert state.saved_at.utcoffset() == loaded.saved_at.utcoffset()


async def test_last_save_counts(store: StateStore) -> None:
    """Saving replaces the whole state; nothing of the old one is mixed in."""
    await store.save(FULL)
    await store.save(LEAST)

    assert await store.load() == LEAST


async def test_loading_takes_nothing_away(store: StateStore) -> None:
    """A process that starts and dies at once leaves the state to the next."""
    await store.save(FULL)
    await store.load()

    assert await store.load() == FULL


@pytest.mark.parametrize("turns", range(4))
async def test_save_that_is_cancelled_leaves_one_whole_state(store: StateStore, turns: int) -> None:
    """Cut at any moment, there is the old state or the new one."""
    await store.save(LEAST)
    task = asyncio.create_task(store.save(FULL))
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    async with asyncio.timeout(5.0):
        await asyncio.wait({task})

    assert await store.load() in (LEAST, FULL)


async def test_reading_while_saving_sees_one_whole_state(store: StateStore) -> None:
    """A reader beside a writer gets the old state or the new one, never a part."""
    await store.save(LEAST)
    async with asyncio.TaskGroup() as group:
        group.create_task(store.save(FULL))
        reading = [group.create_task(store.load()) for _ in range(20)]

    assert all(task.result() in (LEAST, FULL) for task in reading)
    assert await store.load() == FULL


async def test_postgres_prefers_ones_own_row(database: Database) -> None:
    """An instance that comes back continues its own state, a new one that of the last to save."""
    mine, theirs = replace(FULL, starts=1), replace(FULL, starts=2)
    async with opened(await migrated(config_of(database))) as opened_database:
        first, second, third = (
            PostgresStateStore(opened_database, name) for name in ("pod-1", "pod-2", "pod-3")
        )
        await first.save(mine)
        await second.save(theirs)

        assert await first.load() == mine
        assert await second.load() == theirs
        assert await third.load() == theirs

        await first.save(mine)

        assert await third.load() == mine


async def test_postgres_forgets_instances_that_are_gone(database: Database) -> None:
    """A row is kept for 30 days: names of pods would pile up otherwise."""
    async with opened(await migrated(config_of(database))) as opened_database:
        for name in ("kept", "forgotten"):
            await PostgresStateStore(opened_database, name).save(LEAST)
        for name, days in (("kept", 29), ("forgotten", 31)):
            database.execute(
                f"update viralfx_state set saved_at = now() - interval '{days} days'"  # noqa: S608 - of this test
                f" where instance = '{name}'"
            )
        await PostgresStateStore(opened_database, "new").save(LEAST)

    rows = database.execute("select instance from viralfx_state order by instance")
    assert rows == [("kept",), ("new",)]


async def test_postgres_without_a_readable_row_has_nothing(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """A row of an unknown shape is told; no table is the check's to tell."""
    async with opened(await migrated(config_of(database))) as opened_database:
        store = PostgresStateStore(opened_database, "pod-1")
        database.execute("insert into viralfx_state values ('pod-1', now(), '{\"starts\": 0.5}')")
        assert await store.load() is None
        database.execute("drop table viralfx_state")
        assert await store.load() is None

        await store.save(LEAST)

    told = [r.getMessage() for r in caplog.records if r.name == "viralfx.state"]
    assert told == [
        "Saved state is unreadable and is not used",
        "State is not saved: the database has not been migrated",
    ]
