"""One connection of an HTTP server: its limits, its deadlines, and how it is closed.

This half of the protocol protects the process (ADR-0035). The other half,
:mod:`viralfx.server.protocol`, responds to requests.
"""

import asyncio
from collections import deque
from time import monotonic
from typing import Any, NoReturn

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.utils import get_local_addr, get_remote_addr, is_ssl
from uvicorn.server import ServerState

from viralfx.server.connections import Connections
from viralfx.server.interface import REJECTED_STATUS, Probe
from viralfx.server.limits import (
    LINGER_SECONDS,
    MAX_PIPELINED,
    STOPPING_SECONDS,
    TICK_SECONDS,
    WRITE_BUFFER_BYTES,
    RejectedError,
    Rejection,
)
from viralfx.server.response import Flow, ResponseCycle

LINGER_BYTES = 64 * 1024
"""Input that is discarded meanwhile; the server does not read more than this."""
FIRST_REQUEST_SECONDS = 0.5
"""A younger connection may have a request on its way when the server stops."""
_SMALL_HEAD, _SMALL_READ = 2048, 128
"""Size of a read that is parsed at once; larger ones, and several requests, take turns."""
_HEAD_END = b"\r\n\r\n"
_HEADS_SLICE, _MAX_SLICE = 1024, 16384
"""Size of a part with several heads, each of a whole request, and of any other part of a read."""
_QUEUED_BODY_BYTES = 4096
"""Maximum size of a body that waits behind an earlier request."""
_HIGH_WATER = 65536
"""Size of an unread body at which the server pauses reading."""

# The part of a message that is being read: none, its head, or its body with the trailers.
NOTHING, HEAD, BODY = range(3)

NO_HEADERS: list[tuple[bytes, bytes]] = []
_WHITE_SPACE = b" \t"
"""Optional white space around the value of a header, and no part of it (RFC 9110, 5.5)."""
_ODD = frozenset({b"content-length", b"transfer-encoding", b"expect", b"upgrade"})
"""Headers with which a request cannot be served as a fast probe."""


