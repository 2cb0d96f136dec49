"""Single flight, and a cache whose store may fail."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
from tests.manual_clock import ManualClock

from viralfx.adapters.codec import MsgspecCodec
from viralfx.adapters.memory import MemoryCacheStore
from viralfx.domain.cache import Cache, SingleFlight
from viralfx.jobs.codec import PayloadError, ResultError


class Loader:
    """A loader that waits for the test and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.cancelled = 0
        self.error: Exception | None = None
        self._may_end = asyncio.Event()

    def end(self) -> None:
        """Let the load return."""
        self._may_end.set()

    async def __call__(self) -> bytes:
        """Return the number of the call, or raise."""
        self.calls += 1
        number = self.calls
        try:
            await self._may_end.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return b"%d" % number


class BrokenStore:
    """A store whose methods raise while ``broken`` is set."""

    def __init__(self) -> None:
        self.broken = True
        self._store = MemoryCacheStore(ManualClock())

    async def get(self, key: str) -> bytes | None:
        """Fail."""
        return await self._unless_broken(lambda: self._store.get(key))

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        """Fail."""
        await self._unless_broken(lambda: self._store.set(key, value, ttl))

    async def delete(self, key: str) -> None:
        """Fail."""
        await self._unless_broken(lambda: self._store.delete(key))

    async def _unless_broken(self, act: Callable[[], Awaitable[bytes | None]]) -> bytes | None:
        if self.broken:
            raise OSError("no store")
        return await act()


@pytest.fixture
def clock() -> ManualClock:
    """Return a clock that the test moves."""
    return ManualClock()


@pytest.fixture
def cache(clock: ManualClock) -> Cache:
    """Return a cache in memory."""
    return Cache(MemoryCacheStore(clock))


@pytest.fixture
def loader() -> Loader:
    """Return a loader that waits."""
    return Loader()


async def test_concurrent_callers_share_one_load(
    cache: Cache, loader: Loader, clock: ManualClock
) -> None:
    """A caller that arrives during the load shares it, too."""
    first = [asyncio.create_task(cache.get_or_load("k", 1.0, loader)) for _ in range(500)]
    await clock.settle()
    late = [asyncio.create_task(cache.get_or_load("k", 1.0, loader)) for _ in range(500)]
    await clock.settle()
    loader.end()

    assert {await task for task in (*first, *late)} == {b"1"}
    assert loader.calls == 1


async def test_keys_are_loaded_independently(cache: Cache, clock: ManualClock) -> None:
    """A hanging load of one key does not delay another key."""
    hanging, other = Loader(), Loader()
    waiting = asyncio.create_task(cache.get_or_load("a", 1.0, hanging))
    await clock.settle()
    other.end()

    assert await cache.get_or_load("b", 1.0, other) == b"1"
    waiting.cancel()


async def test_a_value_is_loaded_again_after_its_time_to_live(
    cache: Cache, loader: Loader, clock: ManualClock
) -> None:
    """It is not loaded again earlier."""
    loader.end()
    values = []
    for wait in (0.0, 0.9, 0.2):
        await clock.advance(wait)
        values.append(await cache.get_or_load("k", 1.0, loader))

    assert values == [b"1", b"1", b"2"]


async def test_an_error_is_raised_in_all_callers_and_not_stored(
    cache: Cache, loader: Loader, clock: ManualClock
) -> None:
    """The next call loads again."""
    error = loader.error = LookupError("no such user")
    tasks = [asyncio.create_task(cache.get_or_load("k", 1.0, loader)) for _ in range(10)]
    await clock.settle()
    loader.end()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    loader.error = None

    assert results == [error] * 10
    assert loader.calls == 1
    assert await cache.get_or_load("k", 1.0, loader) == b"2"


async def test_cancelling_a_caller_does_not_affect_the_others(
    cache: Cache, loader: Loader, clock: ManualClock
) -> None:
    """This holds for the first caller as well."""
    tasks = [asyncio.create_task(cache.get_or_load("k", 1.0, loader)) for _ in range(3)]
    await clock.settle()
    tasks[0].cancel()
    tasks[2].cancel()
    await clock.settle()
    loader.end()

    assert await tasks[1] == b"1"
    assert [task.cancelled() for task in tasks] == [True, False, True]


async def test_cancelling_the_last_caller_cancels_the_work(
    cache: Cache, loader: Loader, clock: ManualClock
) -> None:
    """The next call starts a new load."""
    before = asyncio.all_tasks()
    tasks = [asyncio.create_task(cache.get_or_load("k", 1.0, loader)) for _ in range(3)]
    await clock.settle()
    for task in tasks:
        task.cancel()
    after_all = asyncio.create_task(cache.get_or_load("k", 1.0, loader))
    await clock.settle()
    loader.end()

    assert await after_all == b"2"
    assert (loader.calls, loader.cancelled) == (2, 1)
    await clock.settle()
    assert asyncio.all_tasks() == before


@pytest.mark.parametrize("turns", range(6))
async def test_a_caller_can_be_cancelled_at_any_turn(
    cache: Cache, loader: Loader, clock: ManualClock, turns: int
) -> None:
    """Before, during and after the work, the other callers get their value."""
    loader.end()
    cut = asyncio.create_task(cache.get_or_load("k", 1.0, loader))
    other = asyncio.create_task(cache.get_or_load("k", 1.0, loader))
    for _ in range(turns):
        await asyncio.sleep(0)
    cut.cancel()
    await clock.settle()

    assert await other in {b"1", b"2"}
    assert await cache.get_or_load("k", 1.0, loader) == await other


