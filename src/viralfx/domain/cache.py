"""Values worth keeping for a while: the store's port, and how a value gets there only once."""

import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from viralfx.domain.resilience.quantities import require_positive
from viralfx.domain.single_flight import SingleFlight

_logger = logging.getLogger("viralfx.cache")


class CacheStore(Protocol):
    """Port: keeps bytes by key until their time is over, or earlier if it must."""

    async def get(self, key: str) -> bytes | None:
        """Return the value; None when there is none, or when it cannot be had."""
        ...

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        """Keep a value for ``ttl`` seconds, or not at all when it cannot be kept.

        Raises ``ValueError`` for a ``ttl`` that is not positive and finite.
        """
        ...

    async def delete(self, key: str) -> None:
        """Forget a value. Raises when it may still be there, for then it may still be served."""
        ...


class Cache:
    """Answers from the store, and from the loader what is not there.

    However many ask for a key at the same time, it is read and loaded once in this process. The
    store is a help and never a condition: when it fails, the loader answers.
    """

    def __init__(self, store: CacheStore) -> None:
        self._store = store
        self._flights: SingleFlight[bytes] = SingleFlight()
        self._failing: set[str] = set()

    async def get_or_load(
        self, key: str, ttl: float, loader: Callable[[], Awaitable[bytes]]
    ) -> bytes:
        """Return the value of ``key``; load it, and keep it for ``ttl`` seconds, if need be.

        An error of the loader reaches all who wait for it and is not kept. One caller's
        cancellation leaves the others alone. A loader must not ask for its own key. Raises
        ``ValueError`` for a ``ttl`` that is not positive and finite.
        """
        require_positive("ttl", ttl)
        return await self._flights.run(key, functools.partial(self._obtain, key, ttl, loader))

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
            # A boundary: a read that the store cannot answer is answered by the loader.
            self._failed("read", error)
            return None
        self._failing.discard("read")
        return value

    async def _keep(self, key: str, value: bytes, ttl: float) -> None:
        try:
            await self._store.set(key, value, ttl)
        except Exception as error:  # noqa: BLE001 - it is logged
            # A boundary: the value is there, and worth returning though nobody keeps it.
            self._failed("write", error)
        else:
            self._failing.discard("write")

    def _failed(self, what: str, error: Exception) -> None:
        # Once, until it works again: every call would say the same. Reads and writes apart, as a
        # full store answers the ones and refuses the others.
        if what not in self._failing:
            _logger.warning("Cache store failed", exc_info=error, extra={"operation": what})
        self._failing.add(what)
