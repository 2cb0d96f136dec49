"""The limits of an HTTP server, and the connections and WebSockets that it limits.

Clients can repeat every rejection, so the log lines about them are limited, too.
"""

import asyncio
import logging
import math
import os
import resource
from collections.abc import Callable, Iterator
from enum import Enum
from http import HTTPStatus
from time import monotonic
from typing import Any, Protocol

import msgspec

from viralfx.settings import HttpSettings, Settings
from viralfx.settings.memory_limit import memory_limits
from viralfx.web.responses import PROBLEM_MEDIA_TYPE, problem

_logger = logging.getLogger("viralfx.http")

MAX_PIPELINED = 100
"""Maximum number of unanswered requests on one connection."""
MAX_QUEUED = 1000
"""Maximum number of waiting pipelined requests on all connections of a server."""
TICK_SECONDS = 0.5
"""Interval at which the deadlines of connections are checked."""

_MAX_DESCRIPTORS = 2**20
_MAX_MANAGEMENT_CONNECTIONS = 256
_CONNECTION_BYTES = 16 * 1024
"""Memory that is planned for an idle connection; it uses half of it."""
_MEMORY_SHARE = 4
"""Idle connections may use a quarter of the memory limit."""
_HEAD_SHARE = 16
"""Unfinished heads may use a sixteenth of the memory limit."""
_REQUEST_SHARE = 8
"""Unanswered requests may use an eighth of the memory limit."""
_MAX_REQUEST_BYTES = 32 * 2**20
_API_SHARE = 4
"""At least a quarter of the descriptors serve the API."""


def _response(status: int, detail: str) -> tuple[bytes, bytes]:
    """Return the head of the response without the server's headers, and the body."""
    body = msgspec.json.encode(problem(status, detail=detail))
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        f"content-type: {PROBLEM_MEDIA_TYPE}",
        f"content-length: {len(body)}",
        "cache-control: no-store",
        *(["retry-after: 1"] if status == HTTPStatus.SERVICE_UNAVAILABLE else []),
        "connection: close",
    ]
    return "".join(f"{line}\r\n" for line in lines).encode(), body


class Rejection(Enum):
    """The reasons to close a connection: the label in metrics and logs, and the status.

    With status 0 there is no response, because the client has sent no request.
    """

    HEAD_TOO_LARGE = ("head_too_large", 431, "The head of the request is too large.")
    TOO_MANY_HEADERS = ("too_many_headers", 431, "The request has too many headers.")
    HEAD_MEMORY = ("memory", 503, "The server has no memory for this head at the moment.")
    REQUEST_MEMORY = (
        "memory",
        503,
        "The server has no memory for this request at the moment.",
    )
    PIPELINED = ("pipelined", 503, "Too many requests wait for a response on this connection.")
    HEAD_TIMEOUT = ("head_timeout", 408, "The head of the request did not arrive in time.")
    SILENT = ("head_timeout", 0, "")
    BODY_TIMEOUT = ("body_timeout", 408, "The body of the request did not arrive in time.")
    KEEP_ALIVE_TIMEOUT = ("keep_alive_timeout", 0, "")
    SEND_TIMEOUT = ("send_timeout", 0, "")
    WEBSOCKET = ("websocket", 0, "")
    CONNECTIONS = ("connections", 503, "The server has too many open connections.")
    CODING = ("coding", 501, "Of the transfer codings, only chunked is supported.")
    HOST = ("host", 400, "Send exactly one valid Host header.")
    INVALID = ("invalid", 400, "This is not a valid HTTP request.")

    def __init__(self, reason: str, status: int, detail: str) -> None:
        self.reason = reason
        self.status = status
        self.head, self.body = _response(status, detail) if status else (b"", b"")


