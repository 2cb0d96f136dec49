"""The home loop of services: calls from other loops and from threads."""

import asyncio
import errno
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial

import pytest
from tests.process.foreign_calls import in_child

from viralfx.core.loops import ForeignLoopError, HomeLoop, LoopThread, blocking, without_loop
from viralfx.jobs.batching import Batcher

SECONDS = 30.0
value: ContextVar[str] = ContextVar("value", default="none")


class Home:
    """A home loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.home = HomeLoop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        settled = threading.Event()

        def settle() -> None:
            self.home.settle()
            settled.set()

        self.loop.call_soon_threadsafe(settle)
        assert settled.wait(SECONDS)

    def stop(self) -> None:
        """Stop the loop, and do not close it."""
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(SECONDS)

    def end(self) -> None:
        """Stop and close the loop, and abandon its tasks."""
        self.stop()
        for task in asyncio.all_tasks(self.loop):
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # abandoned on purpose
        self.loop.close()


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """Return a home loop that runs; its callers check it more often than usual."""
    monkeypatch.setattr("viralfx.core.loops._CHECK_SECONDS", 0.1)
    home = Home()
    yield home
    if not home.loop.is_closed():
        home.end()


async def where() -> tuple[asyncio.AbstractEventLoop, str]:
    """Return the running loop, and the context variable."""
    return asyncio.get_running_loop(), value.get()


def from_both(at: Home, call: Callable[[], Awaitable[object]]) -> list[BaseException | object]:
    """Return the outcomes of a call by asyncio.run and by a blocking call."""

    async def run() -> object:
        return await at.home.run(call)

    outcomes: list[BaseException | object] = []
    ways: list[Callable[[], object]] = [lambda: asyncio.run(run()), partial(at.home.call, call)]
    for way in ways:
        try:
            outcomes.append(way())
        except BaseException as error:  # noqa: BLE001 - it is the outcome
            outcomes.append(error)
    return outcomes


def test_a_call_runs_there_in_the_context_of_its_caller(at: Home) -> None:
    """The correlation id, for example, goes with it."""
    token = value.set("mine")
    outcomes = from_both(at, where)
    value.reset(token)

    assert outcomes == [(at.loop, "mine")] * 2


@pytest.mark.parametrize("kind", [ValueError, SystemExit, asyncio.CancelledError])
def test_an_error_is_that_of_the_caller(at: Home, kind: type[BaseException]) -> None:
    """An exit does not end the home loop, and a cancellation by the call itself is its outcome."""

    async def fail() -> None:
        raise kind

    assert [type(each) for each in from_both(at, fail)] == [kind] * 2
    assert from_both(at, where)[0] == (at.loop, "none")


async def test_cancelling_the_caller_cancels_the_call(at: Home) -> None:
    """The call does not go on without a caller."""
    began, ended = threading.Event(), threading.Event()

    async def wait() -> None:
        began.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.set()

    caller = asyncio.create_task(at.home.run(wait))
    assert await asyncio.to_thread(began.wait, SECONDS)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller

    assert await asyncio.to_thread(ended.wait, SECONDS)


@pytest.mark.parametrize("closes", [True, False])
@pytest.mark.parametrize("blocks", [True, False])
def test_the_end_of_the_home_loop_ends_the_call(
    at: Home, caplog: pytest.LogCaptureFixture, *, blocks: bool, closes: bool
) -> None:
    """No caller waits for a loop that does not exist any more, or has stopped for good."""
    began = threading.Event()
    found: list[Exception] = []

    async def wait() -> None:
        began.set()
        await asyncio.get_running_loop().create_future()

    def call() -> None:
        try:
            if blocks:
                at.home.call(wait)
            else:
                asyncio.run(at.home.run(wait))
        except ForeignLoopError as error:
            found.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    assert began.wait(SECONDS)
    (at.end if closes else at.stop)()
    caller.join(SECONDS)

    assert "has ended" in str(found[0])
    assert at.home.has_ended
    assert not caplog.records


def test_blocking_calls_without_a_home_loop_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """None of them waits too long for a turn, also if there are many."""
    monkeypatch.setattr("viralfx.core.loops._MAX_TURN_SECONDS", 0.05)
    home, running = HomeLoop(), 0

    async def call() -> int:
        nonlocal running
        running += 1
        await asyncio.sleep(0.02)
        running -= 1
        return running

    with ThreadPoolExecutor(20) as threads:
        others = list(threads.map(lambda _: home.call(call), range(20)))

    assert others == [0] * 20


async def test_a_generator_makes_its_steps_there(at: Home) -> None:
    """Its end, too, also if the caller leaves it early."""
    loops: list[asyncio.AbstractEventLoop] = []

    async def count() -> AsyncGenerator[int]:
        try:
            for number in range(3):
                loops.append(asyncio.get_running_loop())
                yield number
        finally:
            loops.append(asyncio.get_running_loop())

    whole = [number async for number in at.home.iterate(count)]
    steps = at.home.iterate(count)
    first = await anext(steps)
    await steps.aclose()

    assert (whole, first) == ([0, 1, 2], 0)
    assert loops == [at.loop] * 6


async def test_a_cancelled_step_ends_before_the_generator_is_closed(at: Home) -> None:
    """The caller gets its cancellation, and no error of a generator that is still running."""
    began, ended = asyncio.Event(), threading.Event()
    here = asyncio.get_running_loop()

    async def wait() -> AsyncGenerator[int]:
        yield 0
        try:
            here.call_soon_threadsafe(began.set)
            await asyncio.get_running_loop().create_future()
        finally:
            for _ in range(10):
                await asyncio.sleep(0)  # as a connection that returns to its pool
            ended.set()

    async def follow() -> list[int]:
        return [number async for number in at.home.iterate(wait)]

    follower = asyncio.create_task(follow())
    await asyncio.wait_for(began.wait(), SECONDS)
    follower.cancel()
    with pytest.raises(asyncio.CancelledError):
        await follower

    assert ended.is_set()


def test_a_generator_ends_with_the_home_loop(at: Home) -> None:
    """Its reader gets one error that says so."""
    began = threading.Event()

    async def wait() -> AsyncGenerator[int]:
        began.set()
        await asyncio.get_running_loop().create_future()
        yield 0

    async def follow() -> list[int]:
        return [number async for number in at.home.iterate(wait)]

    with ThreadPoolExecutor() as threads:
        follower = threads.submit(asyncio.run, follow())
        assert began.wait(SECONDS)
        at.end()
        with pytest.raises(ForeignLoopError, match="has ended"):
            follower.result(SECONDS)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("forked_in", ["a call", "a turn"])
def test_a_fork_does_not_wait_for_threads_of_its_parent(forked_in: str) -> None:
    """It lacks the thread whose call was running, or which was about to begin one."""
    home, began, ends = HomeLoop(), threading.Event(), threading.Event()

    async def wait() -> None:
        began.set()
        await asyncio.to_thread(ends.wait)

    def hold() -> None:
        with home._lock:
            began.set()
            ends.wait()

    thread = threading.Thread(
        target=hold if forked_in == "a turn" else lambda: asyncio.run(home.run(wait))
    )
    thread.start()
    assert began.wait(SECONDS)
    outcome = in_child(lambda: home.call(where))
    ends.set()
    thread.join(SECONDS)

    assert outcome == "accepted"


def test_a_loop_that_ended_leaves_a_batcher_usable() -> None:
    """A task of that loop never ends, and the next caller does not wait for it."""

    async def call(items: Sequence[int]) -> Sequence[int]:
        if 0 in items:
            await asyncio.get_running_loop().create_future()
        return items

    batcher: Batcher[int, int] = Batcher(call)
    loop = asyncio.new_event_loop()
    task = loop.create_task(batcher(0))
    loop.run_until_complete(asyncio.sleep(0))
    loop.run_until_complete(asyncio.sleep(0))
    for each in asyncio.all_tasks(loop):
        each._log_destroy_pending = False  # type: ignore[attr-defined]  # abandoned on purpose
    loop.close()

    assert asyncio.run(batcher(1)) == 1
    assert not task.done()


def test_a_thread_with_a_loop_starts_with_the_first_call() -> None:
    """It is the same for all calls, and its end closes what it has opened."""
    closed: list[str] = []

    async def close() -> None:
        closed.append(threading.current_thread().name)

    thread = LoopThread("loop-of-test", close=close)

    async def name() -> str:
        return threading.current_thread().name

    assert [thread.call(name) for _ in range(2)] == ["loop-of-test"] * 2
    thread.close()
    thread.close()
    assert closed == ["loop-of-test"]
    with pytest.raises(ForeignLoopError, match=r"^the process ends.* has not begun$"):
        thread.call(name)


def test_a_call_at_the_end_of_the_process_has_an_unknown_effect() -> None:
    """The error of a caller whose call was running does not blame an application."""
    thread, began = LoopThread("loop-of-test", close=where), threading.Event()

    async def wait() -> None:
        began.set()
        await asyncio.get_running_loop().create_future()

    with ThreadPoolExecutor() as threads:
        caller = threads.submit(thread.call, wait)
        assert began.wait(SECONDS)
        thread.close()
        with pytest.raises(ForeignLoopError, match=r"^the process ends.* is unknown$"):
            caller.result(SECONDS)


def test_a_call_after_the_end_has_not_begun(at: Home) -> None:
    """It may be repeated elsewhere, unlike one that was running."""
    loop = at.loop
    at.end()

    with pytest.raises(ForeignLoopError, match=r"^the event loop of the application .* not begun$"):
        blocking(loop, where)


def test_a_call_that_does_not_wait_needs_no_thread_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs once the thread does, which a busy machine or a server may delay."""
    thread, called = LoopThread("loop-of-test", close=where), threading.Event()
    delayed: list[threading.Thread] = []

    def delay(self: threading.Thread) -> None:
        delayed.append(self)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", delay)
        thread.call_soon(called.set)

    assert not called.is_set()
    delayed[0].start()
    assert called.wait(SECONDS)
    thread.close()


