"""The event loop that the services of a process belong to, and calls from other loops and threads.

Connections, locks and tasks of asyncio work on one event loop only. Applications have others: a
plain function that runs in a thread may call ``asyncio.run``.
"""

import asyncio
import atexit
import concurrent.futures
import functools
import os
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar
from weakref import WeakSet

from viralfx.core.clock import SystemClock, finished_within
from viralfx.core.errors import ViralFXError

T = TypeVar("T")
P = ParamSpec("P")

_END: Any = object()
_END_OF_APPLICATION = "the event loop of the application has ended"
_clock = SystemClock()  # other threads and their loops have real time
_CHECK_SECONDS = 1.0
"""Between two checks of the other loop: it may end without answering."""
_MAX_IDLE_CHECKS = 3
"""Checks in a row after which a loop that is not running has ended, although it is not closed."""
_TURN_SECONDS = 0.005
"""Between two tries to be the only loop."""
_MAX_TURN_SECONDS = 5.0


class ForeignLoopError(ViralFXError, RuntimeError):
    """A call came from an event loop, a thread or a process in which it cannot work."""


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that runs in this thread; None without one."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class Inherited(Protocol):
    """An object that a forked process gets in the state of its parent, whose threads it lacks."""

    def renew(self) -> None:
        """Forget the threads of the parent; called in the forked process, before all else there."""
        ...


_inherited: "WeakSet[Inherited]" = WeakSet()


def renew_in_forks(inherited: Inherited) -> None:
    """Call :meth:`Inherited.renew` of an object in each process forked from this one."""
    _inherited.add(inherited)


def _renew_all() -> None:
    for each in tuple(_inherited):
        each.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)


