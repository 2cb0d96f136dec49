"""The limits of an HTTP server, and the connections and WebSockets that it limits.

Clients can repeat every rejection, so the log lines about them are limited, too.
"""

import asyncio
import logging
import math
import os
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from http import HTTPStatus
from time import monotonic
from typing import Protocol

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
LINGER_SECONDS = 1.0
"""Time for a client to read the last response, while further input is discarded."""
STOPPING_SECONDS = 5.0
"""While the server stops: longest silence of a client that sends a body or reads a response."""

_MAX_DESCRIPTORS = 2**20
_MAX_MANAGEMENT_CONNECTIONS = 256
_CONNECTION_BYTES = 16 * 1024
"""Memory that is planned for an idle connection; it uses half of it."""
_MEMORY_SHARE = 4
"""Idle connections may use a quarter of the memory limit."""
_HEAD_SHARE = 16
"""Unfinished heads may use a sixteenth of the memory limit, and unsent responses another one."""
_REQUEST_SHARE = 8
"""Unanswered requests may use an eighth of the memory limit."""
_MAX_REQUEST_BYTES = 32 * 2**20
WRITE_BUFFER_BYTES = 8 * 1024
"""Unsent bytes of a connection above which its next responses wait."""
_RELIEF = 7 / 8
"""Share of a limit of unsent bytes down to which connections are aborted above it."""
_RESIDENT_SHARE = 7 / 8
"""Share of the memory limit above which the server takes no more large requests."""
_SAMPLE_BYTES = 2**20
"""Received bytes of bodies after which the memory of the process is measured anew."""
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
    UNSENT = ("unsent", 0, "")
    WEBSOCKET = ("websocket", 0, "")
    IDLE_FOR_NEW = ("connections", 0, "")
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
    """Total size of the large heads and the unread bodies of requests on all connections."""
    max_unsent_bytes: int = _MAX_REQUEST_BYTES
    """Total size of the responses that wait for their clients on all connections."""
    max_resident_bytes: int = sys.maxsize
    """Memory of the process above which no more large requests are taken."""
    replaces_idle: bool = False
    """True: a new connection above the limit replaces the oldest one without a request."""

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
        limits = cls._with(settings, _descriptors_for_management())
        return msgspec.structs.replace(limits, replaces_idle=True)

    @classmethod
    def _with(cls, settings: Settings, max_connections: int) -> "HttpLimits":
        own = {
            "max_connections": max_connections,
            "max_unfinished_head_bytes": _memory() // _HEAD_SHARE,
            "max_request_bytes": min(_MAX_REQUEST_BYTES, _memory() // _REQUEST_SHARE),
            "max_unsent_bytes": _memory() // _HEAD_SHARE,
            "max_resident_bytes": int(_memory() * _RESIDENT_SHARE),
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


def _resident_bytes() -> int:
    """Return the memory of the process; 0 on a system that does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - often called
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


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

    transport: asyncio.Transport
    client: tuple[str, int] | None
    tick: int
    """The tick of the next check; -1: no check is scheduled."""
    sent_bytes: int
    """Bytes of responses that the client had acknowledged at the last check; -1: none yet."""
    sent_at: float
    """The monotonic time at which that number was new."""

    def check_deadline(self, now: float) -> float:
        """Enforce deadlines at the monotonic time ``now``; return the time of the next check."""

    def idle_since(self) -> float | None:
        """Return the monotonic time since which the connection has no request; None: it has one."""


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
        """Total size of large heads of unanswered requests, and of unread bodies."""
        self.unsent_bytes = 0
        """Total size of the responses of the connections whose clients do not read them."""
        self._unsent: dict[Connection, int] = {}
        self._recounted_at = -1
        self._received = 0
        self._is_memory_low = False
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
        self.resume_writing(connection)

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
        if self._is_memory_low:
            self._measure()
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
        """Return False if requests, or the whole process, use too much memory.

        ``own``: the size of the caller's request, with the part of its body that the application
        has read. A small one is always accepted, as with heads.
        """
        limit = self.limits.max_request_bytes
        is_full = self._is_memory_low or self.request_bytes > limit
        return not is_full or own <= self._share_of(limit)

    def receive(self, size: int) -> None:
        """Count received bytes of bodies, which an application may collect, and measure memory."""
        self._received += size
        if self._received >= _SAMPLE_BYTES:
            self._measure()

    def _measure(self) -> None:
        self._received = 0
        self._is_memory_low = _resident_bytes() > self.limits.max_resident_bytes

    # -- responses that wait for their clients ---------------------------------------------------

    def pause_writing(self, connection: Connection) -> None:
        """Count the unsent bytes of a connection; above the limit, abort the largest ones."""
        size = connection.transport.get_write_buffer_size()
        self.unsent_bytes += size - self._unsent.get(connection, 0)
        self._unsent[connection] = size
        self.check_at(connection, monotonic() + TICK_SECONDS)
        if self.unsent_bytes > self.limits.max_unsent_bytes:
            # Not now: the transport of this connection is writing.
            asyncio.get_running_loop().call_soon(self._relieve)

    def resume_writing(self, connection: Connection) -> None:
        """Forget the unsent bytes of a connection."""
        self.unsent_bytes -= self._unsent.pop(connection, 0)

    def _relieve(self) -> None:
        limit = self.limits.max_unsent_bytes
        if self.unsent_bytes > limit and self._recounted_at != self._tick:
            # At most once a tick, because a client that reads a little could ask for it often.
            self._recounted_at = self._tick
            self._unsent = {c: c.transport.get_write_buffer_size() for c in self._unsent}
            self.unsent_bytes = sum(self._unsent.values())
        if self.unsent_bytes <= limit:
            return
        for connection in sorted(self._unsent, key=self._unsent.__getitem__, reverse=True):
            if self.unsent_bytes <= limit * _RELIEF:
                return
            self._abort(connection, Rejection.UNSENT)

    def check_sending(
        self, connection: Connection, now: float, timeout: float, rejection: Rejection | None
    ) -> float:
        """Abort a connection whose client has acknowledged no byte for ``timeout`` seconds.

        Returns the time of the next check. ``rejection`` is counted; None: it was already.
        """
        acknowledged = _acknowledged(connection.transport)
        if acknowledged != connection.sent_bytes:
            connection.sent_bytes, connection.sent_at = acknowledged, now
        elif now >= connection.sent_at + timeout:
            self._abort(connection, rejection)
            return now + timeout
        return max(connection.sent_at + timeout, now + TICK_SECONDS)

    def _abort(self, connection: Connection, rejection: Rejection | None) -> None:
        self.resume_writing(connection)
        if rejection is not None:
            self.reject(rejection, connection.client[0] if connection.client else None)
        connection.transport.abort()

    # -- room for new connections ----------------------------------------------------------------

    def make_room(self) -> bool:
        """Abort the connection without a request for the longest time; return False if none is.

        The limits say whether a server does that.
        """
        if not self.limits.replaces_idle:
            return False
        idle = [(since, each) for each in self._members if (since := each.idle_since()) is not None]
        if not idle:
            return False
        _, oldest = min(idle, key=lambda pair: pair[0])
        self._members.discard(oldest)  # it is not chosen again before its end
        self._abort(oldest, Rejection.IDLE_FOR_NEW)
        return True

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


_TCP_INFO_BYTES_ACKED = 120
"""Offset of the acknowledged bytes in ``struct tcp_info`` of Linux."""


def _acknowledged(transport: asyncio.Transport) -> int:
    """Return the bytes that the client has acknowledged, or, if unknown, the unsent bytes."""
    connected = transport.get_extra_info("socket")
    try:
        info = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
        return int.from_bytes(info[_TCP_INFO_BYTES_ACKED:][:8], sys.byteorder)
    except (OSError, AttributeError):
        return transport.get_write_buffer_size()
