"""The HTTP/1.1 protocol of a connection: uvicorn's, with limits, fast probes and fast responses.

This is a subclass of uvicorn's httptools protocol (ADR-0035). The parser and the ASGI side are
uvicorn's. The code between them is here, because it enforces the limits that protect the process.

WebSocket connections are uvicorn's, too, with the limits of :mod:`viralfx.server.websocket`.
"""

import asyncio
import re
import urllib.parse
from collections import deque
from collections.abc import Iterable, Mapping
from functools import lru_cache
from time import monotonic
from typing import Any, NoReturn, cast

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.protocols.utils import get_local_addr, get_remote_addr, is_ssl
from uvicorn.server import ServerState

from viralfx.core.correlation import correlation_id_of
from viralfx.server.connections import Connections
from viralfx.server.interface import REJECTED_STATUS, ASGIApp, Probe, RawResponse, RequestsInFlight
from viralfx.server.limits import (
    LINGER_SECONDS,
    MAX_PIPELINED,
    MAX_QUEUED,
    STOPPING_SECONDS,
    TICK_SECONDS,
    WRITE_BUFFER_BYTES,
    RejectedError,
    Rejection,
)
from viralfx.server.response import Flow, ResponseCycle
from viralfx.server.websocket import limited_websocket_class

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


_MAX_HEADER_LINE = 8000
"""Maximum length of a line of a WebSocket handshake; the library truncates silently at 8192."""
_DROPPED_WITH_UPGRADE = frozenset({b"upgrade", b"http2-settings"})
_SMALL_REQUEST, _FEW_HEADERS = 4096, 40
"""Size and headers of a head that are covered by the memory planned for a connection."""
_HEADER_BYTES = 320
"""Memory of a header without its text: it is stored as bytes, and often as text as well."""
_READ = (b"GET", b"HEAD")
_VERSIONS = ("1.1", "1.0")
_CLOSE_HEADER = b"\r\nconnection: close\r\n\r\n"


def _head_bytes(headers: Iterable[tuple[bytes, bytes]]) -> int:
    """Return the size of headers on the wire."""
    return sum(len(name) + len(value) + len(b": \r\n") for name, value in headers)


_MAX_HOST_BYTES = 272
"""A DNS name has at most 255 bytes, and a port may follow."""
# RFC 3986, 3.2.2 and 3.2.3: a name, an IPv4 address or an IP literal, and a port.
_HOST = re.compile(
    rb"(?:(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*|\[[0-9A-Fa-fvV:.]+\])(?::[0-9]*)?"
).fullmatch


@lru_cache(maxsize=1024)
def _matches_host(value: bytes) -> bool:
    return _HOST(value) is not None


def _is_host(value: bytes) -> bool:
    """Return True for a valid value of the Host header."""
    # The length is checked first, so that clients cannot fill the cache with long values.
    return len(value) <= _MAX_HOST_BYTES and _matches_host(value)