class HomeLoop:
    """The event loop that the services of a process belong to, and with them their connections.

    Calls from other loops and threads run on it. Until it is known, and after it has ended, calls
    run on the loop of the caller, on one loop at a time.
    """

    def __init__(self, *, start_seconds: float = 0.0) -> None:
        """``start_seconds``: how long the first calls wait for services that must start first."""
        self._start_seconds = start_seconds
        self._waits_until = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = 0
        self._guest: asyncio.AbstractEventLoop | None = None
        """The loop that may use the services while there is no home loop."""
        self._guests = 0
        """Running calls of it."""
        self._lock = threading.Lock()
        # A signal handler may interrupt the thread that holds it.
        self._blocking = threading.RLock()
        renew_in_forks(self)

    def renew(self) -> None:
        """See :class:`Inherited`: guests and the holder of the lock are threads of the parent."""
        self._lock, self._blocking = threading.Lock(), threading.RLock()
        self._guest, self._guests = None, 0

    def settle(self) -> None:
        """Make the running loop the home loop; it stays that for good."""
        if self._loop is None:
            # In this order: other threads read the loop first.
            self._process = os.getpid()
            self._loop = asyncio.get_running_loop()

    @property
    def is_here(self) -> bool:
        """True on the home loop."""
        return self._loop is not None and running_loop() is self._loop

    @property
    def is_known(self) -> bool:
        """True once the services have started."""
        return self._loop is not None

    @property
    def is_forked(self) -> bool:
        """True in a process that was forked from the one with the home loop."""
        return self._loop is not None and self._process != os.getpid()

    @property
    def has_ended(self) -> bool:
        """True once the home loop of this process no longer runs."""
        return self.is_known and not self.is_forked and self.running is None

    @property
    def running(self) -> asyncio.AbstractEventLoop | None:
        """The home loop while it runs in this process, else None."""
        loop = self._loop
        return None if loop is None or self.is_forked or not loop.is_running() else loop

    async def known(self) -> None:
        """Wait until the services start, up to ``start_seconds`` from the first such call on."""
        now = _clock.monotonic()
        self._waits_until = self._waits_until or now + self._start_seconds
        while self._loop is None and now < self._waits_until:
            await _clock.sleep(_TURN_SECONDS)
            now = _clock.monotonic()

    async def run(self, call: Callable[[], Awaitable[T]], *, beside: bool = False) -> T:
        """Return the result of ``call``, which runs on the home loop in the caller's context.

        ``beside``: without a home loop, calls of other loops may run at the same time. Cancelling
        the caller cancels the call. Raises the errors of the call, and :class:`ForeignLoopError` if
        the home loop ends before it, or if another loop uses the services while there is no home
        loop.
        """
        here = asyncio.get_running_loop()
        if here is self._loop:
            return await call()
        if beside:
            self._require_no_fork()
            return await call() if (home := self.running) is None else await _on(home, call)
        home = await self._enter(here)
        if home is None:
            try:
                return await call()
            except ForeignLoopError:
                # The call waited for the services, which another loop has started meanwhile.
                if (home := self.running) is None or home is here:
                    raise
            finally:
                self._leave(here)
        return await _on(home, call)

    async def _enter(self, here: asyncio.AbstractEventLoop) -> asyncio.AbstractEventLoop | None:
        """Wait for the home loop, or for the right to use the services on this one."""
        self._require_no_fork()
        await self.known()
        waits_until = _clock.monotonic() + _MAX_TURN_SECONDS
        while (home := self.running) is None:
            with self._lock:
                # A loop that has ended leaves no call behind.
                if self._guest is not here and (
                    self._guest is None or not self._guests or not self._guest.is_running()
                ):
                    self._guest, self._guests = here, 0
                if self._guest is here:
                    self._guests += 1
                    return None
            if _clock.monotonic() >= waits_until:
                raise ForeignLoopError(
                    "another event loop uses these services, and the application has not started;"
                    " start it, so that calls from other loops run on its loop"
                )
            await _clock.sleep(_TURN_SECONDS)
        return home

    def _require_no_fork(self) -> None:
        if self.is_forked:
            raise ForeignLoopError(
                "this process was forked from the one in which the application runs, and cannot use"
                " its services; start the application in this process, or submit jobs with"
                " jobs.submit_sync(), which needs DATABASE_URL"
            )

    def _leave(self, here: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            if self._guest is here:
                self._guests -= 1

    async def iterate(self, make: Callable[[], AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
        """Yield the items of an asynchronous generator, each of whose steps runs as :meth:`run`."""
        items, home = make(), self.running
        if home is None or self.is_here:
            async with aclosing(items):
                async for item in items:
                    yield item
            return
        step = asyncio.Lock()  # of the home loop

        async def advance() -> T:
            async with step:
                return await anext(items, _END)

        async def close() -> None:
            async with step:  # a step whose caller was cancelled may not have ended yet
                await items.aclose()

        try:
            while (found := await _on(home, advance)) is not _END:
                yield found
        finally:
            with suppress(ForeignLoopError):  # the home loop has ended, and the generator with it
                await _on(home, close)

    def call_soon(self, function: Callable[[], object]) -> None:
        """Call a function on the home loop, from any thread; here and now without one.

        Nothing happens if the loop has ended.
        """
        home = self.running
        if home is None or home is running_loop():
            function()
            return
        try:
            home.call_soon_threadsafe(function)
        except RuntimeError:  # it has just been closed
            return

    def call(self, call: Callable[[], Awaitable[T]]) -> T:
        """Do as :meth:`run` for a thread without an event loop: block it until the call has ended.

        Without a home loop the call runs on a loop of its own, after those of other threads.
        """
        home = self.running
        if home is None:
            with self._blocking:
                return asyncio.run(self.run(call))
        return blocking(home, call)


class _Service(Protocol):
    @property
    def _home(self) -> HomeLoop: ...


ServiceT = TypeVar("ServiceT", bound=_Service)


_Method = Callable[Concatenate[ServiceT, P], Coroutine[Any, Any, T]]


def at_home(method: _Method[ServiceT, P, T]) -> _Method[ServiceT, P, T]:
    """Run an asynchronous method on the home loop of its object; see :meth:`HomeLoop.run`."""
    return _moved(method, beside=False)


def beside_others(method: _Method[ServiceT, P, T]) -> _Method[ServiceT, P, T]:
    """Do as :func:`at_home`, and without a home loop at the same time as calls of other loops.

    For a method that waits for long, and keeps what belongs to an event loop apart for each.
    """
    return _moved(method, beside=True)


def _moved(method: _Method[ServiceT, P, T], *, beside: bool) -> _Method[ServiceT, P, T]:
    @functools.wraps(method)
    async def run(service: ServiceT, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if service._home.is_here:  # noqa: SLF001 - the object's own attribute
            return await method(service, *args, **kwargs)
        return await service._home.run(  # noqa: SLF001 - as above
            functools.partial(method, service, *args, **kwargs), beside=beside
        )

    return run


def require_no_loop(name: str, instead: str) -> None:
    """Raise :class:`ForeignLoopError` for a blocking call in a thread that runs an event loop."""
    if running_loop() is not None:
        raise ForeignLoopError(
            f"{name} blocks its thread, and this one runs an event loop, which would stop: use"
            f" `await {instead}`"
        )


def without_loop(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine that never waits.

    Raises :class:`ForeignLoopError` if it waits for something, which needs an event loop.
    """
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    coroutine.close()
    raise ForeignLoopError("the call waits for an event loop; pass a synchronous connection")


async def _on(loop: asyncio.AbstractEventLoop, call: Callable[[], Awaitable[T]]) -> T:
    end = _END_OF_APPLICATION
    begun = _begin(loop, call, end)
    ended = asyncio.wrap_future(begun)
    try:
        idle = 0
        while not await finished_within(ended, _CHECK_SECONDS, _clock):
            idle = _require_running(loop, idle, end)
        result: T = _result(begun, end)
    finally:
        if not loop.is_closed():  # a closed one cannot take the cancellation
            ended.cancel()
    return result


def blocking(
    loop: asyncio.AbstractEventLoop,
    call: Callable[[], Awaitable[T]],
    *,
    end: str = _END_OF_APPLICATION,
) -> T:
    """Return the result of ``call``, which runs on the loop of another thread; block this one.

    Raises the errors of the call, and :class:`ForeignLoopError` if the loop ends before it. That
    error begins with ``end``.
    """
    begun = _begin(loop, call, end)
    try:
        idle = 0
        while not concurrent.futures.wait({begun}, timeout=_CHECK_SECONDS)[0]:
            idle = _require_running(loop, idle, end)
        result: T = _result(begun, end)
    finally:
        if not loop.is_closed():  # as above
            begun.cancel()
    return result


def _require_running(loop: asyncio.AbstractEventLoop, idle: int, end: str) -> int:
    """Return for how many checks a loop is not running, ``idle`` before this one.

    Raises :class:`ForeignLoopError` once it has ended. Loops may pause: ``run_until_complete`` may
    be called again.
    """
    idle = 0 if loop.is_running() else idle + 1
    if loop.is_closed() or idle >= _MAX_IDLE_CHECKS:
        raise _cut_off(end)
    return idle


_Outcome = concurrent.futures.Future[tuple[Any, BaseException | None]]


def _begin(
    loop: asyncio.AbstractEventLoop, call: Callable[[], Awaitable[Any]], end: str
) -> _Outcome:
    outcome = _outcome(call)
    try:
        return asyncio.run_coroutine_threadsafe(outcome, loop)
    except RuntimeError:
        outcome.close()
        raise ForeignLoopError(f"{end}; the call has not begun") from None


async def _outcome(call: Callable[[], Awaitable[T]]) -> tuple[T | None, BaseException | None]:
    """Return the result or the error: an exit is the caller's, and must not end the home loop."""
    try:
        return await call(), None
    except GeneratorExit:
        raise  # the home loop ended without the end of this call
    except BaseException as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise
        return None, error


def _result(begun: _Outcome, end: str) -> Any:
    if begun.cancelled():
        raise _cut_off(end)
    result, error = begun.result()
    if error is not None:
        raise error
    return result


def _cut_off(end: str) -> ForeignLoopError:
    return ForeignLoopError(f"{end}, and this call with it; whether it took effect is unknown")


class LoopThread:
    """A daemon thread with an event loop, for calls from threads that have none.

    It cannot be a greenlet: an event loop would stop all others, or be that of them all.
    """

    def __init__(self, name: str, *, close: Callable[[], Awaitable[object]]) -> None:
        """``close`` runs on the loop when the process ends."""
        self._name = name
        self._close = close
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._is_greenlet = False
        self._closed = False
        # A signal handler may interrupt the thread that holds it.
        self._starting = threading.RLock()

    def call(self, call: Callable[[], Awaitable[T]]) -> T:
        """Return the result of ``call``, which runs on the loop; block this thread.

        The first call starts the thread, and one after a failed start tries again. Raises the
        errors of the call, and :class:`ForeignLoopError` if the thread cannot start.
        """
        loop = self._started()
        # A server of the application may forbid threads.
        if not self._ready.wait(_MAX_START_SECONDS):
            raise ForeignLoopError(
                f"the thread {self._name!r} does not start; enable threads in the application's"
                " server, such as by --enable-threads of uWSGI"
            )
        if self._is_greenlet:
            raise ForeignLoopError(
                "gevent or eventlet has replaced the threads of this process, and an event loop"
                " needs a real one; submit with connection=, or let the server use threads, such as"
                " by --worker-class gthread of gunicorn"
            )
        return blocking(loop, call, end="the process ends, and its connections are closed")

    def call_soon(self, function: Callable[[], object]) -> None:
        """Call a function on the loop, without waiting; nothing happens if it has ended.

        Raises :class:`ForeignLoopError` if the thread cannot start.
        """
        loop = self._started()
        try:
            loop.call_soon_threadsafe(function)
        except RuntimeError:  # it has just been closed
            return

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._starting:
            if self._loop is None:
                loop, thread = self._start()
                if self._loop is None:
                    self._loop, self._thread = loop, thread
                    atexit.register(self.close)
                else:  # a signal handler has started another one meanwhile
                    loop.call_soon_threadsafe(loop.stop)
            return self._loop

    def _start(self) -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
        try:
            loop = asyncio.new_event_loop()
        except OSError as error:
            raise self._cannot_start(error) from error
        thread = threading.Thread(
            target=self._run, args=(loop, threading.get_native_id()), name=self._name, daemon=True
        )
        try:
            thread.start()
        except BaseException as error:
            if thread.ident is None:
                loop.close()
            else:  # a signal handler has raised the error
                loop.call_soon_threadsafe(loop.stop)
            if isinstance(error, RuntimeError | OSError):
                raise self._cannot_start(error) from error
            raise
        return loop, thread

    def _cannot_start(self, error: Exception) -> ForeignLoopError:
        return ForeignLoopError(
            f"the thread {self._name!r} cannot start: {error}; call again when the process has"
            " fewer threads and open files, or raise its limits"
        )

    def _run(self, loop: asyncio.AbstractEventLoop, starter: int) -> None:
        if loop.is_closed():
            return
        if threading.get_native_id() == starter:
            self._is_greenlet = True
            loop.close()
            self._ready.set()
            return
        asyncio.set_event_loop(loop)
        loop.call_soon(self._ready.set)
        try:
            loop.run_forever()
        finally:
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(_clock.sleep(0))
            loop.close()

    def close(self) -> None:
        """End the loop and the thread, within seconds; a second call does nothing."""
        loop, thread = self._loop, self._thread
        if self._closed or loop is None or thread is None:
            return
        # A forked process has the objects, and not the thread.
        if self._is_greenlet or not thread.is_alive():
            return
        self._closed = True
        closing = asyncio.run_coroutine_threadsafe(_awaited(self._close()), loop)
        concurrent.futures.wait({closing}, timeout=_MAX_CLOSE_SECONDS)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_MAX_CLOSE_SECONDS)


_MAX_START_SECONDS = 10.0
_MAX_CLOSE_SECONDS = 2.0


async def _awaited(awaitable: Awaitable[object]) -> None:
    await awaitable