@pytest.mark.parametrize("lacking", ["threads", "descriptors"])
def test_a_thread_that_could_not_start_starts_with_a_later_call(
    monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    """The error of the first call names the cause, and the next call begins anew."""
    thread = LoopThread("loop-of-test", close=where)

    def fail(*_: object, **__: object) -> None:
        raise {
            "threads": RuntimeError("can't start new thread"),
            "descriptors": OSError(errno.EMFILE, "Too many open files"),
        }[lacking]

    with monkeypatch.context() as patched:
        if lacking == "threads":
            patched.setattr(threading.Thread, "start", fail)
        else:
            patched.setattr(asyncio, "new_event_loop", fail)
        with pytest.raises(ForeignLoopError, match=r"cannot start: .*(new thread|open files)"):
            thread.call(where)
        with pytest.raises(ForeignLoopError, match="cannot start"):
            thread.call_soon(thread.close)

    loop, _ = thread.call(where)
    assert loop.is_running()
    thread.close()


@pytest.mark.parametrize("raises", [False, True])
def test_a_signal_handler_interrupts_the_start(
    monkeypatch: pytest.MonkeyPatch, *, raises: bool
) -> None:
    """Its call starts the thread, and all calls use that one; its error ends no thread in use."""
    thread = LoopThread("loop-of-test", close=where)
    in_handler: list[asyncio.AbstractEventLoop] = []
    start = threading.Thread.start

    def interrupted(self: threading.Thread) -> None:
        monkeypatch.undo()
        if raises:
            start(self)
        in_handler.append(thread.call(where)[0])
        if raises:
            raise KeyboardInterrupt
        start(self)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    if raises:
        with pytest.raises(KeyboardInterrupt):
            thread.call(where)
    loops = [thread.call(where)[0], thread.call(where)[0]]
    thread.close()

    assert loops == in_handler * 2
    left = [each for each in threading.enumerate() if each.name == "loop-of-test"]
    for each in left:
        each.join(SECONDS)
        assert not each.is_alive()


def test_a_coroutine_without_a_loop_may_not_wait() -> None:
    """One that waits needs an event loop, and the error says so."""

    async def immediate() -> int:
        return 1

    async def waiting() -> None:
        await asyncio.sleep(0)

    assert without_loop(immediate()) == 1
    with pytest.raises(ForeignLoopError, match="synchronous connection"):
        without_loop(waiting())
