"""The gate: the outermost ASGI wrapper, which answers probes and counts all other requests.

Because probes do not pass through the application, its middleware, routing and errors can neither
slow nor break them.
"""

import asyncio
from collections.abc import Mapping

from viralfx.core.correlation import HEADER, correlation_id_of, start_request_context
from viralfx.server.interface import (
    ASGIApp,
    Message,
    RawResponse,
    Receive,
    Scope,
    Send,
    mark_logged,
)
from viralfx.web.endpoints import OperationsEndpoints
from viralfx.web.in_flight import InFlightRequest, InFlightRequests, RequestRecorder
from viralfx.web.responses import (
    CLOSE,
    AnyResponse,
    Deferred,
    Endpoint,
    EventStream,
    complete,
    problem_response,
)

_EVENTS = (b"accept", b"text/event-stream")
"""The header with which each browser asks for an event stream."""


async def _nothing(_scope: Scope, _receive: Receive, _send: Send) -> None:
    """Ignore the lifespan events of a server without an application."""


class Gate:
    """Wraps an ASGI application; without one it serves the operations endpoints only."""

    def __init__(
        self,
        operations: OperationsEndpoints,
        app: ASGIApp | None = None,
        recorder: RequestRecorder | None = None,
    ) -> None:
        """Pass each request whose application has returned to ``recorder``."""
        self._operations = operations
        self._endpoints = operations.endpoints
        self._path_prefix = operations.path_prefix
        self._by_address = operations.asks_for_address
        self._proxies = operations.proxies
        self._alone = app is None
        self._app = _nothing if app is None else app
        self.requests = InFlightRequests(None if recorder is None else recorder.record)
        if recorder is not None:
            recorder.count_active(self.requests.__len__)
        # The console answers a caller on another machine, too, by a page with less on it.
        console = operations.console.endpoints if self._by_address and operations.console else {}
        self.probes: Mapping[bytes, Endpoint] = {
            path.encode(): endpoint
            for path, endpoint in self._endpoints.items()
            if path not in console
        }
        """The endpoints that a server may call itself, by the path in the request line.

        It may do so for a ``GET`` or ``HEAD`` without query and body, while the connection has no
        other request. If the result is not a :class:`RawResponse`, the gate must serve the request.
        """
        if app is not None:
            operations.count_requests(self.requests.__len__)
        self.open = False
        """Whether the application receives requests. If not, they get 503 and ``Retry-After``."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        kind, app = scope["type"], self._app
        if kind not in {"http", "websocket"}:
            await app(scope, receive, send)
            return
        if type(scope["headers"]) is not list:  # ASGI allows any iterable, also of one use
            scope["headers"] = list(scope["headers"])
        if self._proxies is not None:
            self._proxies.apply(scope)
        correlation_id = correlation_id_of(scope["headers"])
        start_request_context(correlation_id)
        header = (HEADER, correlation_id.encode("ascii"))
        response = None
        if kind == "http":
            response = self._respond(scope)
        elif self._alone or not self.open or self.requests.stopping:
            await receive()
            await self._reject_websocket(scope, send, header)
            return
        if response is not None:
            await self._send(response, scope, receive, send, header)
            return
        # Not in a method of its own: one more coroutine costs 1 % of an ordinary request.
        request = self.requests.begin(scope, receive, send, header)
        is_websocket = kind == "websocket"
        receive = request.receive_websocket if is_websocket else receive
        respond = request.send_websocket if is_websocket else request.send
        try:
            await app(scope, receive, respond)
        except asyncio.CancelledError as error:
            if not await self._end_cancelled(request, error, send):
                raise
        except Exception as error:
            request.record_error(error)
            raise
        finally:
            self.requests.end(request)

    async def _send(
        self,
        response: AnyResponse | Deferred,
        scope: Scope,
        receive: Receive,
        send: Send,
        header: tuple[bytes, bytes],
    ) -> None:
        if isinstance(response, Deferred):
            response = await response.respond()
        if isinstance(response, EventStream):
            await response.serve(scope, receive, send, header)
            return
        if not isinstance(response, RawResponse):
            response = await complete(response, scope, receive)
        start, body = self._messages(response, scope, header)
        await send(start)
        await send(body)

    def _respond(self, scope: Scope) -> AnyResponse | Deferred | None:
        """Return the response to a request; None if the application has to serve it."""
        path = scope["path"]
        endpoint = self._endpoints.get(path)
        if endpoint is None and (path.startswith(self._path_prefix) or scope.get("root_path")):
            endpoint = self._find(scope)
        elif endpoint is not None and self._by_address:
            endpoint = self._operations.for_caller(scope).endpoints[path]
        if endpoint is not None:
            response = endpoint(scope["method"], scope["query_string"], scope["headers"])
            if self._by_address:
                self._operations.note_refusal(response, scope, path)
            return response
        if self._alone or not self.open:
            return self._unavailable()
        if _EVENTS in scope["headers"]:
            # A compressed stream cannot be given the event that announces the shutdown.
            scope["headers"] = [each for each in scope["headers"] if each[0] != b"accept-encoding"]
        return None

    def _find(self, scope: Scope) -> Endpoint | None:
        path: str = scope["path"]
        if root_path := scope.get("root_path"):
            path = path.removeprefix(root_path)
        return self._operations.for_caller(scope).find(path)

    def _unavailable(self) -> RawResponse:
        if self._alone:
            return problem_response(404, "This port serves the operations endpoints only.")
        state = "stopping" if self.requests.stopping else "starting"
        return problem_response(503, f"The service is {state}.", (b"retry-after", b"1"))

    async def _reject_websocket(
        self, scope: Scope, send: Send, header: tuple[bytes, bytes]
    ) -> None:
        if "websocket.http.response" not in (scope.get("extensions") or {}):
            await send({"type": "websocket.close", "code": 1013, "reason": "try again later"})
            return
        response = self._unavailable()
        start: Message = {"type": "websocket.http.response.start", "status": response.status}
        await send({**start, "headers": [*response.headers, header]})
        await send({"type": "websocket.http.response.body", "body": response.body})

    async def _end_cancelled(
        self, request: InFlightRequest, error: asyncio.CancelledError, send: Send
    ) -> bool:
        """Finish the response of a cancelled request; return False if the client cannot get one."""
        if not request.cut:
            return request.cancelled_for_client
        if request.websocket or request.complete:
            return True
        if not request.started:
            response = problem_response(
                503,
                "The service stopped before it could respond.",
                (b"retry-after", b"1"),
            )
            for message in self._messages(response, request.scope, request.header):
                await send(message)
            return True
        if request.accepts_events:
            # An event stream has no end of its own, and after a regular end the client reconnects.
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return True
        mark_logged(error)
        return False

    def _messages(
        self, response: RawResponse, scope: Scope, header: tuple[bytes, bytes]
    ) -> tuple[Message, Message]:
        headers = [*response.headers, header]
        if self.requests.stopping and CLOSE not in headers:
            headers.append(CLOSE)
        body = b"" if scope["method"] == "HEAD" else response.body
        return (
            {"type": "http.response.start", "status": response.status, "headers": headers},
            {"type": "http.response.body", "body": body},
        )