class HttpProtocol(HttpToolsProtocol):
    """A connection that serves requests within the limits of its server.

    :func:`protocol_class` makes one class per server.
    """

    requests: RequestsInFlight
    probes: Mapping[bytes, Probe]
    """Endpoints that are served here, below ASGI, by the target in the request line."""
    websocket_class: type[asyncio.Protocol] | None
    direct: ASGIApp
    """The application, without a middleware of uvicorn."""

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

    # -- messages --------------------------------------------------------------------------------

    def on_headers_complete(self) -> None:
        """Serve the request as a fast probe, or pass it to the application."""
        self._progress = True
        if self._unfinished + self._read > self.registry.limits.max_head_bytes:
            self._require_size()
        method = self.parser.get_method()
        # Asking the parser for the version costs more than the whole rest of a probe.
        if self._messages == 1 and self._version_at == len(method) + 1 + len(self.url):
            version = "1.1"
        else:
            version = self.parser.get_http_version()
        if self._hosts != 1 or not _is_host(self._host):
            self._require_no_host(version)
        endpoint = self.probes.get(self.url)
        if (
            endpoint is not None
            and not self._odd
            and method in _READ
            and version == "1.1"
            and not self._busy()
            and not self.flow.write_paused
        ):
            self._probe = endpoint, method
        else:
            self._begin(method.decode("ascii"), version)

    def on_message_complete(self) -> None:
        """Finish a request."""
        self._progress = True
        if self._upgrading:
            return
        self._reading = NOTHING
        self._used = True
        if self._probe is not None:
            self._serve_probe(*self._probe)
        elif self.cycle.response_complete:
            self._forget_request()
        else:
            self.cycle.more_body = False
            self.cycle.message_event.set()

    def _require_size(self) -> None:
        line = len(self.parser.get_method()) + len(self.url) + len(b"  HTTP/1.1\r\n\r\n")
        size = line + _head_bytes(self.headers) + self._padding
        if size > self.registry.limits.max_head_bytes:
            self._stop_parsing(Rejection.HEAD_TOO_LARGE)

    def _require_no_host(self, version: str) -> None:
        # RFC 9112, 3.2: Host is required in HTTP/1.1, and must be valid in any version.
        if self._hosts or version == "1.1":
            self._stop_parsing(Rejection.HOST)

    def _require_coding(self) -> None:
        # RFC 9112, 6.1. Without its coding, an application would read a compressed body as text.
        # If the last one is not chunked, the parser finds no end of the body, and rejects it.
        values = (value for name, value in self.headers if name == b"transfer-encoding")
        codings = [each.strip().lower() for value in values for each in value.split(b",")]
        if codings and codings[-1] == b"chunked" and set(codings) - {b"chunked", b""}:
            self._stop_parsing(Rejection.CODING)

    # -- requests --------------------------------------------------------------------------------

    def _serve_probe(self, endpoint: Probe, method: bytes) -> None:
        """Write the same bytes as the gate would send."""
        self._probe = None
        try:
            response = endpoint(method.decode("ascii"), b"", self.headers)
        except Exception:  # noqa: BLE001 - the gate repeats the call and logs the error
            response = None
        if type(response) is not RawResponse:
            # A denial or a pending response: the gate can log and wait.
            self._begin(method.decode("ascii"), "1.1")
            self._reading = NOTHING
            self.cycle.more_body = False
            self.cycle.message_event.set()
            return
        close = self._stopping or self.requests.stopping or not self.parser.should_keep_alive()
        correlation_id = correlation_id_of(self.headers).encode("ascii")
        end = _CLOSE_HEADER if close else b"\r\n\r\n"
        body = response.body if method == b"GET" else b""
        self.transport.write(
            b"%b%b%bx-correlation-id: %b%b%b"
            % (
                STATUS_LINE[response.status],
                self.registry.server_head,
                response.head,
                correlation_id,
                end,
                body,
            )
        )
        self._forget_request()
        if close:
            self._last = True
            self.transport.close()

    def _begin(self, method: str, version: str) -> None:
        """Pass a request to the application, or queue it behind an earlier one."""
        parser = self.parser
        if version not in _VERSIONS or method == "CONNECT":
            self._stop_parsing(Rejection.INVALID)
        if self._odd:
            self._require_coding()
        if parser.should_upgrade():
            self._upgrading = True
            return
        waits = self._busy() or self.flow.write_paused
        if waits and (
            len(self.pipeline) + 1 >= MAX_PIPELINED or self.registry.queued >= MAX_QUEUED
        ):
            self._stop_parsing(Rejection.PIPELINED)
        size = self._unfinished + self._read
        if len(self.headers) > _FEW_HEADERS:
            size += _HEADER_BYTES * len(self.headers)
        if size > _SMALL_REQUEST and not self.registry.may_buffer_requests(size):
            self._stop_parsing(Rejection.REQUEST_MEMORY)
        raw_path, query = _split(self.url)
        path = raw_path.decode("ascii")
        if "%" in path:
            path = urllib.parse.unquote(path)
        scope: Any = {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": version,
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "method": method,
            "root_path": "",
            "path": path,
            "raw_path": raw_path,
            "query_string": query,
            "headers": self.headers,
            "state": self.app_state.copy(),
        }
        transport: Any = _BodyTransport(self) if self._odd else self.transport
        app: Any = self.direct
        self.cycle = cycle = ResponseCycle(
            scope=scope,
            transport=transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue and version == "1.1",
            keep_alive=version == "1.1" and not self._stopping and parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        cycle.connections = self.registry
        if size > _SMALL_REQUEST:
            cycle.hold(size)
        self._reading = BODY
        self._trailers = 0
        if waits:
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, app))
            self.registry.queued += 1
        else:
            self._running = cycle
            self._start_asgi_task(cycle, app)

    def _start_asgi_task(  # type: ignore[override]
        self, cycle: ResponseCycle, app: Any
    ) -> None:
        # Without uvicorn's done callback: this reference and the gate's keep the task alive.
        self._task = self.loop.create_task(cycle.run_asgi(app))

    def on_response_complete(self) -> None:
        """After a response of the application, continue with the next request or wait for one."""
        self.server_state.total_requests += 1
        if self._running is not None:
            self._running.release()
        if self.transport.is_closing() or self._discarding:
            return
        self._running = None
        if self.pipeline:
            # No further data is read until the queued requests are answered.
            self._run_next()
            return
        self.flow.resume_reading()
        if self._rejection is not None:
            self._send_rejection()
            return
        if self._reading == NOTHING:
            self._forget_request()
        elif self._reading == BODY:
            # The rest of the body is dropped as it arrives.
            self.cycle = cast("ResponseCycle", _RESPONDED)
            self._idle_since = self.registry.now
            self._forget_head()
        else:
            self._idle_since = self.registry.now
            self._expect_head()

    def shutdown(self) -> None:
        """Close the connection after the pending responses."""
        self._stopping = True
        if self.transport.get_write_buffer_size():
            self.registry.check_at(self, monotonic())
        elif self._reading == BODY:
            self.registry.check_at(self, monotonic() + STOPPING_SECONDS)
        if self._busy():
            self.cycle.keep_alive = False
        elif not self.may_have_request():
            self.transport.close()

    def may_have_request(self) -> bool:
        """Return True if a request may arrive that the client sent before the stop."""
        if self.transport.is_closing() or self._discarding or self._busy():
            return False
        if self._reading != NOTHING or self in self.registry.backlogs:
            return True
        return not self._used and monotonic() < self._expected_since + FIRST_REQUEST_SECONDS

    def restart_body_timeout(self) -> None:
        """Restart the timeout of the body."""
        if self._reading == BODY:
            self._expected_since = monotonic()

    def close_after_response(self) -> None:
        """Close the connection after a response, without losing the response.

        Closing a socket with unread input resets it, and the client may not see the response. So
        the rest of a body is discarded for a moment.
        """
        if self._reading == BODY and not self.transport.is_closing():
            self._linger()
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        """Hold back the responses, because the client does not read."""
        super().pause_writing()
        self.registry.pause_writing(self)

    def resume_writing(self) -> None:
        """Continue with the responses."""
        super().resume_writing()
        self.registry.resume_writing(self)
        self._run_next()

    def _run_next(self) -> None:
        """Run the next waiting request, unless the client must read an earlier response first."""
        waits = self.flow.write_paused or self.transport.is_closing()
        if self.pipeline and self._running is None and not waits:
            self._running, app = self.pipeline.pop()
            self.registry.queued -= 1
            self._start_asgi_task(self._running, app)

    def _forget_request(self) -> None:
        """Free the data of a request on an idle connection."""
        self._idle_since = self.registry.now
        self.cycle = None  # type: ignore[assignment]
        self._forget_head()

    # -- upgrades --------------------------------------------------------------------------------

    def _upgrade(self, rest: bytes) -> bool:
        """Open a WebSocket; for any other upgrade, serve the request as an ordinary one.

        After a head with ``Upgrade`` the parser stops, although a body may follow. So the head is
        parsed again without the header, and the body after it.
        """
        self._upgrading = False
        if self._wants_websocket():
            longest_line = max(len(name) + len(value) for name, value in self.headers)
            if max(longest_line, len(self.url)) > _MAX_HEADER_LINE:
                self._reject(Rejection.HEAD_TOO_LARGE)
            elif (target := _origin_form(self.url)) is None:
                self._reject(Rejection.INVALID)
            else:
                self.url = target
                self._open_websocket()
            return False
        protocol = next((value for name, value in self.headers if name == b"upgrade"), b"")
        self.registry.ignore_upgrade(protocol[:32].decode("latin-1"))
        head = self._head(without=_DROPPED_WITH_UPGRADE)
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._messages -= 1
        return self._feed(head + rest)

    def _wants_websocket(self) -> bool:
        if self.websocket_class is None or self._busy() or self.parser.get_method() != b"GET":
            return False
        # A server ignores ``Upgrade`` in a request of HTTP/1.0 (RFC 9110, 7.8).
        if self.parser.get_http_version() != "1.1":
            return False
        names = {name for name, _ in self.headers}
        if b"content-length" in names or b"transfer-encoding" in names:
            return False
        return self._get_upgrade() == b"websocket"

    def _open_websocket(self) -> None:
        self.connections.discard(self)
        self.registry.remove(self)
        self._hold(0)
        assert self.websocket_class is not None  # noqa: S101 - narrows for the type checker
        protocol: Any = self.websocket_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.app_state
        )
        protocol.connection_made(self.transport)
        self.transport.set_protocol(protocol)
        if self.flow.write_paused:  # by an earlier response; the transport says so only once
            protocol.pause_writing()
        protocol.data_received(self._head())

    def _head(self, *, without: frozenset[bytes] = frozenset()) -> bytes:
        """Return the current head as bytes, without some headers and their connection options."""
        version = self.parser.get_http_version().encode("ascii")
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        for name, value in self.headers:
            if name in without:
                continue
            if name == b"connection" and without:
                options = [option.strip() for option in value.split(b",")]
                kept = b", ".join(option for option in options if option.lower() not in without)
                if not kept:
                    continue
                lines.append(b"connection: " + kept)
            else:
                lines.append(name + b": " + value)
        return b"\r\n".join(lines) + b"\r\n\r\n"


