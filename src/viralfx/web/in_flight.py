"""Requests in flight: counting, the shutdown event, cancellation, and the record of their end."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from time import perf_counter, time
from typing import Any
from urllib.parse import unquote

from viralfx.core.clock import Clock, finished_within, ignore_error, wait_for
from viralfx.core.correlation import HEADER, current_correlation_id, current_user_id
from viralfx.core.errors import WorkLostError
from viralfx.server.interface import IN_FLIGHT, REJECTED_STATUS, Message, Receive, Scope, Send
from viralfx.telemetry import (
    CLIENT_DISCONNECTED,
    METHODS,
    OTHER,
    TRACE,
    UNMATCHED,
    WEBSOCKET,
    EndedRequest,
    current_trace,
)
from viralfx.telemetry.logging.lines import AccessLog
from viralfx.telemetry.metrics.requests import RequestMetrics
from viralfx.web.error_log import log_error, log_escaped, note_disconnect
from viralfx.web.responses import CLOSE

_logger = logging.getLogger("viralfx.requests")

_FIRST_STATUS, _LAST_STATUS = 100, 599
_FIRST_FAILURE = 400
_SERVER_ERROR = 500  # a number, because a look-up in HTTPStatus costs more than the comparison
_SWITCHING = 101
_FORBIDDEN = 403
_NORMAL, _NO_CODE, _ABNORMAL, _INTERNAL_ERROR = 1000, 1005, 1006, 1011
"""Close codes of RFC 6455; the second and third stand for a missing code and a missing frame."""
_SHUTDOWN_EVENT = b"event: shutdown\ndata: {}\n\n"
_MAX_CANCEL_SECONDS = 0.5
"""Part of the drain budget that is reserved for cancelling requests."""
_DISCONNECT_WAIT_SECONDS = 0.01
_NO_OPTIONS: dict[str, object] = {}


class InFlightRequest:
    """One request and the state of its response; also the ``send`` of its application."""

    started = False
    """Whether the response has started, or the WebSocket was accepted."""
    complete = False
    """Whether the application has sent the whole response; the client may not have read it yet."""
    event_stream = False
    """Whether the response is an event stream, which lasts as long as its client stays."""
    accepts_events = False
    """Whether the server can add events to the stream; False for a compressed one."""
    has_length = False
    """Whether the response has a ``Content-Length``, so that cancelling it truncates the body."""
    status: int | None = None
    """The status of the response once it has started; None for an invalid or unsent status."""
    sent = 0
    """Bytes of the response body or of the messages that the application has sent."""
    received = 0
    """Bytes of the messages that the client has sent over a WebSocket."""
    close_code: int | None = None
    """The close code of a WebSocket; None until one side closes it."""
    cut = False
    """Whether the drain cancelled the request because its budget was used up."""
    disconnected = False
    """Whether the client disconnected before the end of the response.

    Only the server of ``viralfx serve`` notices this while the handler runs.
    """
    cancelled_for_client = False
    """Whether the request was cancelled because its client disconnected."""
    _encoded = False
    _at_boundary = True  # the position after the headers is an event boundary
    _shutdown_sent = False

    def __init__(
        self,
        requests: "InFlightRequests",
        scope: Scope,
        receive: Receive,
        send: Send,
        header: tuple[bytes, bytes],
    ) -> None:
        self.scope = scope
        self.websocket = scope["type"] == "websocket"
        self.started_at = perf_counter()
        self.task: asyncio.Task[object] | None = asyncio.current_task(requests.loop)
        self._requests = requests
        self.header = header
        self._receive = receive
        self._send = send
        scope[IN_FLIGHT] = self

    def on_disconnect(self) -> None:
        """Record that the client has disconnected, and cancel the handler if it opted in.

        A Litestar handler opts in with ``cancel_on_disconnect=True``.
        """
        scope = self.scope
        if REJECTED_STATUS not in scope:
            self.disconnected = True
            scope[CLIENT_DISCONNECTED] = True
        handler = scope.get("route_handler")
        opted_in = getattr(handler, "opt", _NO_OPTIONS).get("cancel_on_disconnect")
        if opted_in and self.task is not None and not self.complete:
            self.cancelled_for_client = True
            self.task.cancel()

    @property
    def cancelling_loses_response(self) -> bool:
        """True if the response has not started, or has a Content-Length and is incomplete."""
        if self.websocket or self.complete:
            return False
        return not self.started or self.has_length

    async def client_disconnected(self, clock: Clock) -> bool:
        """Return True if the client has closed the connection.

        Call this only for a request that is about to be cancelled: it consumes one ASGI message, so
        an unread request body would be lost.
        """
        received = asyncio.ensure_future(self._receive())
        try:
            if not await finished_within(received, _DISCONNECT_WAIT_SECONDS, clock):
                return False
            return received.exception() is None and received.result()["type"] == "http.disconnect"
        finally:
            received.cancel()

    def send(self, message: Message) -> Awaitable[None]:
        """Forward a message to the server, and add the correlation id to the first one."""
        kind = message["type"]
        if kind == "http.response.body":
            self.sent += len(message.get("body", b""))
            if self.accepts_events:
                return self._send_events(message)
            self.complete = not message.get("more_body", False)
        elif kind == "http.response.start":
            message = self._start_response(message)
        elif kind == "http.response.pathsend":
            self.complete = True  # the server sends a file as the whole body
        return self._send(message)

    def send_websocket(self, message: Message) -> Awaitable[None]:
        """Forward a message of a WebSocket to the server, and record it."""
        kind = message["type"]
        if kind == "websocket.send":
            self.sent += _size(message)
        elif kind == "websocket.accept":
            self.started, self.status = True, _SWITCHING
            self._note_trace()
            # A new message: an application may send the same one for each of its WebSockets.
            message = {**message, "headers": [*message.get("headers", ()), self.header]}
        elif kind == "websocket.close":
            if self.disconnected or CLIENT_DISCONNECTED in self.scope:
                # A framework closes the WebSocket after a disconnect, and the server would raise.
                return self._read_disconnect()
            if not self.started:
                self.status = _FORBIDDEN  # the server's response to a WebSocket that is rejected
            elif self.close_code is None:
                self.close_code = message.get("code") or _NORMAL
        elif kind == "websocket.http.response.start":
            self.status = int(message["status"])
        return self._send(message)

    async def receive_websocket(self) -> Message:
        """Forward a WebSocket message to the application, and record its size or a disconnect."""
        message = await self._receive()
        kind = message["type"]
        if kind == "websocket.receive":
            self.received += _size(message)
        elif kind == "websocket.disconnect":
            self.disconnected = True
            if self.started and self.close_code is None:
                self.close_code = message.get("code") or _NO_CODE
        return message

    async def _read_disconnect(self) -> None:
        """Read the close code of a client, which the application has noticed by an error."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_DISCONNECT_WAIT_SECONDS):
                while not self.disconnected:
                    await self.receive_websocket()

    async def _send_events(self, message: Message) -> None:
        await self._send(message)
        self.complete = not message.get("more_body", False)
        self._at_boundary = message.get("body", b"").endswith((b"\n\n", b"\r\n\r\n"))
        if self._requests.shutdown_announced:
            await self.send_shutdown_event()

    def _note_trace(self) -> None:
        """Keep the ids of a span that the application made itself: it ends before the record."""
        if TRACE not in self.scope and (trace := current_trace()) is not None:
            self.scope[TRACE] = trace

    def _start_response(self, message: Message) -> Message:
        self._note_trace()
        status = int(message["status"])  # the label of an enumeration member would be its name
        # Servers send no other status, even if an application derives one from client input.
        self.status = status if _FIRST_STATUS <= status <= _LAST_STATUS else None
        if self.disconnected or status >= _FIRST_FAILURE:
            self._record_failure(status)
        stopping, headers = self._requests.stopping, [self.header]
        # Read once: headers, and a header itself, may be any iterable, so also a generator.
        for name, value in message.get("headers", ()):
            if name == b"content-length":
                self.has_length = True
            elif name == b"content-type":
                # A failed request has no event stream, even with the content type of one.
                if status < _FIRST_FAILURE and value.startswith(b"text/event-stream"):
                    self.event_stream = True
            elif name == b"content-encoding":
                self._encoded = True
            elif name == HEADER or (stopping and name == b"connection"):
                continue
            headers.append((name, value))
        # A plain-text event would corrupt a compressed stream.
        self.accepts_events = self.event_stream and not self._encoded
        if stopping:
            headers.append(CLOSE)
        self.started = True  # not before: an invalid header is an error without a response
        # A new message: an application may send the same one for each request, and servers keep it
        # while a client reads slowly.
        return {**message, "headers": headers}

    def _record_failure(self, status: int) -> None:
        """Clear the status if no client receives it, and log the error behind a 500."""
        if self.scope.get(CLIENT_DISCONNECTED):
            self.status = None
        elif status == _SERVER_ERROR:
            log_error(self.scope)

    def record_error(self, error: Exception) -> None:
        """Record an exception that the application did not turn into a response."""
        if self.websocket and not note_disconnect(error, self.scope):
            if not self.started:
                self.status = _SERVER_ERROR
            elif self.close_code is None:
                self.close_code = _INTERNAL_ERROR
            return
        log_escaped(error, self.scope)
        if not self.started and not self.scope.get(CLIENT_DISCONNECTED):
            # The server answers with its own 500.
            self.status, self.complete = _SERVER_ERROR, True

    async def send_shutdown_event(self) -> None:
        """Send the event ``shutdown`` once, if the stream is between two events."""
        if (
            self.accepts_events
            and self._at_boundary
            and not self.complete
            and not self._shutdown_sent
        ):
            self._shutdown_sent = True
            message = {"type": "http.response.body", "body": _SHUTDOWN_EVENT, "more_body": True}
            await self._send(message)


