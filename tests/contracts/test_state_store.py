"""The contract of ``StateStore``, run against every adapter.

A new adapter adds a row to ``ADAPTERS``.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from viralfx.adapters.memory import FileStateStore, MemoryStateStore
from viralfx.domain.state import SavedState, StateStore

Make = Callable[[Path], AbstractAsyncContextManager[StateStore]]

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
async def _memory(_: Path) -> AsyncIterator[StateStore]:
    yield MemoryStateStore()


@asynccontextmanager
async def _file(folder: Path) -> AsyncIterator[StateStore]:
    yield FileStateStore(folder)


ADAPTERS: dict[str, Make] = {"memory": _memory, "file": _file}


@pytest.fixture(params=list(ADAPTERS.values()), ids=list(ADAPTERS))
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[StateStore]:
    """Return each store in turn, empty."""
    make: Make = request.param
    async with make(tmp_path) as store:
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