class HttpConnection(HttpToolsProtocol):
    """A connection that enforces the limits of its server."""

    registry: Connections
    """All connections of the server, this one included."""
    may_parse = True
    waits_for_application = False
    cycle: ResponseCycle
    pipeline: deque[tuple[ResponseCycle, Any]]  # type: ignore[assignment]

    # In slots, so that the instance dictionary of the base class stays small and shared.
    __slots__ = (
        "_abort_reason",
        "_began",
        "_discarded",
        "_discarding",
        "_ends_body",
        "_expected_since",
        "_host",
        "_hosts",
        "_idle_since",
        "_last",
        "_messages",
        "_odd",
        "_padding",
        "_probe",
        "_progress",
        "_read",
        "_reading",
        "_rejection",
        "_running",
        "_stopping",
        "_task",
        "_trailers",
        "_unfinished",
        "_upgrading",
        "_used",
        "_version_at",
        "sent_at",
        "sent_bytes",
        "tick",
    )

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.tick = -1
        self._reading = NOTHING
        self._used = False
        """Whether the connection has had a request."""
        self._began = False
        """Whether the timeout of the current head is running."""
        self._progress = False
        """Whether the current bytes completed a head, a part of a body, or a message."""
        self._read = self._messages = 0
        self._version_at = -1
        """Position of the first HTTP/1.1 in a read that begins with a request; -1: none."""
        self._unfinished = 0
        """Bytes that the parser buffers of a head, of trailers, or of chunk extensions."""
        self._expected_since = self.sent_at = 0.0
        """Start of the timeout of the current head or body."""
        self._idle_since = self.registry.now
        self._hosts = self._padding = self._trailers = self._discarded = 0
        self.sent_bytes, self._host = -1, b""
        self._odd = self._upgrading = False
        self._stopping = self._last = self._discarding = self._ends_body = False
        self._probe: tuple[Probe, bytes] | None = None
        self._abort_reason: Rejection | None = None
        """The reason why a callback aborted the parser."""
        self._rejection: Rejection | None = None
        """The reason why nothing more is read; its response follows the pending ones."""
        self._task: asyncio.Task[None] | None = None
        self._running: ResponseCycle | None = None
        """The request that the application is handling."""

    # -- the connection --------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timeout of the first request."""
        self.connections.add(self)
        self.transport = transport
        self.flow = Flow(self, transport)
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        self.server = get_local_addr(transport)
        self.client = get_remote_addr(transport)
        self.scheme = "https" if is_ssl(transport) else "http"
        self._expected_since = monotonic()
        self.registry.add(self, self._expected_since + self.registry.limits.head_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """Release the buffers of the connection, and notify unanswered requests."""
        connections = self.registry
        connections.remove(self)
        connections.open -= 1
        connections.queued -= len(self.pipeline)
        self._hold(0)
        running = self._running
        for cycle, _ in self.pipeline:
            cycle.release()
        if running is not None:
            running.release()
            if not running.response_complete:
                running.disconnect()
        self.pipeline.clear()
        super().connection_lost(exc)
        # No reference cycle, so that the request is freed without the garbage collector.
        self.cycle = self._running = self._task = None  # type: ignore[assignment]

    def reject_unfinished(self) -> None:
        """End a request whose client did not send its body, or did not read its response."""
        if self.transport.get_write_buffer_size():
            self.registry.check_sending(self, monotonic(), LINGER_SECONDS, Rejection.SEND_TIMEOUT)
        elif self._reading == BODY and self._busy():
            if self in self.registry.backlogs and not self._ends_body:
                self._ends_body = True  # the end of the body may have arrived
            else:
                self._reject(Rejection.BODY_TIMEOUT)

    def idle_since(self) -> float | None:
        """Return the monotonic time since which the client owes something, or None."""
        if self.transport.get_write_buffer_size():
            return max(self.sent_at, self._expected_since)
        if self._reading == BODY and not self._busy():
            return self._idle_since
        if self._reading == BODY and self._waits_for_body():
            return self._expected_since
        if self._busy() or self in self.registry.backlogs:
            return None
        return self._expected_since if self._reading == HEAD or not self._used else self._idle_since

    def _busy(self) -> bool:
        """Return True while a request is unanswered."""
        cycle: ResponseCycle | None = self.cycle
        return cycle is not None and not cycle.response_complete

    def _unset_keepalive_if_required(self) -> None:
        """Do nothing, because :class:`Connections` has the deadlines."""

    # -- deadlines -------------------------------------------------------------------------------

    def check_deadline(self, now: float) -> float:
        """Close the connection if a deadline is over; return the time of the next check."""
        limits = self.registry.limits
        if self.transport.get_write_buffer_size():
            return self._check_sending(now)
        if self._discarding:
            self.transport.abort()
        if self.transport.is_closing() or self._rejection is not None:
            return now + limits.keep_alive_timeout
        if self in self.registry.backlogs:
            return now + TICK_SECONDS
        if self._reading == BODY and self._waits_for_body():
            silence = limits.body_timeout
            if self._stopping:
                silence = min(silence, STOPPING_SECONDS)
            overdue, rejection = self._expected_since + silence, Rejection.BODY_TIMEOUT
        elif self._busy() or self._reading == BODY:
            return now + min(limits.body_timeout, limits.keep_alive_timeout)
        elif self._reading == HEAD or not self._used:
            overdue = self._expected_since + limits.head_timeout
            received = self._reading == HEAD or self._unfinished
            rejection = Rejection.HEAD_TIMEOUT if received else Rejection.SILENT
        else:
            # Idle time is measured in ticks, so one tick more prevents closing too early.
            overdue = self._idle_since + limits.keep_alive_timeout + TICK_SECONDS
            rejection = Rejection.KEEP_ALIVE_TIMEOUT
        if now < overdue:
            return overdue
        self._reject(rejection)
        return now + LINGER_SECONDS

    def _check_sending(self, now: float) -> float:
        if self._discarding:
            return self.registry.check_sending(self, now, LINGER_SECONDS, None)
        timeout = self.registry.limits.keep_alive_timeout
        if self._stopping:
            timeout = min(timeout, STOPPING_SECONDS)
        return self.registry.check_sending(self, now, timeout, Rejection.SEND_TIMEOUT)

    def _waits_for_body(self) -> bool:
        """Return True if the client must send; False while the application must read."""
        cycle: ResponseCycle | None = self.cycle
        waits_for_100 = cycle is not None and cycle.waiting_for_100_continue
        return not (self.flow.read_paused or waits_for_100 or self in self.registry.backlogs)

    def _expect_head(self) -> None:
        self._expected_since = monotonic()
        self.registry.check_at(self, self._expected_since + self.registry.limits.head_timeout)

    # -- reading ---------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Parse bytes, and serve the requests that they complete."""
        if self._rejection is not None or self._discarding:
            self._discard(len(data))
            return
        if self in self.registry.backlogs:
            self._keep_rest(data)
            return
        self._messages = 0
        if self._is_small(data):
            begins = self._reading == NOTHING
            self._version_at = data.find(b" HTTP/1.1\r\n") if begins else -1
            self._feed(data)
            return
        self._version_at = -1
        view, start = memoryview(data), 0
        while start < len(data):
            if not self.registry.backlogs.has_time():
                self._keep_rest(view[start:])
                return
            end = start + self.slice_size(data, start)
            if not self._feed(view[start:end]):
                return
            start = end

    def _is_small(self, data: bytes) -> bool:
        """Return True for a read that holds little more than the rest of one message."""
        if self._reading == BODY:
            return len(data) <= _SMALL_READ
        end = data.find(_HEAD_END)
        return len(data) <= _SMALL_HEAD and (end < 0 or len(data) - end <= _SMALL_READ)

    def slice_size(self, data: bytes | bytearray, start: int = 0) -> int:
        """Return how many bytes from ``start`` to parse at once: a head, or several small ones."""
        if self._reading != BODY:
            end = data.find(_HEAD_END, start, start + _MAX_SLICE)
            if end >= 0:
                return max(end - start + len(_HEAD_END), _HEADS_SLICE)
        return _MAX_SLICE

    def _keep_rest(self, data: bytes | memoryview) -> None:
        if self.registry.backlogs.add(self, data):
            return
        if self._reading == BODY and not self._busy():
            self._linger()  # after the response
        else:
            self._reject(Rejection.REQUEST_MEMORY)

    def parse_slice(self, data: bytes) -> bool:
        """Parse a part of a large read; return False if the rest of it is to be dropped."""
        if self._rejection is not None or self._discarding:
            self._discard(len(data))
            return False
        return not self.transport.is_closing() and self._feed(data)

    def end_backlog(self) -> None:
        """Read on, unless the application must first read the body."""
        if self._ends_body and self._reading == BODY and self._busy():
            self._reject(Rejection.BODY_TIMEOUT)
        elif not self.flow.read_paused:
            self.transport.resume_reading()

    def abandon(self) -> None:
        """End the connection."""
        self.transport.abort()

    def _feed(self, data: bytes | memoryview) -> bool:
        """Parse a slice; return False if nothing more is to be parsed."""
        self._progress = False
        self._read = len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            return self._upgrade(bytes(data[upgrade.args[0] :]))
        except httptools.HttpParserError:
            if not self._last:
                self._reject(self._abort_reason or Rejection.INVALID)
            return False
        if self._reading == NOTHING and self._progress:
            if self._unfinished:
                self._hold(0)
            return True
        return self._keep_part()

    def _keep_part(self) -> bool:
        """Check the limits for a slice that ends within a message or has only empty lines."""
        connections = self.registry
        # If the slice completed something, the size of its rest is unknown, but small.
        self._hold(0 if self._progress else self._unfinished + self._read)
        if self._unfinished > connections.limits.max_head_bytes:
            self._reject(Rejection.HEAD_TOO_LARGE)
            return False
        if self._unfinished and not connections.may_buffer_heads(self._unfinished):
            self._reject(Rejection.HEAD_MEMORY)
            return False
        if self._reading == BODY:
            self._expected_since = monotonic()
            connections.check_at(self, self._expected_since + connections.limits.body_timeout)
        elif self._reading == HEAD and not self._began:
            self._began = True
            if self._used and not self._busy():
                self._expect_head()
        return True

    def _hold(self, unfinished: int) -> None:
        self.registry.head_bytes += unfinished - self._unfinished
        self._unfinished = unfinished

    def _upgrade(self, rest: bytes) -> bool:
        """Continue behind a head with ``Upgrade``; return False if nothing more is to be parsed.

        This class speaks no other protocol, so it ends the connection; ``rest`` is not read.
        """
        del rest
        self._reject(Rejection.INVALID)
        return False

    def _discard(self, length: int) -> None:
        self._discarded += length
        # Before the linger, an application with a pending response may have resumed reading.
        if not self._discarding or self._discarded > LINGER_BYTES:
            self.flow.pause_reading()

    # -- heads and bodies ------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Start a head."""
        if self._last or self._messages == MAX_PIPELINED:
            self._stop_parsing(Rejection.PIPELINED)
        self._messages += 1
        self._reading = HEAD
        self._began = self._odd = False
        self._hosts = self._padding = 0
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Store a header. Trailers are counted and dropped, so they never become headers."""
        if self._reading != HEAD:
            self._trailers += 1
            if self._trailers > self.registry.limits.max_headers:
                self._stop_parsing(Rejection.TOO_MANY_HEADERS)
            return
        name = name.lower()
        received = len(value)
        value = value.strip(_WHITE_SPACE)  # the parser leaves it at the end
        self._padding += received - len(value)
        if name == b"host":
            self._hosts += 1
            self._host = value
        elif name in _ODD:
            self._odd = True
            if name == b"expect" and value.lower() == b"100-continue":
                self.expect_100_continue = True
        headers = self.headers
        headers.append((name, value))
        if len(headers) > self.registry.limits.max_headers:
            self._stop_parsing(Rejection.TOO_MANY_HEADERS)

    def on_body(self, body: bytes) -> None:
        """Buffer body data for the application, unless the response is complete."""
        self._progress = True
        cycle, connections = self.cycle, self.registry
        if cycle.response_complete:
            return
        cycle.body += body
        cycle.hold(len(body))
        cycle.received += len(body)
        connections.receive(len(body))
        if not connections.may_buffer_requests(cycle.received):
            self._stop_parsing(Rejection.REQUEST_MEMORY)
        if cycle is not self._running and len(cycle.body) > _QUEUED_BODY_BYTES:
            # Until the earlier request ends, the data is not read and no timeout runs.
            self._stop_parsing(Rejection.PIPELINED)
        if len(cycle.body) > _HIGH_WATER:
            self.flow.pause_reading()
        cycle.message_event.set()

    def _stop_parsing(self, rejection: Rejection) -> NoReturn:
        self._abort_reason = rejection
        raise RejectedError

    # -- rejections ------------------------------------------------------------------------------

    def _reject(self, rejection: Rejection) -> None:
        """Send the response of a rejection after the pending ones, and close."""
        if self._rejection is not None:
            return
        self._rejection = rejection
        self.registry.reject(rejection, self.client[0] if self.client else None)
        self._hold(0)
        if self._reading == BODY and self._busy():
            self._abandon(self.cycle, rejection)
        self._forget_head()
        running = self._running
        if self.pipeline or (running is not None and not running.response_complete):
            self.flow.pause_reading()
        elif not self.transport.is_closing():
            self._send_rejection()

    def _forget_head(self) -> None:
        """Free the head, whose size the client chose."""
        self.headers = NO_HEADERS
        self.url = self._host = b""

    def _abandon(self, cycle: ResponseCycle, rejection: Rejection) -> None:
        """Disconnect the request whose body was being read."""
        cycle.release()
        scope: Any = cycle.scope
        scope[REJECTED_STATUS] = rejection.status
        cycle.waiting_for_100_continue = False  # nothing may follow the rejection
        self.cycle = None  # type: ignore[assignment]
        if cycle is not self._running:
            self.pipeline.popleft()
            self.registry.queued -= 1
            return
        cycle.disconnect()
        self._running = None
        if cycle.response_started:
            self.transport.close()

    def _send_rejection(self) -> None:
        rejection = self._rejection
        if rejection is None or not rejection.status:
            self.transport.close()
            return
        parts = (rejection.head, self.registry.server_head, b"\r\n", rejection.body)
        self.transport.write(b"".join(parts))
        self._linger()

    def _linger(self) -> None:
        """Close the sending side, and discard further input for a moment."""
        if self.transport.is_closing():
            return
        self._discarding = True
        self._discarded = 0
        self.flow.resume_reading()
        self.transport.write_eof()
        self.registry.check_at(self, monotonic() + LINGER_SECONDS)
