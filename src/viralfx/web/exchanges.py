"""The requests in flight: counted, told of the shutdown, and cut when the budget is over."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from time import perf_counter

from viralfx.domain.clock import Clock, finished_within
from viralfx.domain.errors import WorkLostError
from viralfx.telemetry.requests import CLIENT_LEFT
from viralfx.web.asgi import Message, Receive, Scope, Send
from viralfx.web.correlation import HEADER
from viralfx.web.failures import log_error, log_escaped

_logger = logging.getLogger("viralfx.requests")

_FIRST_STATUS, _LAST_STATUS = 100, 599
_FIRST_FAILURE = 400
_SERVER_ERROR = 500  # as a number: asking HTTPStatus costs more than comparing
_FAREWELL = b"event: shutdown\ndata: {}\n\n"
_CUT_RESERVE = 0.5
_A_MOMENT = 0.01


class Exchange:
    """One request and what became of its answer; also the ``send`` its application gets."""

    started = False
    """Whether an answer has begun, or a WebSocket was accepted."""
    complete = False
    """Whether the application has said everything; the client may not have read it yet."""
    lasts = False
    """Whether it is an event stream, which takes as long as its client cares to listen."""
    event_stream = False
    """Whether it is one that words of our own can be put into."""
    has_length = False
    """Whether the answer announced its length, so that cutting it loses something."""
    status: int | None = None
    """Of its answer, once that began; None for one that is no HTTP status, or for nobody."""
    sent = 0
    """Bytes of the answer's body so far."""
    cut = False
    """Whether its task was cancelled because the budget is over."""
    _at_boundary = True  # right after the headers is one
    _told = False

    def __init__(
        self,
        exchanges: "Exchanges",
        scope: Scope,
        receive: Receive,
        send: Send,
        header: tuple[bytes, bytes],
    ) -> None:
        self.scope = scope
        self.websocket = scope["type"] == "websocket"
        self.began = perf_counter()
        self.task: asyncio.Task[object] | None = asyncio.current_task(exchanges.loop)
        self._exchanges = exchanges
        self._header = header
        self._receive = receive
        self._send = send

    @property
    def loses_something(self) -> bool:
        """Whether cutting it now keeps from the client what it was to get."""
        if self.websocket or self.complete:
            return False
        return not self.started or self.has_length

    async def client_left(self, clock: Clock) -> bool:
        """Whether nobody waits for the answer any more. Asked only when it is cut anyway.

        The body of a request that is still to be read would be lost by asking.
        """
        asked = asyncio.ensure_future(self._receive())
        try:
            if not await finished_within(asked, _A_MOMENT, clock):
                return False
            return asked.exception() is None and asked.result()["type"] == "http.disconnect"
        finally:
            asked.cancel()

    def send(self, message: Message) -> Awaitable[None]:
        """Pass a message on; the first one gets the correlation id, and the last news."""
        kind = message["type"]
        if kind == "http.response.body":
            self.sent += len(message.get("body", b""))
            if self.event_stream:
                return self._send_events(message)
            self.complete = not message.get("more_body", False)
        elif kind == "http.response.start":
            self._begin(message)
        elif kind == "websocket.accept":
            self.started = True
            message["headers"] = [*message.get("headers", ()), self._header]
        return self._send(message)

    async def _send_events(self, message: Message) -> None:
        await self._send(message)
        self.complete = not message.get("more_body", False)
        self._at_boundary = message.get("body", b"").endswith((b"\n\n", b"\r\n\r\n"))
        if self._exchanges.told:
            await self.tell()

    def _begin(self, message: Message) -> None:
        self.started = True
        status = int(message["status"])  # an enumeration's member would be counted by its name
        # No server sends any other, whatever an application makes of what a client asks for.
        self.status = status if _FIRST_STATUS <= status <= _LAST_STATUS else None
        if status >= _FIRST_FAILURE:
            if self.scope.get(CLIENT_LEFT):
                self.status = None
            elif status == _SERVER_ERROR:
                log_error(self.scope)
        headers = [self._header]
        leaving, encoded = self._exchanges.leaving, False
        for pair in message.get("headers", ()):
            name, value = pair
            if name == b"content-type":
                # To one that is refused nobody listens: an error is no stream, whatever it says.
                self.lasts = status < _FIRST_FAILURE and value.startswith(b"text/event-stream")
            elif name == b"content-length":
                self.has_length = True
            elif name == b"content-encoding":
                encoded = True
            elif name == HEADER or (leaving and name == b"connection"):
                continue
            headers.append(pair)
        # Nothing of ours would be understood in a stream that is compressed.
        self.event_stream = self.lasts and not encoded
        if leaving:
            headers.append((b"connection", b"close"))
        message["headers"] = headers

    def failed(self, error: Exception) -> None:
        """Take in what its application raised past whatever makes answers of errors."""
        if self.websocket:
            return
        log_escaped(error, self.scope)
        if not self.started and not self.scope.get(CLIENT_LEFT):
            # So every server answers then, in words of its own.
            self.status, self.complete = _SERVER_ERROR, True

    async def tell(self) -> None:
        """Send an event stream's client the event ``shutdown``, between two events of its own."""
        if self.event_stream and self._at_boundary and not self.complete and not self._told:
            self._told = True
            await self._send({"type": "http.response.body", "body": _FAREWELL, "more_body": True})


