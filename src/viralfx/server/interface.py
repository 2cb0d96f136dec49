"""The interface between a server and its application: ASGI, and what both agree on beyond it.

An application needs none of it to be served. The operations layer uses it, and any other server
ignores it.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any, Protocol, TypeAlias

import msgspec

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

IN_FLIGHT = "viralfx.in_flight"
"""The scope key of an object whose ``on_disconnect()`` the server calls if the client leaves."""
ERROR = "viralfx.error"
"""The scope key of an error that a framework has turned into a response."""
REJECTED_STATUS = "viralfx.rejected_status"
"""The scope key of the status with which the server itself rejected the request; 0: with none."""


class RawResponse(msgspec.Struct, frozen=True):
    """A complete response, except for the correlation id, which the sender adds."""

    status: int
    head: bytes
    """The headers as bytes, each with its line end."""
    body: bytes

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """The headers, as ASGI has them."""
        return [tuple(line.split(b": ", 1)) for line in self.head.splitlines()]  # type: ignore[misc]


Probe: TypeAlias = Callable[[str, bytes, Iterable[tuple[bytes, bytes]]], object]
"""Answers a request by its method, query and headers.

If the result is no :class:`RawResponse`, or an error, the application has to serve the request.
"""


class RequestsInFlight(Protocol):
    """The requests that an application has not answered."""

    @property
    def stopping(self) -> bool:
        """True once the shutdown has begun, so that each response closes its connection."""


class Application(Protocol):
    """An ASGI application with requests that its server may answer without it."""

    @property
    def probes(self) -> Mapping[bytes, Probe]:
        """The probes by the target in the request line.

        A server may call one for a ``GET`` or ``HEAD`` without a body, while the connection has no
        other request.
        """

    @property
    def requests(self) -> RequestsInFlight:
        """The requests of the application."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""


class ServerMetrics(Protocol):
    """The metrics of servers."""

    def add_server(
        self, name: str, reasons: Iterable[str], connections: Callable[[], int], limit: int
    ) -> Callable[[str], None]:
        """Add a server; return a function that counts a rejection by one of the ``reasons``.

        ``connections`` returns the number of open connections, ``limit`` is its maximum.
        """

    def count_ignored_upgrade(self) -> None:
        """Count a request whose ``Upgrade`` header the server ignored."""


_LOGGED = "viralfx_logged"


def mark_logged(error: BaseException) -> None:
    """Mark an error that the application has logged, so that the server does not log it again."""
    vars(error)[_LOGGED] = True


def is_logged(error: BaseException) -> bool:
    """Return True for an error that :func:`mark_logged` has marked."""
    return _LOGGED in vars(error)
