"""The WebSocket connections of an HTTP server: uvicorn's, with limits.

The server aborts a client that reads nothing after a time, and keeps one answer to its pings until
then. uvicorn's class would keep all of them, and wait for the last byte.
"""

import asyncio
import sys
from collections import deque
from time import monotonic
from typing import Any

from viralfx.server.connections import Connections
from viralfx.server.limits import (
    LINGER_SECONDS,
    STOPPING_SECONDS,
    Rejection,
)

_SMALL_READ = 128
"""Size of a read that is parsed at once; larger ones take turns."""
_MAX_FRAGMENTS = 1024
"""Maximum number of frames of one message."""
_MESSAGE_TOO_BIG = 1009
_SLICE = 4096
"""Bytes that are parsed at once; the smallest frame has two."""
_MESSAGE_BYTES, _FRAME_BYTES = 256, 128
"""Memory of a message that waits for the application, and of a frame, beside their data."""


class _Messages(asyncio.Queue[dict[str, Any]]):
    """The messages that wait for the application."""

    memory = 0
    """Their bytes in memory."""

    def _init(self, maxsize: int) -> None:
        del maxsize  # there is none
        self._queue: deque[dict[str, Any]] = deque()

    def clear(self) -> None:
        """Drop the messages of the client, and keep the begin and the end of the connection."""
        kept = [item for item in self._queue if not _memory_of(item)]
        self._queue = deque(kept)
        self.memory = 0

    def _put(self, item: dict[str, Any]) -> None:
        self.memory += _memory_of(item)
        super()._put(item)

    def _get(self) -> dict[str, Any]:
        item = super()._get()
        self.memory -= _memory_of(item)
        return item


def _memory_of(message: dict[str, Any]) -> int:
    if message["type"] != "websocket.receive":
        return 0
    return _MESSAGE_BYTES + sys.getsizeof(message.get("text") or message.get("bytes"))