class HttpLimits(HttpSettings, frozen=True, kw_only=True):
    """The limits of the clients of one server. Times are seconds, sizes are bytes."""

    max_connections: int = 1000
    max_unfinished_head_bytes: int = _MAX_REQUEST_BYTES
    """Total size of the unfinished heads and trailers on all connections."""
    max_request_bytes: int = _MAX_REQUEST_BYTES
    """Total size of the large heads and the bodies of unanswered requests on all connections."""

    @classmethod
    def for_api(cls, settings: Settings) -> "HttpLimits":
        """Return the limits of the API server.

        Call it after :func:`raise_descriptor_limit`: the number of connections follows from the
        limits of descriptors and memory unless HTTP_MAX_CONNECTIONS sets it.
        """
        available = _descriptors_for_api(settings)
        configured = settings.http.max_connections
        if configured > available:
            _logger.warning(
                "HTTP_MAX_CONNECTIONS is more than the descriptor limit allows",
                extra={"wanted": configured, "connections": available},
            )
        by_memory = max(64, _memory() // _MEMORY_SHARE // _CONNECTION_BYTES)
        wanted = configured or by_memory
        return cls._with(settings, min(wanted, available))

    @classmethod
    def for_management(cls, settings: Settings) -> "HttpLimits":
        """Return the limits of the management server, which has its own connections."""
        return cls._with(settings, _descriptors_for_management())

    @classmethod
    def _with(cls, settings: Settings, max_connections: int) -> "HttpLimits":
        own = {
            "max_connections": max_connections,
            "max_unfinished_head_bytes": _memory() // _HEAD_SHARE,
            "max_request_bytes": min(_MAX_REQUEST_BYTES, _memory() // _REQUEST_SHARE),
        }
        return cls(**(msgspec.structs.asdict(settings.http) | own))


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open descriptors to the hard one, as Go and Java do.

    systemd's soft limit is 1024 so that old programs which use ``select`` keep working.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:
        _logger.warning("Descriptor limit not raised", extra={"detail": str(error)})


def _descriptor_limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else min(soft, _MAX_DESCRIPTORS)


def _descriptors_for_management() -> int:
    return max(8, min(_MAX_MANAGEMENT_CONNECTIONS, _descriptor_limit() // 16))


def _descriptors_for_api(settings: Settings) -> int:
    """Return the number of descriptors for connections to the API: at least a quarter.

    The rest is reserved for checks, files, Postgres, Redis and the management server.
    """
    limit = _descriptor_limit()
    pool = 0 if settings.database_url is None else settings.db.pool_max + 4
    reserve = min(1024, max(64, limit // 8)) + pool + _descriptors_for_management()
    return max(limit // _API_SHARE, limit - reserve)


def _memory() -> int:
    """Return the bytes that this process may use: the cgroup's limit, or the machine's memory."""
    pages: int = os.sysconf("SC_PHYS_PAGES")
    return min([pages * os.sysconf("SC_PAGE_SIZE"), *memory_limits()])


class ThrottledLog:
    """Limits the rate of log lines for each kind of event.

    The first event of a kind is logged at once. Later ones are counted, and :meth:`flush` logs the
    last of them with the field ``others``, the number of suppressed events, once per period.
    Use it from one thread.
    """

    def __init__(self, logger: logging.Logger, message: str, *, period: float = 60.0) -> None:
        """``period`` is the time between two lines of one kind, in seconds."""
        self._logger = logger
        self._message = message
        self._period = period
        self._next: dict[str, float] = {}
        self._suppressed: dict[str, tuple[int, int, dict[str, object]]] = {}

    def add(self, kind: str, level: int, /, **fields: object) -> None:
        """Log an event, or only count it if its kind was logged less than a period ago."""
        if monotonic() < self._next.get(kind, 0.0):
            count, _, _ = self._suppressed.get(kind, (0, level, fields))
            self._suppressed[kind] = (count + 1, level, fields)
        else:
            self._write(kind, level, fields, 0)

    def flush(self, *, now: bool = False) -> None:
        """Log the suppressed events of each kind whose period is over; with ``now``, of all."""
        for kind in list(self._suppressed):
            if now or monotonic() >= self._next[kind]:
                count, level, fields = self._suppressed.pop(kind)
                self._write(kind, level, fields, count - 1)

    def _write(self, kind: str, level: int, fields: dict[str, object], others: int) -> None:
        self._next[kind] = monotonic() + self._period
        self._logger.log(level, self._message, extra={**fields, "others": others})


class Connection(Protocol):
    """The interface of a connection for :class:`Connections`."""

    tick: int
    """The tick of the next check; -1: no check is scheduled."""

    def check_deadline(self, now: float) -> float:
        """Enforce deadlines at the monotonic time ``now``; return the time of the next check."""

    def buffered(self) -> int:
        """Return the size of the heads and bodies of unanswered requests."""


class Connections:
    """The open connections of one server: their number, deadlines and rejections.

    A timing wheel with one entry for each connection holds the deadlines, instead of one timer
    each. So a request that arrives in time costs no timer, and an idle server only counts ticks.
    """

    def __init__(self, limits: HttpLimits) -> None:
        self.limits = limits
        self.on_rejected: Callable[[str], None] = lambda _: None
        """Called with the reason of each rejection."""
        self.on_upgrade_ignored: Callable[[], None] = lambda: None
        """Called for each ``Upgrade`` to an unsupported protocol."""
        self.now = monotonic()
        """The time of the last tick, which is precise enough for the age of idle connections."""
        self.server_head = b""
        """The server's own headers as bytes. Each tick renews the Date header."""
        self.open = 0
        self.queued = 0
        """Pipelined requests that wait for the response to an earlier one."""
        self.head_bytes = 0
        """Total size of incomplete heads and trailers."""
        self.request_bytes = 0
        """Upper bound of the total size of large heads and of bodies of unanswered requests."""
        self._members: set[Connection] = set()
        self._wheel: dict[int, set[Connection]] = {}
        self._tick = self._tick_of(self.now)
        self._log = ThrottledLog(_logger, "HTTP request rejected")
        self._upgrades = ThrottledLog(_logger, "HTTP upgrade ignored")

    @property
    def full(self) -> bool:
        """True if no further connection may be opened."""
        return self.open >= self.limits.max_connections

    def __iter__(self) -> Iterator[Connection]:
        return iter(list(self._members))

    def add(self, connection: Connection, deadline: float) -> None:
        """Add a connection whose first check is at ``deadline`` of the monotonic clock."""
        self._members.add(connection)
        self.check_at(connection, deadline)

    def remove(self, connection: Connection) -> None:
        """Remove a connection."""
        self._members.discard(connection)
        self._unschedule(connection)

    def check_at(self, connection: Connection, deadline: float) -> None:
        """Schedule a check at ``deadline``, unless an earlier one is scheduled."""
        tick = max(self._tick_of(deadline), self._tick + 1)
        if connection.tick >= 0:
            if connection.tick <= tick:
                return
            self._unschedule(connection)
        connection.tick = tick
        self._wheel.setdefault(tick, set()).add(connection)

    def advance(self) -> None:
        """Check all connections that are due."""
        self.now = now = monotonic()
        last = int(now / TICK_SECONDS)
        if last - self._tick > len(self._wheel):
            due = sorted(tick for tick in self._wheel if tick <= last)
        else:
            due = [tick for tick in range(self._tick + 1, last + 1) if tick in self._wheel]
        self._tick = last
        for tick in due:
            for connection in self._wheel.pop(tick, ()):
                connection.tick = -1
                if connection not in self._members:
                    continue
                try:
                    self.check_at(connection, connection.check_deadline(now))
                except Exception:  # one connection must not stop the checks of all
                    _logger.exception("Deadline check of a connection failed")
                    self.check_at(connection, now + TICK_SECONDS)
        self._log.flush()
        self._upgrades.flush()

    def reject(self, rejection: Rejection, client: str | None) -> None:
        """Count and log a rejection; ``client``: the address of the client."""
        self.on_rejected(rejection.reason)
        routine = rejection is Rejection.KEEP_ALIVE_TIMEOUT
        level = logging.DEBUG if routine else logging.WARNING
        fields: dict[str, object] = {"reason": rejection.reason, "client": client}
        if rejection.status:
            fields["status"] = rejection.status
        self._log.add(rejection.reason, level, **fields)

    def ignore_upgrade(self, protocol: str) -> None:
        """Count and log that the server ignored an ``Upgrade`` to an unsupported protocol."""
        self.on_upgrade_ignored()
        self._upgrades.add("", logging.WARNING, upgrade=protocol)

    def may_buffer_heads(self, own: int) -> bool:
        """Return False if the incomplete heads of all connections use too much memory.

        ``own``: the size of the caller's head. A small head is always accepted, because the limit
        of connections bounds the number of heads.
        """
        limit = self.limits.max_unfinished_head_bytes
        return self.head_bytes <= limit or own <= self._share_of(limit)

    def _share_of(self, limit: int) -> int:
        return max(1024, limit // max(1, self.limits.max_connections))

    def may_buffer_requests(self, own: int) -> bool:
        """Return False if the unanswered requests use too much memory.

        ``own``: the size of the caller's request. A small one is always accepted, as with heads.
        :attr:`request_bytes` only grows as requests arrive, so it is recounted above the limit.
        """
        limit = self.limits.max_request_bytes
        if self.request_bytes > limit:
            self.request_bytes = sum(connection.buffered() for connection in self._members)
        return self.request_bytes <= limit or own <= self._share_of(limit)

    def close(self) -> None:
        """Log the suppressed events."""
        self._log.flush(now=True)
        self._upgrades.flush(now=True)

    def _unschedule(self, connection: Connection) -> None:
        if connection.tick >= 0:
            bucket = self._wheel.get(connection.tick)
            if bucket is not None:
                bucket.discard(connection)
                if not bucket:
                    del self._wheel[connection.tick]
            connection.tick = -1

    @staticmethod
    def _tick_of(deadline: float) -> int:
        return math.ceil(deadline / TICK_SECONDS)


# -- WebSockets ----------------------------------------------------------------------------------


_SLICE = 4096
"""Bytes that are parsed in one turn of the event loop; the smallest frame has two."""
_MAX_FRAGMENTS = 1024
"""Maximum number of frames of one message."""
_MESSAGE_TOO_BIG = 1009


class WebSocketLimits:
    """Mixin for uvicorn's WebSocket class that counts the connection and enforces limits."""

    registry: Connections
    frames: list[Any]
    _backlog: bytearray | None = None

    def connection_lost(self: Any, exc: Exception | None) -> None:
        """Release the connection."""
        self.registry.open -= 1
        self._backlog = None
        super().connection_lost(exc)  # type: ignore[misc]

    def data_received(self: Any, data: bytes) -> None:
        """Parse a few frames, and the others in the next turns of the event loop.

        One read may contain tens of thousands of empty frames.
        """
        if self._backlog is not None:
            self._backlog += data
        elif len(data) > _SLICE and self.handshake_initiated:
            self._backlog = bytearray(data)
            asyncio.get_running_loop().call_soon(self._parse_backlog)
        else:
            self._parse(data)
            return
        if not self.transport.is_closing():
            self.transport.pause_reading()

    def _parse_backlog(self: Any) -> None:
        if self._backlog is None or self.transport.is_closing():
            return
        piece = bytes(self._backlog[:_SLICE])
        del self._backlog[:_SLICE]
        self._parse(piece)
        if self._backlog:
            asyncio.get_running_loop().call_soon(self._parse_backlog)
            return
        self._backlog = None
        if not self.read_paused and not self.transport.is_closing():
            self.transport.resume_reading()

    def _parse(self: Any, data: bytes) -> None:
        if self.transport.is_closing():
            return
        try:
            super().data_received(data)  # type: ignore[misc]
        except Exception:  # noqa: BLE001 - frames after a close frame may contain anything
            self._reject()
            self.transport.abort()

    def handle_cont(self: Any, event: Any) -> None:
        """Accept a fragment of a message, unless there are too many."""
        if len(self.frames) >= _MAX_FRAGMENTS:
            self.frames = []
            self.conn.send_close(_MESSAGE_TOO_BIG)
            self.handle_parser_exception()
        else:
            super().handle_cont(event)  # type: ignore[misc]

    def handle_parser_exception(self: Any) -> None:
        """Close a connection whose client violated the protocol."""
        self._reject()
        super().handle_parser_exception()  # type: ignore[misc]

    def _reject(self: Any) -> None:
        self.registry.reject(Rejection.WEBSOCKET, self.client[0] if self.client else None)


def limited_websocket_class(
    base: type[asyncio.Protocol], connections: Connections
) -> type[asyncio.Protocol]:
    """Return the class of a server's WebSocket connections; ``base`` is uvicorn's class."""
    return type("WebSocketConnection", (WebSocketLimits, base), {"registry": connections})