async def test_an_error_without_waiting_callers_is_not_reported(clock: ManualClock) -> None:
    """It is not an uncaught exception."""
    uncaught: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: uncaught.append(context))
    began = asyncio.Event()

    async def fails_when_cancelled() -> bytes:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            raise OSError("while leaving")

    flights: SingleFlight[bytes] = SingleFlight()
    task = asyncio.create_task(flights.run("k", fails_when_cancelled))
    await began.wait()
    task.cancel()
    await clock.settle()

    assert task.cancelled()
    assert uncaught == []


async def test_a_failing_store_does_not_break_a_read(
    loader: Loader, caplog: pytest.LogCaptureFixture
) -> None:
    """Each call loads, and the failure is logged once until the store works again."""
    store = BrokenStore()
    cache = Cache(store)
    loader.end()
    with caplog.at_level(logging.WARNING, "viralfx.cache"):
        values = [await cache.get_or_load("k", 1.0, loader) for _ in range(3)]
        store.broken = False
        values += [await cache.get_or_load("k", 1.0, loader) for _ in range(2)]
        store.broken = True
        values.append(await cache.get_or_load("k", 1.0, loader))

    assert values == [b"1", b"2", b"3", b"4", b"4", b"5"]
    assert {record.message for record in caplog.records} == {"Cache store failed"}
    logged = [vars(record)["operation"] for record in caplog.records]
    assert logged == ["read", "write"] * 2


class FullStore(BrokenStore):
    """A store that serves reads and rejects writes, like Redis without free memory."""

    async def get(self, key: str) -> bytes | None:  # noqa: ARG002 - it has nothing
        """Miss."""
        return None


async def test_a_full_store_is_logged_once(
    loader: Loader, caplog: pytest.LogCaptureFixture
) -> None:
    """Successful reads between the failed writes do not repeat the warning."""
    cache = Cache(FullStore())
    loader.end()
    with caplog.at_level(logging.WARNING, "viralfx.cache"):
        for _ in range(5):
            await cache.get_or_load("k", 1.0, loader)

    assert [vars(record)["operation"] for record in caplog.records] == ["write"]


async def test_an_invalid_time_to_live_is_rejected(cache: Cache, loader: Loader) -> None:
    """The error is raised before the store or the loader is called."""
    with pytest.raises(ValueError, match="ttl must be more than zero and finite"):
        await cache.get_or_load("k", 0.0, loader)

    assert loader.calls == 0


async def test_the_memory_store_evicts_the_least_recently_used_value(clock: ManualClock) -> None:
    """Reading a value counts as use."""
    store = MemoryCacheStore(clock, capacity=2)
    await store.set("a", b"a", 60.0)
    await store.set("b", b"b", 60.0)
    await store.get("a")
    await store.set("c", b"c", 60.0)

    assert [await store.get(key) for key in "abc"] == [b"a", None, b"c"]
    assert len(store) == 2


def test_a_capacity_below_one_is_rejected(clock: ManualClock) -> None:
    """A store without capacity is an error."""
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        MemoryCacheStore(clock, capacity=0)


# -- values of any type ----------------------------------------------------------------------------


@dataclass
class Report:
    """A value of an application."""

    orders: int
    names: list[str]


async def test_a_value_is_loaded_once_and_is_each_callers_own() -> None:
    """A caller that changes its value changes no other one."""
    cache, loads = Cache(MemoryCacheStore(ManualClock()), MsgspecCodec()), 0

    async def load() -> Report:
        nonlocal loads
        loads += 1
        return Report(7, ["Ann"])

    first = await cache.get_or_load_value("report", 60.0, load, Report)
    first.names.append("changed")
    async with asyncio.TaskGroup() as group:
        others = [
            group.create_task(cache.get_or_load_value("report", 60.0, load, Report))
            for _ in range(5)
        ]

    assert loads == 1
    assert {each.result().names == ["Ann"] for each in others} == {True}
    assert await cache.get_or_load_value("plain", 60.0, a_dictionary, dict[str, int]) == {"a": 1}


async def a_dictionary() -> dict[str, int]:
    """Load a value of a generic type."""
    return {"a": 1}


@pytest.mark.parametrize("stored", [b"no JSON", b'{"orders":"many"}', b"\xff", b"[]"])
async def test_a_value_of_an_earlier_version_is_loaded_anew(stored: bytes) -> None:
    """By one of its callers, and stored for the next ones."""
    store, loads = MemoryCacheStore(ManualClock()), 0
    await store.set("report", stored, 60.0)
    cache = Cache(store, MsgspecCodec())

    async def load() -> Report:
        nonlocal loads
        loads += 1
        await asyncio.sleep(0)
        return Report(loads, [])

    async with asyncio.TaskGroup() as group:
        found = [
            group.create_task(cache.get_or_load_value("report", 60.0, load, Report))
            for _ in range(5)
        ]

    assert [each.result().orders for each in found] == [1] * 5
    assert (await cache.get_or_load_value("report", 60.0, load, Report)).orders == loads == 1


async def test_errors_of_values() -> None:
    """A value without JSON is the caller's error, and so is one that does not fit its type."""

    async def opaque() -> object:
        return object()

    async def other() -> Any:
        return "text"

    cache = Cache(MemoryCacheStore(ManualClock()), MsgspecCodec())
    with pytest.raises(ResultError, match="object has no JSON"):
        await cache.get_or_load_value("opaque", 60.0, opaque, object)
    with pytest.raises(PayloadError, match="Expected `int`, got `str`"):
        await cache.get_or_load_value("other", 60.0, other, int)
    with pytest.raises(TypeError, match="this cache has no codec"):
        await Cache(MemoryCacheStore(ManualClock())).get_or_load_value("x", 60.0, other, int)
