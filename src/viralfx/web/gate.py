"""The gate: probes are answered ahead of the application, everything else is counted through it.

Outermost of all ASGI applications, so that nothing an application does, neither its middleware
nor its routing nor its mistakes, can slow or break a probe.
"""

import asyncio
from collections.abc import Awaitable

from viralfx.domain.correlation import begin_conversation
from viralfx.web.answers import OperationsAnswers
from viralfx.web.asgi import ASGIApp, Message, Receive, Scope, Send
from viralfx.web.correlation import HEADER, correlation_id_of
from viralfx.web.exchanges import Exchange, Exchanges
from viralfx.web.failures import tell_no_more
from viralfx.web.replies import Answer, Endpoint, Refused, WithBody, complete, problem_answer
from viralfx.web.watching import RequestWatch


async def _nothing(_scope: Scope, _receive: Receive, _send: Send) -> None:
    """Stand for an application that does not hear of anything."""


class Gate:
    """An ASGI application around another; without one it answers the operations endpoints only."""

    def __init__(
        self,
        answers: OperationsAnswers,
        app: ASGIApp | None = None,
        watch: RequestWatch | None = None,
    ) -> None:
        """``watch`` is told of each request that the application answered."""
        self._answers = answers
        self._endpoints = answers.endpoints
        self._below = answers.below
        self._alone = app is None
        self._app = _nothing if app is None else app
        self.exchanges = Exchanges(None if watch is None else watch.ended)
        if watch is not None:
            watch.count_active(self.exchanges.__len__)
        self.open = False
        """Whether requests are let through; until then they get 503 and ``Retry-After``."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection's scope."""
        kind, app = scope["type"], self._app
        if kind not in {"http", "websocket"}:
            await app(scope, receive, send)
            return
        correlation_id = correlation_id_of(scope["headers"])
        begin_conversation(correlation_id)
        header = (HEADER, correlation_id.encode("ascii"))
        answer = None
        if kind == "http":
            answer = self._answer(scope)
        elif self._alone or not self.open or self.exchanges.leaving:
            await receive()
            await self._refuse_websocket(scope, send, header)
            return
        if answer is not None:
            if not isinstance(answer, Answer):
                answer = await complete(answer, scope, receive)
            start, body = self._messages(answer, scope, header)
            await send(start)
            await send(body)
            return
        # Here and not in a method: one coroutine more costs a percent of an ordinary request.
        exchange = self.exchanges.begin(scope, receive, send, header)
        try:
            await app(scope, receive, exchange.send)
        except asyncio.CancelledError as error:
            if not exchange.cut:
                raise
            if not await self._cut(exchange, scope, send, header):
                tell_no_more(error)
                raise
        except Exception as error:
            exchange.failed(error)
            raise
        finally:
            self.exchanges.end(exchange)

    def _answer(self, scope: Scope) -> Answer | Awaitable[Answer] | WithBody | Refused | None:
        """Return the answer to a request that is not for the application; None for one that is."""
        path = scope["path"]
        endpoint = self._endpoints.get(path)
        if endpoint is None and (path.startswith(self._below) or scope.get("root_path")):
            endpoint = self._find(scope)
        if endpoint is not None:
            return endpoint(scope["method"], scope["query_string"], scope["headers"])
        if self._alone or not self.open:
            return self._refusal()
        return None

    def _find(self, scope: Scope) -> Endpoint | None:
        path: str = scope["path"]
        if root_path := scope.get("root_path"):
            path = path.removeprefix(root_path)
        return self._answers.find(path)

    def _refusal(self) -> Answer:
        if self._alone:
            return problem_answer(404, "This port answers operations endpoints only.")
        what = "stopping" if self.exchanges.leaving else "starting"
        return problem_answer(503, f"The service is {what}.", (b"retry-after", b"1"))

    async def _refuse_websocket(
        self, scope: Scope, send: Send, header: tuple[bytes, bytes]
    ) -> None:
        if "websocket.http.response" not in (scope.get("extensions") or {}):
            await send({"type": "websocket.close", "code": 1013, "reason": "try again later"})
            return
        answer = self._refusal()
        start: Message = {"type": "websocket.http.response.start", "status": answer.status}
        await send({**start, "headers": [*answer.headers, header]})
        await send({"type": "websocket.http.response.body", "body": answer.body})

    async def _cut(
        self, exchange: Exchange, scope: Scope, send: Send, header: tuple[bytes, bytes]
    ) -> bool:
        """End a cancelled request so that its client can tell; False when that is not possible."""
        if exchange.websocket or exchange.complete:
            return True
        if not exchange.started:
            answer = problem_answer(
                503,
                "The service stopped before it could answer.",
                (b"retry-after", b"1"),
            )
            for message in self._messages(answer, scope, header):
                await send(message)
            return True
        if exchange.event_stream:
            # An event stream has no end of its own: closing it in order lets the client reconnect.
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return True
        return False

    def _messages(
        self, answer: Answer, scope: Scope, header: tuple[bytes, bytes]
    ) -> tuple[Message, Message]:
        headers = [*answer.headers, header]
        if self.exchanges.leaving:
            headers.append((b"connection", b"close"))
        body = b"" if scope["method"] == "HEAD" else answer.body
        return (
            {"type": "http.response.start", "status": answer.status, "headers": headers},
            {"type": "http.response.body", "body": body},
        )