def _size(message: Message) -> int:
    """Return the bytes of a WebSocket message; servers may leave the other key out or None."""
    if (data := message.get("bytes")) is not None:
        return len(data)
    text: str = message.get("text") or ""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


class InFlightRequests:
    """All requests in flight through one gate. Probes are not included."""

    def __init__(self, on_end: Callable[[InFlightRequest], None] | None = None) -> None:
        """``on_end`` is called with each request whose application has returned."""
        self._on_end = on_end
        self._open: set[InFlightRequest] = set()
        self._announcements: set[asyncio.Task[None]] = set()
        self._drained: asyncio.Event | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        """The event loop of the requests. Python 3.11 makes a system call to find it each time."""
        self.stopping = False
        """Whether the shutdown has begun. If so, responses carry ``Connection: close``."""
        self.shutdown_announced = False
        """Whether event streams receive the event ``shutdown``."""

    def __len__(self) -> int:
        return len(self._open)

    def begin(
        self, scope: Scope, receive: Receive, send: Send, header: tuple[bytes, bytes]
    ) -> InFlightRequest:
        """Add a request. ``header`` is the correlation id for its response."""
        if self.loop is None:
            self.loop = asyncio.get_running_loop()
        request = InFlightRequest(self, scope, receive, send, header)
        self._open.add(request)
        return request

    def end(self, request: InFlightRequest) -> None:
        """Remove a request whose application has returned."""
        self._open.discard(request)
        # Breaks a reference cycle, so that the request is freed without the garbage collector.
        request.scope.pop(IN_FLIGHT, None)
        if self._drained is not None and not self._open:
            self._drained.set()
        if self._on_end is not None:
            self._on_end(request)

    def announce_shutdown(self) -> None:
        """Send the event ``shutdown`` on all event streams, now or at their next boundary."""
        self.shutdown_announced = True
        for request in self._open:
            if request.accepts_events:
                # In tasks: a client that does not read would delay all others.
                task = asyncio.create_task(request.send_shutdown_event())
                self._announcements.add(task)
                task.add_done_callback(self._on_announced)

    def _on_announced(self, task: asyncio.Task[None]) -> None:
        self._announcements.discard(task)
        # The stream may have ended in the meantime; that is not an error of the service.
        ignore_error(task)

    async def drain(
        self, budget: float, clock: Clock, *, before_cut: Callable[[], None] = lambda: None
    ) -> None:
        """Wait up to ``budget`` seconds for the requests, then cancel the rest.

        ``before_cut`` is called twice before. Raises :class:`WorkLostError` if a cancelled request
        had no response, or an incomplete one with a ``Content-Length``. Streams without a known end
        are cancelled silently.
        """
        reserve = min(_MAX_CANCEL_SECONDS, budget / 10)
        if await self._wait_until_empty(budget - reserve, clock):
            return
        for _ in range(2):  # once for what has arrived, then for all
            before_cut()
            if await self._wait_until_empty(reserve / 4, clock):
                return
        remaining = list(self._open)
        lost = [
            request
            for request in remaining
            if request.cancelling_loses_response
            and not request.disconnected
            and not await request.client_disconnected(clock)
        ]
        extra = {"unanswered": len(lost), "streams": len(remaining) - len(lost)}
        _logger.warning("Cutting requests", extra=extra)
        for task in self._announcements:
            task.cancel()
        for request in remaining:
            request.cut = True
            if request.task is not None:
                request.task.cancel()
        await self._wait_until_empty(reserve / 2, clock)
        if lost:
            raise WorkLostError(f"{len(lost)} requests had no complete response in {budget:g} s")

    async def _wait_until_empty(self, seconds: float, clock: Clock) -> bool:
        if not self._open:
            return True
        self._drained = asyncio.Event()
        return await wait_for(self._drained, seconds, clock)


