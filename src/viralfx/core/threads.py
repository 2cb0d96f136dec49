"""Calls in daemon threads of their own, and lookups of host names in them."""

import asyncio
import contextlib
import ipaddress
import math
import socket
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from viralfx.core.clock import ignore_error

T = TypeVar("T")


async def in_thread(function: Callable[[], T], name: str) -> T:
    """Return the result of a function that may block, from a daemon thread called ``name``.

    One that never returns takes no thread of the event loop from other calls, and does not delay
    the end of the process. Cancelling the call does not end the thread. Raises the function's
    error; ``RuntimeError`` for one that would end the process, such as ``SystemExit``.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

    def end(outcome: tuple[Any, BaseException | None]) -> None:
        if not ended.done():
            ended.set_result(outcome)

    def run() -> None:
        result: Any = None
        failure: BaseException | None = None
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001 - raised below
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(end, (result, failure))

    threading.Thread(target=run, name=name, daemon=True).start()
    result, error = await ended
    if error is not None:
        if isinstance(error, Exception):
            raise error
        exited = RuntimeError(f"the function raised {type(error).__name__}")
        raise exited.with_traceback(error.__traceback__) from error
    found: T = result
    return found


_SHARED_SECONDS = 1.0


class NameLookups:
    """Resolves names at each call, because their addresses change.

    A lookup cannot be cancelled, so it has a thread of its own: in a thread of the event loop, a
    name server that hangs would hold up the lookups of others, and the end of the process. Calls
    within a second share a lookup. While lookups of a name hang, calls share the latest one for as
    many seconds as there are such lookups, so that their threads do not grow in proportion to the
    time. May be used from several event loops.
    """

    def __init__(self) -> None:
        self._running: dict[tuple[object, str, int], tuple[float, asyncio.Task[Any]]] = {}
        self._hanging: Counter[tuple[object, str, int]] = Counter()

    async def addresses(self, host: str, port: int) -> Sequence[str]:
        """Return each address of a host, in order; raises as :meth:`places` does."""
        return [address for address, _ in await self.places(host, port)]

    async def places(self, host: str, port: int) -> Sequence[tuple[str, int]]:
        """Return each address of a host with a port, in order.

        Raises ``OSError`` and ``UnicodeError``.
        """
        with contextlib.suppress(ValueError):
            return ((str(ipaddress.ip_address(host)), port),)
        loop = asyncio.get_running_loop()
        key = loop, host, port
        began, lookup = self._running.get(key, (-math.inf, None))
        if lookup is None or loop.time() - began >= _SHARED_SECONDS * self._hanging[key]:
            ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
            lookup = asyncio.create_task(in_thread(ask, "name-lookup"), name="name-lookup")
            lookup.add_done_callback(partial(self._ended, key))
            self._running[key] = loop.time(), lookup
            self._hanging[key] += 1
        found = await asyncio.shield(lookup)
        return tuple(dict.fromkeys((str(place[0]), int(place[1])) for *_, place in found))

    def _ended(self, key: tuple[object, str, int], lookup: asyncio.Task[Any]) -> None:
        ignore_error(lookup)
        self._hanging[key] -= 1
        if not self._hanging[key]:
            del self._hanging[key]
        if key in self._running and self._running[key][1] is lookup:
            del self._running[key]
