"""The requests in flight: counted, told of the shutdown, and cut when the budget is over."""

import asyncio
import logging

from viralfx.domain.clock import Clock, finished_within
from viralfx.domain.errors import WorkLostError
from viralfx.web.asgi import Message, Scope, Send
from viralfx.web.correlation import HEADER

_logger = logging.getLogger("viralfx.requests")

_FAREWELL = b"event: shutdown\ndata: {}\n\n"
_CUT_RESERVE = 0.5


class Exchange:
    """One request and what became of its answer; also the ``send`` its application gets."""

    __slots__ = (
        "_at_boundary",
        "_send",
        "complete",
        "cut",
        "event_stream",
        "exchanges",
        "header",
        "started",
        "task",
        "told",
        "websocket",
    )

    def __init__(
        self, exchanges: "Exchanges", send: Send, header: tuple[bytes, bytes], *, websocket: bool
    ) -> None:
        self.exchanges = exchanges
        self.header = header
        self.websocket = websocket
        self.started = False
        self.complete = False
        self.cut = False
        self.event_stream = False
        self.told = False
        self.task: asyncio.Task[object] | None = asyncio.current_task()
        self._send = send
        self._at_boundary = False

    async def send(self, message: Message) -> None:
        """Pass a message on; the first one gets the correlation id, and the last news."""
        kind = message["type"]
        if kind == "http.response.start":
            self._begin(message)
        elif kind == "websocket.accept":
            self.started = True
        await self._send(message)
        if kind == "http.response.body":
            if not message.get("more_body", False):
                self.complete = True
            elif self.event_stream:
                body = message.get("body", b"")
                self._at_boundary = body.endswith((b"\n\n", b"\r\n\r\n"))
                if self.exchanges.told:
                    await self.tell()

    def _begin(self, message: Message) -> None:
        self.started = True
        headers = [self.header]
        leaving = self.exchanges.leaving
        for pair in message.get("headers", ()):
            name, value = pair
            if name == b"content-type":
                self.event_stream = value.startswith(b"text/event-stream")
            elif name == HEADER or (leaving and name == b"connection"):
                continue
            headers.append(pair)
        if leaving:
            headers.append((b"connection", b"close"))
        message["headers"] = headers

    async def tell(self) -> None:
        """Send an event stream's client the event ``shutdown``, between two events of its own."""
        if self.event_stream and self._at_boundary and not self.complete and not self.told:
            self.told = True
            await self._send({"type": "http.response.body", "body": _FAREWELL, "more_body": True})


class Exchanges:
    """All requests in flight through one gate; probes are not among them."""

    def __init__(self) -> None:
        self._open: set[Exchange] = set()
        self._telling: set[asyncio.Task[None]] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self.leaving = False
        """Whether answers carry ``Connection: close``."""
        self.told = False
        """Whether event streams are told that the end is near."""

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, scope: Scope, send: Send, header: tuple[bytes, bytes]) -> Exchange:
        """Count a request in."""
        exchange = Exchange(self, send, header, websocket=scope["type"] == "websocket")
        self._open.add(exchange)
        self._empty.clear()
        return exchange

    def end(self, exchange: Exchange) -> None:
        """Count a request out."""
        self._open.discard(exchange)
        if not self._open:
            self._empty.set()

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

        A stream that began and never ends is cut without more ado. A request that had no answer
        yet, or part of one with an end, is work lost: :class:`WorkLostError`.
        """
        reserve = min(_CUT_RESERVE, budget / 10)
        if await self._emptied(budget - reserve, clock):
            return
        left = list(self._open)
        lost = [e for e in left if not e.started and not e.websocket]
        _logger.warning(
            "Cutting requests", extra={"unanswered": len(lost), "streams": len(left) - len(lost)}
        )
        for task in self._telling:
            task.cancel()
        for exchange in left:
            exchange.cut = True
            if exchange.task is not None:
                exchange.task.cancel()
        await self._emptied(reserve, clock)
        if lost:
            raise WorkLostError(f"{len(lost)} requests had no answer within {budget:g} s")

    async def _emptied(self, seconds: float, clock: Clock) -> bool:
        waiting = asyncio.ensure_future(self._empty.wait())
        try:
            return await finished_within(waiting, seconds, clock)
        finally:
            waiting.cancel()
