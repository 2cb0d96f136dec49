"""A client that sends raw bytes and reports the server's responses and closes."""

import json
import re
import select
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

from tests.system.service import Service, request

TIMEOUT_SECONDS = 20.0
"""Time limit for a response or a close on a busy machine."""
GAP_SECONDS = 0.05
"""Pause between two parts, so that the server reads them one by one."""
PROBE = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
HEADER_LINES = b"X: aaaaaaaaaaaaaaaaaaaaaaaa\r\n" * 2000
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
_LENGTH = re.compile(rb"(?i)\r\ncontent-length: (\d+)")


@dataclass(frozen=True)
class RawResponse:
    """One HTTP response."""

    status: int
    head: bytes
    body: bytes

    def json(self) -> Any:
        """Decode the body."""
        return json.loads(self.body)

    def header(self, name: bytes) -> bytes | None:
        """Return the value of a header; None if the response does not have it."""
        found = re.search(rb"(?im)^" + re.escape(name) + rb": ([^\r]*)", self.head)
        return found[1] if found else None


class Wire:
    """One connection to a server."""

    def __init__(self, port: int, *, host: str = "127.0.0.1") -> None:
        self.socket = socket.create_connection((host, port), timeout=TIMEOUT_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.received = b""

    def send(self, *parts: bytes, gap: float = GAP_SECONDS) -> Self:
        """Send the parts, ``gap`` seconds apart, so that the server reads them one by one.

        Stops if the server closes; its responses can still be read.
        """
        for number, part in enumerate(parts):
            if number and select.select([self.socket], [], [], gap)[0] and self._closed():
                break
            try:
                self.socket.sendall(part)
            except OSError:
                break
        return self

    def response(self, *, head_only: bool = False) -> RawResponse:
        """Read one complete response. Raises ``ConnectionError`` if the server closes first."""
        while (parsed := first_response(self.received, head_only=head_only)) is None:
            if not (data := self._read(time.monotonic() + TIMEOUT_SECONDS)):
                raise ConnectionResetError(f"closed after {self.received!r}")
            self.received += data
        response, self.received = parsed
        return response

    def until_closed(self, *, seconds: float = TIMEOUT_SECONDS) -> bytes:
        """Return all data until the server closes or resets the connection.

        Raises ``AssertionError`` if the connection is still open after ``seconds``.
        """
        deadline = time.monotonic() + seconds
        try:
            while data := self._read(deadline):
                self.received += data
        except ConnectionError:
            pass
        except TimeoutError:
            raise AssertionError(f"open after {seconds:g} s: {self.received[:500]!r}") from None
        return self.received

    def flood(self, piece: bytes, *, at_most: int, read: bool = True) -> "Flood":
        """Send a piece repeatedly until the server closes, or ``at_most`` bytes are sent.

        If ``read`` is false, the client reads responses only after the server has closed.
        """
        sent, view, place = 0, memoryview(piece), 0
        self.socket.setblocking(False)
        deadline, ended = time.monotonic() + TIMEOUT_SECONDS, False
        while not ended and sent < at_most and time.monotonic() < deadline:
            readable, writable, _ = select.select(
                [self.socket] if read else [], [self.socket], [], 0.5
            )
            try:
                if readable:
                    data = self.socket.recv(65536)
                    ended = not data
                    self.received += data
                elif writable:
                    count = self.socket.send(view[place:])
                    sent, place = sent + count, (place + count) % len(piece)
            except BlockingIOError:
                continue
            except ConnectionError:
                ended = True
        self.socket.setblocking(True)
        if ended and not read:
            with suppress(OSError):
                while data := self.socket.recv(65536):
                    self.received += data
        return Flood(sent, ended, self.received)

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _closed(self) -> bool:
        try:
            data = self.socket.recv(65536)
        except OSError:
            return True
        self.received += data
        return not data

    def _read(self, deadline: float) -> bytes:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.socket.settimeout(left)
        return self.socket.recv(65536)


@dataclass(frozen=True)
class Flood:
    """The result of an endless request."""

    sent: int
    ended: bool
    """Whether the server closed the connection."""
    received: bytes

    @property
    def statuses(self) -> list[int]:
        """The statuses of the responses."""
        return statuses(self.received)


def statuses(received: bytes) -> list[int]:
    """Return the statuses of all responses in a stream, without 100 Continue."""
    return [int(status) for status in _STATUS.findall(received) if status != b"100"]


def first_response(received: bytes, *, head_only: bool = False) -> tuple[RawResponse, bytes] | None:
    """Return the first response and the bytes after it; None while it is incomplete."""
    head, blank, rest = received.partition(b"\r\n\r\n")
    if not blank:
        return None
    status = int(head.split(b" ", 2)[1])
    bare = head_only or status < 200 or status in {204, 304}
    chunked = b"transfer-encoding: chunked" in head.lower()
    if bare:
        return RawResponse(status, head, b""), rest
    if chunked:
        body, end, rest = rest.partition(b"0\r\n\r\n")
        return (RawResponse(status, head, body), rest) if end else None
    length = int(found[1]) if (found := _LENGTH.search(head)) else 0
    if len(rest) < length:
        return None
    return RawResponse(status, head, rest[:length]), rest[length:]


def talk(port: int, *parts: bytes) -> RawResponse:
    """Send parts over a new connection and return the first response."""
    with Wire(port) as wire:
        return wire.send(*parts).response()


def ask(port: int, path: str) -> Any:
    """Return the JSON body of the response to an ordinary request."""
    return request(port, path).json()


def rejected(service: Service) -> dict[str, int]:
    """Return ``viralfx_http_rejected_total`` by reason, without zeros."""
    text = (service.manage if service.management_port else service.get)("/metrics").body.decode()
    found = re.findall(
        r'^viralfx_http_rejected_total\{reason="(\w+)"\} ([\d.e+]+)$', text, re.MULTILINE
    )
    return {reason: int(float(count)) for reason, count in found if float(count)}


@contextmanager
def silent(port: int, count: int) -> Iterator[Sequence[socket.socket]]:
    """Open connections that send nothing; yield those that the server accepts."""
    held: list[socket.socket] = []
    try:
        for _ in range(count):
            with suppress(OSError):
                held.append(socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_SECONDS))
        yield held
    finally:
        for connection in held:
            connection.close()
