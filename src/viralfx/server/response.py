"""The responses of one request: fast ones here, all others by uvicorn.

An ordinary response has a ``Content-Length`` and a body in one message. Its head is written from
prepared parts, because uvicorn's code costs a twentieth of a whole request. uvicorn writes all
other responses and invalid ones, so that their bytes and errors stay the same.

:func:`serve_trial` is the self-test of all that is used of uvicorn for a connection.
"""

import asyncio
import logging
from functools import lru_cache
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import (
    HEADER_RE,
    HEADER_VALUE_RE,
    STATUS_LINE,
    RequestResponseCycle,
)

from viralfx.server.connections import Connections
from viralfx.server.interface import IN_FLIGHT, RawResponse, Receive, Scope, Send
from viralfx.server.limits import WRITE_BUFFER_BYTES, Rejection

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

    def disconnect(self) -> None:
        """Record that the client has disconnected, and notify the application."""
        self.disconnected = True
        self.body = bytearray()  # the application gets no more of it
        self.message_event.set()
        scope: Any = self.scope
        in_flight = scope.get(IN_FLIGHT)
        if in_flight is not None:
            in_flight.on_disconnect()

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
        headers = message.get("headers", ())
        if type(headers) is not list:
            # uvicorn may have to read them, too, and an iterator can be read only once.
            headers = message["headers"] = [(name, value) for name, value in headers]
        length: bytes | None = None
        values = []
        parts = [status_line, self.connections.server_head]
        for name, value in headers:
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


# -- the self-test -------------------------------------------------------------------------------


class _Wire(asyncio.Transport):
    """A transport without a socket, which keeps what is written."""

    written = b""
    protocol: Any = None

    def write(self, data: Any) -> None:
        self.written += data

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def _ignore(self, *_: object, **__: object) -> None:
        """Nothing waits, and nothing is closed."""

    set_write_buffer_limits = pause_reading = resume_reading = write_eof = close = abort = _ignore


def _probe(_method: str, _query: bytes, _headers: Any) -> RawResponse:
    return RawResponse(200, b"content-length: 5\r\n", b"probe")


PROBES = {b"/probe": _probe}
"""The endpoints of the connection under :func:`serve_trial`."""


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with what the client has sent: its application."""
    message = await receive()
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": (await receive())["text"]})
        return
    head = [(b"content-length", b"%d" % len(message["body"]))]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": message["body"]})


_HANDSHAKE = (
    b"GET /socket HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
_STEPS = (
    ("a probe", b"GET /probe HTTP/1.1\r\nhost: a\r\n\r\n", b"\r\n\r\nprobe"),
    (
        "a request",
        b"POST /echo HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nbody",
        b"\r\n\r\nbody",
    ),
    ("a handshake of a WebSocket", _HANDSHAKE, b"HTTP/1.1 101 "),
    ("a message of a WebSocket", b"\x81\x84\0\0\0\0text", b"\x81\x04text"),
)
"""Name, bytes of a client, and a part of the response."""
_TURNS = 100
"""Turns of the event loop in which an answer comes; it takes about five."""


async def serve_trial(kind: type[Any], config: object, state: object) -> None:
    """Let a connection of a class serve a probe, a request and, with a library, a WebSocket.

    Raises the error of the missing part, or ``RuntimeError`` if there is no answer without one.
    """
    errors: list[BaseException] = []

    class Observed(kind):  # type: ignore[misc]  # the parser hides the error of a callback
        def on_headers_complete(self) -> None:
            try:
                super().on_headers_complete()
            except Exception as error:
                errors.append(error)
                raise

    def keep(record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            errors.append(record.exc_info[1])
        return False  # the caller logs it

    log = logging.getLogger("uvicorn.error")
    log.addFilter(keep)
    try:
        await _serve_steps(Observed(config, state, {}, asyncio.get_running_loop()))
    except RuntimeError:
        if errors:
            raise errors[0] from None
        raise
    finally:
        log.removeFilter(keep)


async def _serve_steps(protocol: Any) -> None:
    wire = _Wire()
    wire.protocol = protocol
    protocol.connection_made(wire)
    with_sockets = protocol.websocket_class is not None
    for what, request, answer in _STEPS if with_sockets else _STEPS[:2]:
        wire.written = b""
        wire.protocol.data_received(request)
        for _ in range(_TURNS):
            if answer in wire.written:
                break
            await asyncio.sleep(0)
        else:
            raise RuntimeError(f"no answer to {what}")
    wire.protocol.connection_lost(None)
