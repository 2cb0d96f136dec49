"""The responses of one request: fast ones here, all others by uvicorn.

An ordinary response has a ``Content-Length`` and a body in one message. Its head is written from
prepared parts, because uvicorn's code costs a twentieth of a whole request. uvicorn writes all
other responses and invalid ones, so that their bytes and errors stay the same.
"""

import asyncio
from functools import lru_cache
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import (
    HEADER_RE,
    HEADER_VALUE_RE,
    STATUS_LINE,
    RequestResponseCycle,
)

from viralfx.runner.connections import Connections
from viralfx.runner.http_limits import WRITE_BUFFER_BYTES, Rejection

_CONNECTION = frozenset({b"connection", b"transfer-encoding", b"content-length"})
"""Headers that frame the body; the usual spelling of ``content-length`` is handled separately."""
_MAX_CACHED_NAME_BYTES = 64


@lru_cache(maxsize=512)
def _line_start(name: bytes) -> bytes | None:
    """Return the start of a header line; None if uvicorn has to write the response."""
    lower = name.lower()
    if lower in _CONNECTION or HEADER_RE.search(name):
        return None
    return lower + b": "


class Flow(FlowControl):
    """uvicorn's flow control, which also restarts the body timeout when reading resumes."""

    def __init__(self, connection: Any, transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self._connection = connection

    def resume_reading(self) -> None:
        """Resume reading, after the rest of a large read.

        uvicorn calls this whenever the application receives body data.
        """
        self._connection.restart_body_timeout()
        if self._connection in self._connection.registry.backlogs:
            self.read_paused = False
        else:
            super().resume_reading()


class ResponseCycle(RequestResponseCycle):
    """The ASGI side of one request. Set ``connections`` before the first use."""

    connections: Connections
    """The source of the server's own headers, which uvicorn calls the default headers."""
    held = 0
    """Bytes of the request that count as buffered: a large head, and the unread body."""
    received = 0
    """Bytes of the body that have arrived."""

    def hold(self, size: int) -> None:
        """Count ``size`` more bytes of the request as buffered."""
        self.held += size
        self.connections.request_bytes += size

    def release(self) -> None:
        """Stop counting the head and the body."""
        self.hold(-self.held)

    async def receive(self) -> Any:
        """Return the next message; the application holds its body from then on."""
        message: Any = await super().receive()
        if taken := len(message.get("body", b"")):
            self.hold(-min(taken, self.held))
        return message

    async def send(self, message: Any) -> None:
        """Write a message of the application. Raises uvicorn's errors for an invalid message."""
        if self.connections.is_overloaded and len(message.get("body", b"")) > WRITE_BUFFER_BYTES:
            client = self.scope["client"]
            self.connections.reject(Rejection.UNSENT, client[0] if client else None)
            self.transport.abort()
            self.disconnected = True
        if self.disconnected or self.flow.write_paused:
            await super().send(message)
        elif not self.response_started:
            head = self._head(message)
            if head is None:
                await super().send(message)
                return
            self.response_started = True
            self.waiting_for_100_continue = False
            self.chunked_encoding = False
            self.transport.write(head)
        elif self._completes(message):
            self.transport.write(message["body"])
            self.expected_content_length = 0
            self.response_complete = True
            self.message_event.set()
            if not self.keep_alive:
                self.transport.close()
            self.on_response()
        else:
            await super().send(message)

    def _head(self, message: Any) -> bytes | None:
        """Return the head of an ordinary response; None for any other response."""
        if message["type"] != "http.response.start":
            return None
        status_line = STATUS_LINE.get(message["status"])
        if status_line is None:
            return None
        length: bytes | None = None
        values = []
        parts = [status_line, self.connections.server_head]
        for name, value in message.get("headers", ()):
            if name == b"content-length":
                if length is not None:
                    return None
                length = value
                parts += b"content-length: ", value, b"\r\n"
                continue
            start = _line_start(name) if len(name) <= _MAX_CACHED_NAME_BYTES else None
            if start is None:
                return None
            values.append(value)
            parts += start, value, b"\r\n"
        if length is None or not length.isdigit() or HEADER_VALUE_RE.search(b"".join(values)):
            return None
        self.expected_content_length = int(length)
        parts.append(b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n")
        return b"".join(parts)

    def _completes(self, message: Any) -> bool:
        """Return True for a message with the whole body of a response with a known length."""
        return (
            message["type"] == "http.response.body"
            and not message.get("more_body", False)
            and not self.response_complete
            and self.chunked_encoding is False
            and self.scope["method"] != "HEAD"
            and len(message.get("body", b"")) == self.expected_content_length > 0
        )
