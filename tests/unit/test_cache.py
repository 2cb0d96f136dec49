"""Single flight, and a cache whose store may fail."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest
from tests.manual_clock import ManualClock

from viralfx.adapters.memory import MemoryCacheStore
from viralfx.domain.cache import Cache
from viralfx.domain.single_flight import SingleFlight


class Loader:
    """Loads when it is told to, and counts how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0
        self.cancelled = 0
        self.error: Exception | None = None
        self._may_end = asyncio.Event()

    def end(self) -> None:
        """Let it answer from now on."""
        self._may_end.set()

    async def __call__(self) -> bytes:
        """Answer with the number of the call, or raise."""
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
    """A store that cannot do anything while ``broken``."""

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


async def test_concurrent_callers_share_one_call(
    cache: Cache, loader: Loader, clock: ManualClock
) -> None:
    """However many there are, and also who comes while the value is being loaded."""
    first = [asyncio.create_task(cache.get_or_load("k", 1.0, loader)) for _ in range(500)]
    await clock.settle()
    late = [asyncio.create_task(cache.get_or_load("k", 1.0, loader)) for _ in range(500)]
    await clock.settle()
    loader.end()

    assert {await task for task in (*first, *late)} == {b"1"}
    assert loader.calls == 1


async def test_keys_have_nothing_to_do_with_one_another(cache: Cache, clock: ManualClock) -> None:
    """One that hangs does not hold up another."""
    hanging, other = Loader(), Loader()
    waiting = asyncio.create_task(cache.get_or_load("a", 1.0, hanging))
    await clock.settle()
    other.end()

    assert await cache.get_or_load("b", 1.0, other) == b"1"
    waiting.cancel()


async def test_a_value_is_loaded_again_when_its_time_is_over(
    cache: Cache, loader: Loader, clock: ManualClock
) -> None:
    """And not before."""
    loader.end()
    values = []
    for wait in (0.0, 0.9, 0.2):
        await clock.advance(wait)
        values.append(await cache.get_or_load("k", 1.0, loader))

    assert values == [b"1", b"1", b"2"]


async def test_an_error_reaches_all_and_is_not_kept(
    cache: Cache, loader: Loader, clock: ManualClock
) -> None:
    """Who comes afterwards has the loader called again."""
    error = loader.error = LookupError("no such user")
    tasks = [asyncio.create_task(cache.get_or_load("k", 1.0, loader)) for _ in range(10)]
    await clock.settle()
    loader.end()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    loader.error = None

    assert results == [error] * 10
    assert loader.calls == 1
    assert await cache.get_or_load("k", 1.0, loader) == b"2"


async def test_a_cancelled_caller_leaves_the_others_alone(
    cache: Cache, loader: Loader, clock: ManualClock
) -> None:
    """Whichever it is: the first one does not own the work."""
    tasks = [asyncio.create_task(cache.get_or_load("k", 1.0, loader)) for _ in range(3)]
    await clock.settle()
    tasks[0].cancel()
    tasks[2].cancel()
    await clock.settle()
    loader.end()

    assert await tasks[1] == b"1"
    assert [task.cancelled() for task in tasks] == [True, False, True]


async def test_the_last_who_leaves_stops_the_work(
    cache: Cache, loader: Loader, clock: ManualClock
) -> None:
    """Nothing runs on for nobody, and who comes then has the loader called anew."""
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
async def test_a_caller_who_is_cut_at_any_turn_harms_nobody(
    cache: Cache, loader: Loader, clock: ManualClock, turns: int
) -> None:
    """Before, during and after the work."""
    loader.end()
    cut = asyncio.create_task(cache.get_or_load("k", 1.0, loader))
    other = asyncio.create_task(cache.get_or_load("k", 1.0, loader))
    for _ in range(turns):
        await asyncio.sleep(0)
    cut.cancel()
    await clock.settle()

    assert await other in {b"1", b"2"}
    assert await cache.get_or_load("k", 1.0, loader) == await other


async def test_an_error_that_nobody_waits_for_is_nobodys(clock: ManualClock) -> None:
    """It must not surface as an uncaught exception."""
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


async def test_a_store_that_fails_does_not_break_a_read(
    loader: Loader, caplog: pytest.LogCaptureFixture
) -> None:
    """The loader answers, each time, and the failure is logged once until the store works again."""
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
    told = [vars(record)["operation"] for record in caplog.records]
    assert told == ["read", "write"] * 2


class FullStore(BrokenStore):
    """Answers reads and refuses writes, as Redis does without memory left."""

    async def get(self, key: str) -> bytes | None:  # noqa: ARG002 - it has nothing
        """Miss."""
        return None


async def test_a_full_store_is_told_of_once(
    loader: Loader, caplog: pytest.LogCaptureFixture
) -> None:
    """Reads that work between the writes that fail make no new line of each."""
    cache = Cache(FullStore())
    loader.end()
    with caplog.at_level(logging.WARNING, "viralfx.cache"):
        for _ in range(5):
            await cache.get_or_load("k", 1.0, loader)

    assert [vars(record)["operation"] for record in caplog.records] == ["write"]


async def test_a_time_that_cannot_be_meant_is_refused_at_once(cache: Cache, loader: Loader) -> None:
    """The mistake is the caller's, not the store's."""
    with pytest.raises(ValueError, match="ttl must be more than zero and finite"):
        await cache.get_or_load("k", 0.0, loader)

    assert loader.calls == 0


async def test_memory_keeps_no_more_than_its_capacity(clock: ManualClock) -> None:
    """What was not used for longest goes first; reading is using."""
    store = MemoryCacheStore(clock, capacity=2)
    await store.set("a", b"a", 60.0)
    await store.set("b", b"b", 60.0)
    await store.get("a")
    await store.set("c", b"c", 60.0)

    assert [await store.get(key) for key in "abc"] == [b"a", None, b"c"]
    assert len(store) == 2


def test_a_capacity_below_one_is_refused(clock: ManualClock) -> None:
    """A cache of nothing is a mistake."""
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        MemoryCacheStore(clock, capacity=0)
