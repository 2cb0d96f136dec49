"""The contract of ``StateStore``, run against every adapter.

A new adapter adds a row to ``ADAPTERS``.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.integration.postgres_clients import config_of, opened
from tests.servers.pgbouncer import POOLED, Poolers
from tests.servers.postgres import Database

from viralfx.adapters.memory import FileStateStore, MemoryStateStore
from viralfx.adapters.postgres import PostgresStateStore
from viralfx.domain.operations import SavedState, StateStore

Make = Callable[[Path, pytest.FixtureRequest], AbstractAsyncContextManager[StateStore]]

MINIMAL = SavedState(
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
    config = config_of(request.getfixturevalue("migrated_database"))
    async with opened(config) as database:
        yield PostgresStateStore(database, "pod-1")


def _behind(mode: str, prepared: int) -> Make:
    @asynccontextmanager
    async def made(_: Path, request: pytest.FixtureRequest) -> AsyncIterator[StateStore]:
        database: Database = request.getfixturevalue("migrated_database")
        poolers: Poolers = request.getfixturevalue("shared_pgbouncer")
        pooler = poolers(database.server, mode, max_prepared_statements=prepared)
        async with opened(config_of(database, through=pooler, pooler=mode)) as pool:
            yield PostgresStateStore(pool, "pod-1")

    return made


ADAPTERS: dict[str, Make] = {"memory": _memory, "file": _file, "postgres": _postgres}
POOLERS = {f"pgbouncer {mode} {number}": _behind(mode, number) for mode, number in POOLED}


@pytest.fixture(
    params=[
        *(pytest.param(make, id=name) for name, make in ADAPTERS.items()),
        *(pytest.param(make, id=name, marks=pytest.mark.soak) for name, make in POOLERS.items()),
    ]
)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[StateStore]:
    """Return each store in turn, empty."""
    make: Make = request.param
    async with make(tmp_path, request) as store:
        yield store


async def test_empty_store_loads_none(store: StateStore) -> None:
    """The first start finds no state; that is no error."""
    assert await store.load() is None


@pytest.mark.parametrize("state", [MINIMAL, FULL], ids=["least", "full"])
async def test_saved_state_is_loaded(store: StateStore, state: SavedState) -> None:
    """Every field compares equal, times with their zone."""
    await store.save(state)
    loaded = await store.load()

    assert state == loaded
    assert loaded is not None
    assert state.saved_at.utcoffset() == loaded.saved_at.utcoffset()


async def test_last_save_wins(store: StateStore) -> None:
    """Saving replaces the whole state."""
    await store.save(FULL)
    await store.save(MINIMAL)

    assert await store.load() == MINIMAL


async def test_loading_keeps_the_state(store: StateStore) -> None:
    """A process that exits early leaves the state to the next one."""
    await store.save(FULL)
    await store.load()

    assert await store.load() == FULL


@pytest.mark.parametrize("turns", range(4))
async def test_cancelled_save_is_atomic(store: StateStore, turns: int) -> None:
    """The store has the old state or the new one."""
    await store.save(MINIMAL)
    task = asyncio.create_task(store.save(FULL))
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    async with asyncio.timeout(5.0):
        await asyncio.wait({task})

    assert await store.load() in (MINIMAL, FULL)


async def test_concurrent_load_sees_one_whole_state(store: StateStore) -> None:
    """The old one or the new one, never a mixture."""
    await store.save(MINIMAL)
    async with asyncio.TaskGroup() as group:
        group.create_task(store.save(FULL))
        reading = [group.create_task(store.load()) for _ in range(20)]

    assert all(task.result() in (MINIMAL, FULL) for task in reading)
    assert await store.load() == FULL


async def test_postgres_prefers_the_instances_own_row(migrated_database: Database) -> None:
    """A restarted instance loads its own state, a new one the latest."""
    mine, theirs = replace(FULL, starts=1), replace(FULL, starts=2)
    async with opened(config_of(migrated_database)) as opened_database:
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


async def test_postgres_deletes_old_rows(migrated_database: Database) -> None:
    """After 30 days; otherwise rows of former pods would pile up."""
    async with opened(config_of(migrated_database)) as opened_database:
        for name in ("kept", "forgotten"):
            await PostgresStateStore(opened_database, name).save(MINIMAL)
        for name, days in (("kept", 29), ("forgotten", 31)):
            migrated_database.execute(
                f"update viralfx_state set saved_at = now() - interval '{days} days'"  # noqa: S608 - of this test
                f" where instance = '{name}'"
            )
        await PostgresStateStore(opened_database, "new").save(MINIMAL)

    rows = migrated_database.execute("select instance from viralfx_state order by instance")
    assert rows == [("kept",), ("new",)]


async def test_postgres_loads_none_without_a_readable_row(
    migrated_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """An invalid row is logged; the health check reports a missing table."""
    async with opened(config_of(migrated_database)) as opened_database:
        store = PostgresStateStore(opened_database, "pod-1")
        migrated_database.execute(
            "insert into viralfx_state values ('pod-1', now(), '{\"starts\": 0.5}')"
        )
        assert await store.load() is None
        migrated_database.execute("drop table viralfx_state")
        assert await store.load() is None

        await store.save(MINIMAL)

    messages = [r.getMessage() for r in caplog.records if r.name == "viralfx.state"]
    assert messages == [
        "Saved state is unreadable and is not used",
        "State is not saved: the database has not been migrated",
    ]


class _Place(NamedTuple):
    host: str
    port: int


async def test_postgres_loads_none_while_the_server_ends_the_connection(
    migrated_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """The driver has read the announcement, and the connection is not closed yet."""
    ended = asyncio.Event()
    relaying: list[asyncio.Task[None] | None] = []

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        relaying.append(asyncio.current_task())
        server = migrated_database.server
        answers, requests = await asyncio.open_connection("127.0.0.1", server.port)
        answering = asyncio.create_task(relay(answers, writer))
        answering.add_done_callback(lambda _: ended.set())
        await relay(reader, requests)  # the client's side stays open until the client closes it
        for each in (requests, writer):
            each.close()
            await each.wait_closed()
        await answering

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as proxy:
        place = _Place(*proxy.sockets[0].getsockname())
        async with opened(config_of(migrated_database, through=place, pool_max=1)) as pool:
            store = PostgresStateStore(pool, "pod-1")
            async with pool.acquire() as connection:
                pid = connection.get_server_pid()
            migrated_database.execute(f"select pg_terminate_backend({pid})")
            await ended.wait()
            for _ in range(3):  # turns of the event loop in which the driver reads
                await asyncio.sleep(0)
            assert await store.load() is None
        await asyncio.gather(*filter(None, relaying))

    messages = [r.getMessage() for r in caplog.records if r.name == "viralfx.state"]
    assert messages == ["Saved state cannot be read"]
    assert "another operation" in caplog.text