_MAX_LENGTH_DIGITS = 20
"""A ``Content-Length`` with this many digits or more is ignored; no request is that large."""
ROUTE = "viralfx.route"
"""The scope key by which an application names the route of a request itself."""


def route_of(scope: Mapping[str, Any]) -> str | None:
    """Return the path template of the route that serves a request; None if no route is known.

    Litestar, FastAPI and Starlette put it into the scope; an application of another framework sets
    ``scope["viralfx.route"]``. For an application that Litestar mounts it is the path of the mount.
    """
    return (
        scope.get("path_template")
        or _text(scope.get(ROUTE))
        or _mount_path(scope)
        or _starlette_path(scope)
    )


def _starlette_path(scope: Mapping[str, Any]) -> str | None:
    # A router of FastAPI that is included elsewhere keeps its own path in the route.
    included = scope.get("fastapi")
    if isinstance(included, Mapping):
        context = included.get("effective_route_context")
        if path := _text(getattr(context, "path", None)):
            return path
    # Without the path of a mount: its parameters are replaced by values of the client.
    return _text(getattr(scope.get("route"), "path", None))


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _mount_path(scope: Mapping[str, Any]) -> str | None:
    handler, app = scope.get("route_handler"), scope.get("litestar_app")
    if handler is None or app is None:
        return None
    # A handler may be mounted at several paths; the longest one that the request begins with wins.
    paths = [each.path for each in app.routes if getattr(each, "route_handler", None) is handler]
    requested = unquote((scope.get("raw_path") or b"").decode("latin-1"))
    matching = [path for path in paths if requested.startswith(path)]
    return max(matching, key=len) if matching else next(iter(paths), None)