class WebSocketLimits:
    """Mixin for uvicorn's WebSocket class that counts the connection and enforces limits."""

    registry: Connections
    transport: asyncio.Transport
    frames: list[Any]
    queue: _Messages
    tick = -1
    sent_bytes = -1
    sent_at = 0.0
    waits_for_application = True
    _pong = b""
    _stopping = False
    _parses = True
    """False once what the parser holds has been freed."""
    _kept = 0
    """Size of the last frame, which the parser keeps until the next one."""

    def connection_made(self: Any, transport: asyncio.Transport) -> None:
        """Start the deadlines."""
        self.queue = _Messages()
        super().connection_made(transport)  # type: ignore[misc]
        self.registry.add(self, monotonic() + self.registry.limits.keep_alive_timeout)

    def check_deadline(self: Any, now: float) -> float:
        """Abort the connection if its client has read nothing for too long."""
        timeout: float = self.registry.limits.keep_alive_timeout
        if not self.transport.get_write_buffer_size():
            return now + timeout
        if self._stopping:
            timeout = min(timeout, STOPPING_SECONDS)
        checked: float = self.registry.check_sending(self, now, timeout, Rejection.SEND_TIMEOUT)
        return checked

    def idle_since(self) -> float | None:
        """Return None: a WebSocket is a request."""

    def shutdown(self: Any) -> None:
        """Close the WebSocket; a client that does not read has less time now."""
        if self._stopping:
            return  # the transport waits for the client
        self._stopping = True
        if self.transport.get_write_buffer_size():
            self.registry.check_at(self, monotonic())
        if not self.transport.is_closing():
            super().shutdown()  # type: ignore[misc]

    def reject_unfinished(self: Any) -> None:
        """Abort a connection whose client does not read."""
        if self.transport.get_write_buffer_size():
            self.registry.check_sending(self, monotonic(), LINGER_SECONDS, Rejection.SEND_TIMEOUT)

    def keepalive_timeout(self: Any) -> None:
        """Close a connection whose client has not answered a ping.

        The answer may wait behind messages that the application has not read.
        """
        if self.read_paused or self in self.registry.backlogs:
            self.pong_timer = self.pending_ping_payload = None
            self.schedule_ping()
            return
        super().keepalive_timeout()  # type: ignore[misc]
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # the transport would wait for the client

    def pause_writing(self: Any) -> None:
        """Count the unsent messages."""
        super().pause_writing()  # type: ignore[misc]
        self.registry.pause_writing(self)

    def resume_writing(self: Any) -> None:
        """Answer the last ping that came meanwhile."""
        super().resume_writing()  # type: ignore[misc]
        self.registry.resume_writing(self)
        pong, self._pong = self._pong, b""
        if pong and not self.transport.is_closing():
            self.transport.write(pong)

    def handle_ping(self: Any) -> None:
        """Answer a ping; of several that the client does not read, only the last one.

        RFC 6455, 5.5.3, allows that.
        """
        self._kept = 0
        pong = b"".join(self.conn.data_to_send())
        if self.writable.is_set() or self.conn.close_sent is not None:
            self.transport.write(pong)
        else:
            self._pong = pong

    def connection_lost(self: Any, exc: Exception | None) -> None:
        """Release the connection; its application may still read the messages."""
        self.registry.remove(self)
        self.registry.open -= 1
        super().connection_lost(exc)  # type: ignore[misc]
        self._hold_messages()

    def on_task_complete(self: Any, task: asyncio.Task[None]) -> None:
        """Free the messages that the application has not read."""
        super().on_task_complete(task)  # type: ignore[misc]
        self.queue.clear()
        self._hold_messages()

    def abandon(self: Any) -> None:
        """Free the messages, and abort the connection."""
        self.queue.clear()
        if not self.transport.is_closing():
            self._reject()
            self.transport.abort()
        self._hold_messages()

    @property
    def may_parse(self: Any) -> bool:
        """False while the application has messages to read."""
        return not self.read_paused

    def data_received(self: Any, data: bytes) -> None:
        """Parse frames, as long as the event loop has time and the application reads them.

        One read may contain tens of thousands of empty frames.
        """
        backlogs = self.registry.backlogs
        start = 0
        if self not in backlogs:
            if len(data) <= _SMALL_READ or not self.handshake_initiated:
                self._parse(data)
                return
            while start < len(data) and not self.read_paused and backlogs.has_time():
                self._parse(data[start : start + _SLICE])
                start += _SLICE
        if start < len(data) and not self.transport.is_closing():
            backlogs.add(self, memoryview(data)[start:])

    def slice_size(self, data: bytearray) -> int:
        """Return how many bytes of a large read to parse at once."""
        return min(_SLICE, len(data))

    def parse_slice(self: Any, data: bytes) -> bool:
        """Parse a part of a large read; return False if the rest of it is to be dropped."""
        self._parse(data)
        return not self.transport.is_closing()

    def end_backlog(self: Any) -> None:
        """Read on, unless the application must first read the messages."""
        if not self.read_paused:
            self.transport.resume_reading()

    async def receive(self: Any) -> Any:
        """Return the next message; the rest of a large read comes before the next read."""
        message = await super().receive()  # type: ignore[misc]
        self._hold_messages()
        self._resume_backlog()
        return message

    async def send(self: Any, message: Any) -> None:
        """Send a message; after a close the client's own close is read."""
        await super().send(message)  # type: ignore[misc]
        self._resume_backlog()

    def _resume_backlog(self: Any) -> None:
        backlogs = self.registry.backlogs
        if self in backlogs and not self.read_paused and not self.transport.is_closing():
            self.transport.pause_reading()
            backlogs.resume(self)

    def _parse(self: Any, data: bytes) -> None:
        if self.transport.is_closing():
            return
        try:
            super().data_received(data)  # type: ignore[misc]
        except Exception:  # noqa: BLE001 - frames after a close frame may contain anything
            self._reject()
            self.transport.abort()
        self._hold_messages()

    def _hold_messages(self: Any) -> None:
        """Count what has been parsed and not read, and an incomplete message."""
        if self.transport.is_closing() and self._parses:
            # Nothing more is parsed, and the application may keep this object for long.
            self._parses, self._kept, self.frames = False, 0, []
            self.conn.reader.buffer.clear()
            self.conn.parser.close()
        size = self.queue.memory + self._kept + len(self.conn.reader.buffer)
        if frames := self.frames:
            size += sum(map(len, frames)) + _FRAME_BYTES * len(frames)
        self.registry.backlogs.hold(self, size)

    def handle_text(self: Any, event: Any) -> None:
        """Accept a message, or its first fragment."""
        self._kept = len(event.data)
        super().handle_text(event)  # type: ignore[misc]

    def handle_bytes(self: Any, event: Any) -> None:
        """Accept a message, or its first fragment."""
        self._kept = len(event.data)
        super().handle_bytes(event)  # type: ignore[misc]

    def handle_pong(self: Any, event: Any) -> None:
        """Accept the answer to a ping."""
        self._kept = 0
        super().handle_pong(event)  # type: ignore[misc]

    def handle_cont(self: Any, event: Any) -> None:
        """Accept a fragment of a message, unless there are too many."""
        self._kept = len(event.data)
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
