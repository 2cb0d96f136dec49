"""Cache with single flight: concurrent callers of a missing key share one load."""

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Generic, Protocol, TypeVar

from viralfx.core.clock import ignore_error
from viralfx.core.errors import require_positive
from viralfx.core.loops import HomeLoop, beside_others

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """Runs at most one piece of work per key; concurrent callers share its result or error.

    Each event loop has work of its own.

    The work runs in its own task, in the context of the first caller. Cancelling one caller does
    not affect the others; the work is cancelled when the last caller is. An error is raised in
    all waiting callers; the next call starts the work again. Work must not wait for its own key.
    """

    def __init__(self) -> None:
        self._flights: dict[str, _Flight[T]] = {}

    async def run(self, key: str, work: Callable[[], Awaitable[T]]) -> T:
        """Return the result of the work in progress for ``key``; start ``work`` if there is none.

        Raises the error of the work.
        """
        flight = self._flights.get(key)
        here = asyncio.get_running_loop()
        if flight is None or flight.task.done() or flight.task.get_loop() is not here:
            flight = self._flights[key] = _Flight(work, key)
            flight.task.add_done_callback(lambda _: self._forget(key, flight))
        flight.waiting += 1
        try:
            await asyncio.wait({flight.task})
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                # Removed at once: a new caller must not join work that is being cancelled.
                self._forget(key, flight)
                flight.task.cancel()
        return flight.task.result()

    def _forget(self, key: str, flight: "_Flight[T]") -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]


class _Flight(Generic[T]):
    def __init__(self, work: Callable[[], Awaitable[T]], key: str) -> None:
        self.waiting = 0
        self.task = asyncio.create_task(_call(work), name=f"flight-{key}")
        # Without waiters the error has no reader; it is not an uncaught exception.
        self.task.add_done_callback(ignore_error)


async def _call(work: Callable[[], Awaitable[T]]) -> T:
    return await work()


_logger = logging.getLogger("viralfx.cache")


class CacheStore(Protocol):
    """Port: stores bytes by key. A value may disappear before its time to live is over."""

    async def get(self, key: str) -> bytes | None:
        """Return the value; None if there is none or it cannot be read."""
        ...

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        """Store a value for ``ttl`` seconds; drop it if it cannot be stored.

        Raises ``ValueError`` for a ``ttl`` that is not positive and finite.
        """
        ...

    async def delete(self, key: str) -> None:
        """Delete a value. Raises if it may still be stored, because it might be served again."""
        ...


class ValueCodec(Protocol):
    """Port: values of any type as JSON."""

    def encode(self, value: object, type_: Any) -> bytes:
        """Return the JSON of a value of a type; raise an error for one that has none."""
        ...

    def decode(self, payload: bytes, type_: Any) -> Any:
        """Return the value; raise an error for JSON that does not fit the type."""
        ...


class Cache:
    """Returns values from the store, and loads missing ones.

    Concurrent callers of a key in this process share one read and one load. If the store fails,
    the value is loaded.

    Await its methods on any event loop of the process. A loader runs on that of the application, so
    it must not block, nor use a client of another loop.
    """

    def __init__(
        self, store: CacheStore, codec: ValueCodec | None = None, *, home: HomeLoop | None = None
    ) -> None:
        """``codec`` is needed for :meth:`get_or_load_value` only.

        ``home`` is the event loop of the store and the loaders.
        """
        self._home = home or HomeLoop()
        self._store = store
        self._codec = codec
        self._flights: SingleFlight[bytes] = SingleFlight()
        self._renewals: SingleFlight[bytes] = SingleFlight()
        self._failing: set[str] = set()

    @beside_others
    async def get_or_load(
        self, key: str, ttl: float, loader: Callable[[], Awaitable[bytes]]
    ) -> bytes:
        """Return the value of ``key``; if it is missing, load it and store it for ``ttl`` seconds.

        An error of the loader is raised in all waiting callers and is not stored. Cancelling one
        caller does not affect the others. A loader must not request its own key. Raises
        ``ValueError`` for a ``ttl`` that is not positive and finite.
        """
        require_positive("ttl", ttl)
        return await self._flights.run(key, functools.partial(self._obtain, key, ttl, loader))

    @beside_others
    async def get_or_load_value(
        self, key: str, ttl: float, loader: Callable[[], Awaitable[T]], kind: type[T]
    ) -> T:
        """Do as :meth:`get_or_load`, for a value of a type that has JSON, such as a model.

        Each caller gets a value of its own. A stored value that does not fit ``kind``, such as one
        of an earlier version of the application, is loaded anew. Raises an error of the codec for a
        loaded value that has no JSON.
        """
        codec = self._codec
        if codec is None:
            raise TypeError("this cache has no codec, so it takes bytes only")

        async def load() -> bytes:
            return codec.encode(await loader(), kind)

        async def renew() -> bytes:
            document = await load()
            await self._keep(key, document, ttl)
            return document

        document = await self.get_or_load(key, ttl, load)
        try:
            value: T = codec.decode(document, kind)
        except Exception:  # noqa: BLE001 - a codec of any kind
            value = codec.decode(await self._renewals.run(key, renew), kind)
        return value

    async def _obtain(self, key: str, ttl: float, loader: Callable[[], Awaitable[bytes]]) -> bytes:
        value = await self._stored(key)
        if value is None:
            value = await loader()
            await self._keep(key, value, ttl)
        return value

    async def _stored(self, key: str) -> bytes | None:
        try:
            value = await self._store.get(key)
        except Exception as error:  # noqa: BLE001 - it is logged
            # A boundary: if the store cannot be read, the value is loaded.
            self._failed("read", error)
            return None
        self._failing.discard("read")
        return value

    async def _keep(self, key: str, value: bytes, ttl: float) -> None:
        try:
            await self._store.set(key, value, ttl)
        except Exception as error:  # noqa: BLE001 - it is logged
            # A boundary: the caller gets the value although it could not be stored.
            self._failed("write", error)
        else:
            self._failing.discard("write")

    def _failed(self, operation: str, error: Exception) -> None:
        # Logged once until the store works again. Reads and writes are tracked separately, because
        # a full store serves reads and rejects writes.
        if operation not in self._failing:
            _logger.warning("Cache store failed", exc_info=error, extra={"operation": operation})
        self._failing.add(operation)
