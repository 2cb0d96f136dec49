"""The WebSocket connections of an HTTP server: uvicorn's, with limits.

The server aborts a client that reads nothing after a time, and keeps one answer to its pings until
then. uvicorn's class would keep all of them, and wait for the last byte.
"""

import asyncio
from time import monotonic
from typing import Any

from viralfx.runner.connections import Connections
from viralfx.runner.http_limits import (
    LINGER_SECONDS,
    STOPPING_SECONDS,
    Rejection,
)

_SMALL_READ = 128
"""Size of a read that is parsed at once; larger ones take turns."""
_MAX_FRAGMENTS = 1024
"""Maximum number of frames of one message."""
_MESSAGE_TOO_BIG = 1009


class WebSocketLimits:
    """Mixin for uvicorn's WebSocket class that counts the connection and enforces limits."""

    registry: Connections
    transport: asyncio.Transport
    frames: list[Any]
    tick = -1
    sent_bytes = -1
    sent_at = 0.0
    slice_bytes = 4096
    """Bytes that are parsed at once; the smallest frame has two."""
    waits_for_application = True
    _pong = b""
    _stopping = False

    def connection_made(self: Any, transport: asyncio.Transport) -> None:
        """Start the deadlines."""
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
        """Close a connection whose client has not answered a ping."""
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
        pong = b"".join(self.conn.data_to_send())
        if self.writable.is_set() or self.conn.close_sent is not None:
            self.transport.write(pong)
        else:
            self._pong = pong

    def connection_lost(self: Any, exc: Exception | None) -> None:
        """Release the connection."""
        self.registry.remove(self)
        self.registry.open -= 1
        super().connection_lost(exc)  # type: ignore[misc]

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
                self._parse(data[start : start + self.slice_bytes])
                start += self.slice_bytes
        if start < len(data) and not self.transport.is_closing():
            backlogs.add(self, memoryview(data)[start:])

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

    def handle_cont(self: Any, event: Any) -> None:
        """Accept a fragment of a message, unless there are too many."""
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
