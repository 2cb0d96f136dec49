"""Connections to addresses that were looked at: between the look and the connection is no name."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import httpcore

Resolver: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]
"""Returns every address of a host, best first. Raises ``OSError`` when there is none."""

SocketOptions: TypeAlias = Iterable[httpcore.SOCKET_OPTION]

_MOST_TRIED = 8


class SystemResolver:
    """Asks the system, on threads of its own.

    A lookup cannot be cancelled. Name servers that do not answer hold these threads, and not those
    on which everybody else's names are looked up.
    """

    def __init__(self, threads: int = 4) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="webhook-names")

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        """See :data:`Resolver`."""
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._threads, _look_up, host, port)
        return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _look_up(host: str, port: int) -> list[tuple[object, object, int, str, tuple[object, ...]]]:
    return [*socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Looks a name up once, has all its addresses checked, and connects to one of just these.

    Whatever the name means a moment later, nobody asks again: the connection is made to an
    address, while TLS and the ``Host`` header keep the name.
    """

    def __init__(
        self, resolve: Resolver, check: Callable[[Sequence[str]], None], patience: float
    ) -> None:
        """``patience`` is the seconds that all the addresses have together to accept."""
        self._resolve = resolve
        self._check = check
        self._patience = patience
        self._network = httpcore.AnyIOBackend()
        self._stream: httpcore.AsyncNetworkStream | None = None

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ARG002, ASYNC109 - the sender bounds the whole
        local_address: str | None = None,
        socket_options: SocketOptions | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to the first address that accepts.

        Raises what ``check`` raises, ``OSError`` when the name has no address, and httpcore's
        errors when no address accepts.
        """
        addresses = await self._resolve(host, port)
        self._check(addresses)
        tried = addresses[:_MOST_TRIED]
        # One that swallows what is sent to it must not use up the others' time.
        share = self._patience / max(1, len(tried))
        refusal: Exception = httpcore.ConnectError("the name has no address")
        for address in tried:
            try:
                self._stream = await self._network.connect_tcp(
                    address, port, share, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                refusal = error
            else:
                return self._stream
        raise refusal

    async def aclose(self) -> None:
        """Close the connection; httpcore leaves it open when TLS is cut short."""
        if self._stream is not None:
            await self._stream.aclose()