class RequestRecorder:
    """Counts the requests that an application answered, and logs each of them."""

    def __init__(self, metrics: RequestMetrics, *, access_log: bool) -> None:
        self._metrics = metrics
        self._access_log = AccessLog() if access_log else None

    def count_active(self, in_flight: Callable[[], int]) -> None:
        """Export the number of requests in flight, which ``in_flight`` returns."""
        self._metrics.count_active(in_flight)

    def record(self, request: InFlightRequest) -> None:
        """Record a request or a WebSocket whose application has returned."""
        if request.websocket:
            self._record_websocket(request)
            return
        scope = request.scope
        seconds = perf_counter() - request.started_at
        # Clients choose paths and methods, so labels are route templates and known methods only.
        # The first part of `route_of`, inline: this runs for each request.
        route = scope.get("path_template") or route_of(scope) or UNMATCHED
        method = scope["method"]
        if method not in METHODS:
            method = OTHER
        # If the server rejected the request, the client got that status, not the application's.
        rejected = scope.get(REJECTED_STATUS)
        status, trace = rejected or request.status, scope.get(TRACE)
        cut = status is None or request.disconnected or not (request.complete or rejected)
        if request.event_stream:
            self._metrics.count_stream(route)
        else:
            self._metrics.observe(method, route, status, seconds, trace, cut=cut)
        if (log := self._access_log) is not None and log.wanted():
            log.write(
                EndedRequest(
                    time(),
                    current_correlation_id(),
                    current_user_id(),
                    trace,
                    method,
                    route,
                    status,
                    seconds,
                    _content_length(scope["headers"]),
                    0 if status is None or rejected else request.sent,
                    cut,
                )
            )

    def _record_websocket(self, request: InFlightRequest) -> None:
        scope = request.scope
        route = route_of(scope) or UNMATCHED
        code = request.close_code
        if request.started and code is None:
            code = _ABNORMAL
        self._metrics.count_websocket(route, code, received=request.received, sent=request.sent)
        if (log := self._access_log) is not None and log.wanted():
            log.write(
                EndedRequest(
                    time(),
                    current_correlation_id(),
                    current_user_id(),
                    scope.get(TRACE),
                    WEBSOCKET,
                    route,
                    request.status,
                    perf_counter() - request.started_at,
                    request.received,
                    request.sent,
                    code == _ABNORMAL,
                    code,
                )
            )


def _content_length(headers: Iterable[tuple[bytes, bytes]]) -> int | None:
    for name, value in headers:
        if name == b"content-length":
            return int(value) if value.isdigit() and len(value) < _MAX_LENGTH_DIGITS else None
    return None