class Exchanges:
    """All requests in flight through one gate; probes are not among them."""

    def __init__(self, ended: Callable[[Exchange], None] | None = None) -> None:
        """Take ``ended``, which is told of each request whose application has returned."""
        self._on_end = ended
        self._open: set[Exchange] = set()
        self._telling: set[asyncio.Task[None]] = set()
        self._drained: asyncio.Event | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        """The loop of the requests; Python 3.11 makes a system call each time one asks for it."""
        self.leaving = False
        """Whether answers carry ``Connection: close``."""
        self.told = False
        """Whether event streams are told that the end is near."""

    def __len__(self) -> int:
        return len(self._open)

    def begin(
        self, scope: Scope, receive: Receive, send: Send, header: tuple[bytes, bytes]
    ) -> Exchange:
        """Count a request in."""
        if self.loop is None:
            self.loop = asyncio.get_running_loop()
        exchange = Exchange(self, scope, receive, send, header)
        self._open.add(exchange)
        return exchange

    def end(self, exchange: Exchange) -> None:
        """Count a request out."""
        self._open.discard(exchange)
        if self._drained is not None and not self._open:
            self._drained.set()
        if self._on_end is not None:
            self._on_end(exchange)

    def tell(self) -> None:
        """Tell the clients of event streams; those between two events at once, others after."""
        self.told = True
        for exchange in self._open:
            if exchange.event_stream:
                # Not waited for: a client that does not read would hold up all others.
                task = asyncio.create_task(exchange.tell())
                self._telling.add(task)
                task.add_done_callback(self._told_one)

    def _told_one(self, task: asyncio.Task[None]) -> None:
        self._telling.discard(task)
        if not task.cancelled():
            # The stream may have ended in the meantime; that is nobody's failure.
            task.exception()

    async def drain(self, budget: float, clock: Clock) -> None:
        """Wait for the requests, then cut what is left.

        A stream that began and has no known end is cut without more ado. A request without an
        answer, or with a part of one whose length was announced, is work lost:
        :class:`WorkLostError`.
        """
        reserve = min(_CUT_RESERVE, budget / 10)
        if await self._emptied(budget - reserve, clock):
            return
        left = list(self._open)
        lost = [e for e in left if e.loses_something and not await e.client_left(clock)]
        extra = {"unanswered": len(lost), "streams": len(left) - len(lost)}
        _logger.warning("Cutting requests", extra=extra)
        for task in self._telling:
            task.cancel()
        for exchange in left:
            exchange.cut = True
            if exchange.task is not None:
                exchange.task.cancel()
        await self._emptied(reserve, clock)
        if lost:
            raise WorkLostError(f"{len(lost)} requests had no whole answer within {budget:g} s")

    async def _emptied(self, seconds: float, clock: Clock) -> bool:
        if not self._open:
            return True
        self._drained = asyncio.Event()
        waiting = asyncio.ensure_future(self._drained.wait())
        try:
            return await finished_within(waiting, seconds, clock)
        finally:
            waiting.cancel()
