"""The limits of an HTTP server, the answers beyond them, and the end of new connections.

Clients can repeat every rejection, so the log lines about them are limited, too.
"""

import contextlib
import ctypes
import logging
import os
import resource
import socket
import struct
import sys
from enum import Enum
from http import HTTPStatus
from time import monotonic

import msgspec

from viralfx.server.problems import PROBLEM_MEDIA_TYPE, problem
from viralfx.settings import HttpSettings
from viralfx.settings.platform import memory_limits

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
_RESIDENT_SHARE = 7 / 8
"""Share of the memory limit above which the server takes no more large requests."""
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


class RejectedError(Exception):
    """Aborts the parser; the connection holds the reason."""


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
    """True: a new connection above the limit replaces the one that waits longest."""

    @classmethod
    def for_api(cls, http: HttpSettings, *, other_descriptors: int = 0) -> "HttpLimits":
        """Return the limits of the API server.

        Call it after :func:`raise_descriptor_limit`: the number of connections follows from the
        limits of descriptors and memory unless HTTP_MAX_CONNECTIONS sets it. The process needs
        ``other_descriptors`` for connections of its own, such as those of a pool.
        """
        available = _descriptors_for_api(other_descriptors)
        configured = http.max_connections
        if configured > available:
            _logger.warning(
                "HTTP_MAX_CONNECTIONS is more than the descriptor limit allows",
                extra={"wanted": configured, "connections": available},
            )
        by_memory = max(64, _memory() // _MEMORY_SHARE // _CONNECTION_BYTES)
        wanted = configured or by_memory
        return cls._with(http, min(wanted, available))

    @classmethod
    def for_management(cls, http: HttpSettings) -> "HttpLimits":
        """Return the limits of the management server, which has its own connections."""
        limits = cls._with(http, _descriptors_for_management())
        return msgspec.structs.replace(limits, replaces_idle=True)

    @classmethod
    def _with(cls, http: HttpSettings, max_connections: int) -> "HttpLimits":
        own = {
            "max_connections": max_connections,
            "max_unfinished_head_bytes": _memory() // _HEAD_SHARE,
            "max_request_bytes": min(_MAX_REQUEST_BYTES, _memory() // _REQUEST_SHARE),
            "max_unsent_bytes": _memory() // _HEAD_SHARE,
            "max_resident_bytes": int(_memory() * _RESIDENT_SHARE),
        }
        return cls(**(msgspec.structs.asdict(http) | own))


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


def _descriptors_for_api(other: int) -> int:
    """Return the number of descriptors for connections to the API: at least a quarter.

    The rest is reserved for checks, files, Postgres, Redis and the management server.
    """
    limit = _descriptor_limit()
    reserve = min(1024, max(64, limit // 8)) + other + _descriptors_for_management()
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


_SO_ATTACH_FILTER = 26
# Classic BPF over the TCP header: drop a segment with SYN, let any other pass.
_DROP_SYN = b"".join(
    struct.pack("=HBBI", *instruction)
    for instruction in (
        (0x30, 0, 0, 13),  # load the byte of the flags
        (0x45, 0, 1, 0x02),  # SYN is set: the next instruction, else the one after it
        (0x06, 0, 0, 0),  # drop
        (0x06, 0, 0, 0xFFFFFFFF),  # pass
    )
)


def stop_handshakes(listener: socket.socket) -> None:
    """Make the kernel drop new connection attempts, so that the accept queue can be emptied.

    Otherwise the kernel may complete a connection between the last accept and the close, and reset
    it. A client whose SYN is dropped sends it again, and is refused after the close. This does
    nothing on a kernel without socket filters.
    """
    program = ctypes.create_string_buffer(_DROP_SYN, len(_DROP_SYN))
    argument = struct.pack("HP", len(_DROP_SYN) // 8, ctypes.addressof(program))
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, argument)