class _RespondedCycle:
    """Placeholder for a request with a complete response whose body is still arriving."""

    response_complete = True
    waiting_for_100_continue = False

    def __init__(self) -> None:
        self.message_event = asyncio.Event()
        self.disconnected = False


_RESPONDED = _RespondedCycle()


class _BodyTransport:
    """The transport of a request with a body; closing it does not lose the response."""

    __slots__ = ("_protocol", "abort", "is_closing", "write")

    def __init__(self, protocol: HttpProtocol) -> None:
        self._protocol = protocol
        self.abort = protocol.transport.abort
        self.write = protocol.transport.write
        self.is_closing = protocol.transport.is_closing

    def close(self) -> None:
        self._protocol.close_after_response()


def _split(target: bytes) -> tuple[bytes, bytes]:
    """Return path and query of a request's target. Raises httptools' error for an invalid one."""
    if target.startswith(b"/") and b"#" not in target and target.isascii():
        path, _, query = target.partition(b"?")
        return path, query
    url = httptools.parse_url(target)
    return url.path or b"/", url.query or b""


def _origin_form(target: bytes) -> bytes | None:
    """Return a target without scheme and host, as WebSocket libraries need it; None: invalid."""
    try:
        path, query = _split(target)
    except httptools.HttpParserError:
        return None
    return path + b"?" + query if query else path


def protocol_class(
    connections: Connections,
    requests: RequestsInFlight,
    probes: Mapping[bytes, Probe],
    websocket_class: type[asyncio.Protocol] | None,
    direct: ASGIApp,
) -> type[HttpProtocol]:
    """Return the protocol class of one server.

    ``connections`` counts HTTP and WebSocket connections. ``probes`` are served below ASGI, by the
    target in the request line. ``direct`` is the application.
    """

    class Connection(HttpProtocol):
        __slots__ = ()

    Connection.registry = connections
    Connection.requests = requests
    Connection.probes = probes
    Connection.direct = staticmethod(direct)
    Connection.websocket_class = websocket_class and limited_websocket_class(
        websocket_class, connections
    )
    return Connection
