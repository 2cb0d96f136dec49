"""Concurrent connections that send requests without an end."""

import random
import select
import selectors
import socket
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from math import inf
from typing import Self

from tests.edge.wire import HEADER_LINES, statuses

MIB = 2**20
PAUSE_SECONDS = 0.002
"""Pause while the rate allows no further data."""
HEADERS = (b"GET / HTTP/1.1\r\nHost: x\r\n", HEADER_LINES)
ONE_HEADER = (b"GET / HTTP/1.1\r\nHost: x\r\nX: ", b"a" * 65536)
ONE_URL = (b"GET /", b"a" * 65536)


@dataclass
class Outcome:
    """The result of a flood."""

    sent: int = 0
    """Bytes that the kernel accepted."""
    ends: Counter[str] = field(default_factory=Counter)
    """The number of connections by their end: a status, closed, reset or still open."""


@dataclass
class _Sender:
    opening: memoryview
    piece: memoryview
    place: int = 0
    received: bytes = b""


def flood(
    port: int,
    kinds: Sequence[tuple[bytes, bytes]],
    *,
    connections: int,
    total: int,
    seconds: float,
    rate: float = inf,
) -> Outcome:
    """Send endless requests over concurrent connections, until ``total`` bytes are sent.

    ``rate``: maximum bytes per second. The connections use the kinds in turn. A connection that the
    server closes is counted by its status and replaced. After ``total`` bytes, connections are no
    longer replaced, and the flood ends with the last one, or ``seconds`` after its start.
    """
    deadline = time.monotonic() + seconds
    with _Flood(port, kinds, total, rate) as senders:
        for _ in range(connections):
            senders.add()
        while senders.any() and time.monotonic() < deadline:
            senders.turn()
    return senders.outcome


class _Flood:
    """The connections of a flood; the end of the block closes the remaining ones."""

    def __init__(
        self, port: int, kinds: Sequence[tuple[bytes, bytes]], total: int, rate: float
    ) -> None:
        self.outcome = Outcome()
        self._port, self._kinds, self._total, self._rate = port, cycle(kinds), total, rate
        self._started_at = time.monotonic()
        self._order = random.Random(1)  # noqa: S311 - no secret
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for key in list(self._selector.get_map().values()):
            self._end(key, "open")
        self._selector.close()

    def add(self) -> None:
        """Open a connection."""
        opening, piece = next(self._kinds)
        connection = socket.socket()
        connection.setblocking(False)
        connection.connect_ex(("127.0.0.1", self._port))
        sender = _Sender(memoryview(opening), memoryview(piece))
        self._selector.register(connection, selectors.EVENT_READ | selectors.EVENT_WRITE, sender)

    def any(self) -> bool:
        """Return True if a connection is open."""
        return bool(self._selector.get_map())

    def turn(self) -> None:
        """Read or write once on each ready connection, within the rate."""
        ready, held_back = self._selector.select(0.5), False
        self._order.shuffle(ready)
        for key, events in ready:
            allowed = self._rate * (time.monotonic() - self._started_at)
            if not events & selectors.EVENT_READ and self.outcome.sent > allowed:
                held_back = True
                continue
            try:
                self.outcome.sent += _serve(key, events)
            except BlockingIOError:
                continue
            except EOFError:
                self._replace(key, "closed")
            except OSError:
                self._replace(key, "reset")

        if held_back:
            select.select([], [], [], PAUSE_SECONDS)

    def _replace(self, key: selectors.SelectorKey, how: str) -> None:
        self._end(key, how)
        if self.outcome.sent < self._total:
            self.add()

    def _end(self, key: selectors.SelectorKey, how: str) -> None:
        connection = key.fileobj
        assert isinstance(connection, socket.socket)
        if how == "reset":  # data received before the reset can still be read
            with suppress(OSError):
                key.data.received += connection.recv(65536)
        found = statuses(key.data.received)
        self.outcome.ends[str(found[-1]) if found else how] += 1
        self._selector.unregister(connection)
        connection.close()


def _serve(key: selectors.SelectorKey, events: int) -> int:
    """Read or write once; return the bytes sent. Raises ``EOFError`` if the server closed."""
    sender, connection = key.data, key.fileobj
    assert isinstance(connection, socket.socket)
    if events & selectors.EVENT_READ:
        if not (data := connection.recv(65536)):
            raise EOFError
        sender.received += data
        return 0
    if sender.opening:
        count = connection.send(sender.opening)
        sender.opening = sender.opening[count:]
        return count
    count = connection.send(sender.piece[sender.place :])
    sender.place = (sender.place + count) % len(sender.piece)
    return count
