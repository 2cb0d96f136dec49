"""Sends requests at a steady rate, independent of responses, over connections that stay open.

Unlike closed loops, real users also send requests to a server that does not respond. Run as a
program it prints its results.
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
"""Connections at the start; if none is idle when a request is due, another one is opened."""
_LAST_RESPONSES_SECONDS = 30.0
"""Seconds to wait for the last responses."""
_POLL_SECONDS = 0.01


class Steady:
    """Sends ``rate`` requests a second to one path; times are seconds from sending to response."""

    def __init__(self, port: int, path: str, rate: float) -> None:
        lines = [f"GET {path} HTTP/1.1", "Host: localhost", *map(": ".join, HEADERS.items())]
        self.request = "\r\n".join([*lines, "", ""]).encode()
        self.idle: deque[_Connection] = deque()
        self.responded: list[float] = []
        self.lost: Counter[str] = Counter()
        """Reasons of requests without a successful response."""
        self.latest = 0.0
        """Seconds by which a request was sent too late: a fault of the client."""
        self.most_connections = 0
        self._port, self._rate = port, rate
        self._opening: set[asyncio.Task[None]] = set()
        self._connections = 0

    async def run(self, seconds: float) -> None:
        """Send all requests, and wait for their responses."""
        for _ in range(_CONNECTIONS):
            self.idle.append(await self._open())
        began, count = time.perf_counter(), round(seconds * self._rate)
        for number in range(count):
            due = began + number / self._rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            self.latest = max(self.latest, time.perf_counter() - due)
            self._send()
        deadline = time.perf_counter() + _LAST_RESPONSES_SECONDS
        while (missing := count - len(self.responded) - self.lost.total()) > 0:
            await asyncio.sleep(_POLL_SECONDS)
            if time.perf_counter() > deadline:
                self.lost["no answer"] += missing

    def results(self) -> dict[str, Any]:
        """Return the results, in milliseconds."""
        ordered = sorted(self.responded)
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
            # The longest idle one, so that the server does not close any for its age.
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
        """Count a connection as closed."""
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
            self._load.responded.append(time.perf_counter() - self._sent_at)
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
    print(json.dumps(steady.results()))
