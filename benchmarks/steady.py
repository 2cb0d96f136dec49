"""Requests at a steady rate, whatever the answers do, over connections that stay open.

What users are, and closed loops are not: a server that stands still is asked all the same. Run as
a program it prints what it saw.
"""

import asyncio
import json
import sys
import time
from collections import Counter, deque
from typing import Any, cast

import uvloop
from benchmarks.keepalive import HEADERS

_CONNECTIONS = 8
"""Open from the beginning; where none is idle when a request is due, another one is made."""
_LONGEST = 30.0
"""Seconds that the last answers are waited for."""
_LOOK_SECONDS = 0.01


class Steady:
    """Sends ``rate`` requests a second to one path; times are seconds from sending to answer."""

    def __init__(self, port: int, path: str, rate: float) -> None:
        lines = [f"GET {path} HTTP/1.1", "Host: localhost", *map(": ".join, HEADERS.items())]
        self.request = "\r\n".join([*lines, "", ""]).encode()
        self.idle: deque[_Connection] = deque()
        self.answered: list[float] = []
        self.lost: Counter[str] = Counter()
        """Why requests have no answer, or none that is a success."""
        self.latest = 0.0
        """Seconds by which a request was sent after it was due: the client's own failing."""
        self.most_connections = 0
        self._port, self._rate = port, rate
        self._opening: set[asyncio.Task[None]] = set()
        self._connections = 0

    async def run(self, seconds: float) -> None:
        """Send, and wait for the answers of all that was sent."""
        for _ in range(_CONNECTIONS):
            self.idle.append(await self._open())
        began, count = time.perf_counter(), round(seconds * self._rate)
        for number in range(count):
            due = began + number / self._rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            self.latest = max(self.latest, time.perf_counter() - due)
            self._send()
        deadline = time.perf_counter() + _LONGEST
        while (missing := count - len(self.answered) - self.lost.total()) > 0:
            await asyncio.sleep(_LOOK_SECONDS)
            if time.perf_counter() > deadline:
                self.lost["no answer"] += missing

    def told(self) -> dict[str, Any]:
        """Return what was seen, in milliseconds."""
        ordered = sorted(self.answered)
        shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
        return {
            "answered": len(ordered),
            "lost": dict(self.lost),
            "connections": self.most_connections,
            "late": self.latest * 1000,
            **{name: _quantile(ordered, share) * 1000 for name, share in shares.items()},
        }

    def _send(self) -> None:
        at = time.perf_counter()
        if self.idle:
            # The one that has been idle longest: none gets so old that the server closes it.
            self.idle.popleft().send(at)
        else:
            task = asyncio.get_running_loop().create_task(self._send_on_another(at))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _send_on_another(self, at: float) -> None:
        try:
            connection = await self._open()
        except OSError as error:
            self.lost[f"refused: {error.strerror}"] += 1
        else:
            connection.send(at)

    async def _open(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: _Connection(self), "127.0.0.1", self._port
        )
        self._connections += 1
        self.most_connections = max(self.most_connections, self._connections)
        return connection

    def closed(self) -> None:
        """Count a connection out."""
        self._connections -= 1


class _Connection(asyncio.Protocol):
    def __init__(self, load: Steady) -> None:
        self._load = load
        self._received = b""
        self._sent_at: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def send(self, at: float) -> None:
        self._sent_at = at
        self._transport.write(self._load.request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        length_at = head.find(b"content-length: ")
        if not blank or self._sent_at is None:
            return
        if len(body) < int(head[length_at + 16 :].split(b"\r", 1)[0]):
            return
        self._received = b""
        if head.startswith(b"HTTP/1.1 2"):
            self._load.answered.append(time.perf_counter() - self._sent_at)
        else:
            self._load.lost[head.split(b"\r", 1)[0].decode("latin-1")] += 1
        self._sent_at = None
        if b"connection: close" in head:
            self._transport.close()
        else:
            self._load.idle.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._load.closed()
        if self._sent_at is not None:
            self._load.lost[f"closed: {exc}"] += 1
        elif self in self._load.idle:
            self._load.idle.remove(self)


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


if __name__ == "__main__":
    port_text, requested, rate_text, seconds_text = sys.argv[1:]
    steady = Steady(int(port_text), requested, float(rate_text))
    uvloop.run(steady.run(float(seconds_text)))
    print(json.dumps(steady.told()))
