"""An open-loop load generator: sends requests at a fixed rate, independent of responses."""

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from tests.system.service import ROOT

MAX_RESPONSE_SECONDS = 30.0


class Response(NamedTuple):
    """One request; ``status`` is None without a response. Times are in seconds."""

    path: str
    at: float
    status: int | None
    seconds: float
    body: str


class Load:
    """Sends ``rates`` requests a second to each path, from a separate process.

    A path stands for a GET request; ``POST `` before it selects another method. Each request opens
    a connection. A busy machine sends fewer, so tests count responses and not seconds.
    """

    def __init__(self, port: int, rates: Mapping[str, float]) -> None:
        self.responses: list[Response] = []
        self._arguments = [str(port), json.dumps(dict(rates))]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.system.load", *self._arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._reader.join(MAX_RESPONSE_SECONDS + 10)
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def of(self, path: str, *, since: float = 0.0) -> list[Response]:
        """Return the responses of a path to requests sent at ``since`` or later."""
        return [a for a in list(self.responses) if a.path == path and a.at >= since]

    def median(self, path: str, *, since: float = 0.0) -> float:
        """Return the median of a path's response times in seconds.

        On a busy machine it stays far below the time for which a waiting request would wait.
        """
        return statistics.median(a.seconds for a in self.of(path, since=since))

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.responses.append(Response(*json.loads(line)))


async def _ask(port: int, path: str) -> None:
    method, _, url = path.rpartition(" ")
    head = f"{method or 'GET'} {url} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n"
    if method:
        head += "Content-Length: 0\r\n"
    began = time.monotonic()
    status, body = None, ""
    with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, ValueError):
        async with asyncio.timeout(MAX_RESPONSE_SECONDS):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(head.encode() + b"\r\n")
                received = await reader.read()
            finally:
                writer.transport.abort()
        first, _, rest = received.partition(b"\r\n")
        body = rest.partition(b"\r\n\r\n")[2].decode()
        status = int(first.split(b" ")[1])
    sys.stdout.write(json.dumps((path, began, status, time.monotonic() - began, body[:200])) + "\n")


async def _send(group: asyncio.TaskGroup, port: int, path: str, rate: float) -> None:
    due = time.monotonic()
    while True:
        group.create_task(_ask(port, path))
        due += 1 / rate
        await asyncio.sleep(max(0.0, due - time.monotonic()))


async def _run(port: int, rates: dict[str, float]) -> None:
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_reader(0, stopped.set)
    async with asyncio.TaskGroup() as responses:
        senders: list[asyncio.Task[Any]] = [
            asyncio.create_task(_send(responses, port, path, rate)) for path, rate in rates.items()
        ]
        await stopped.wait()
        for sender in senders:
            sender.cancel()
        await asyncio.wait(senders)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr] # stdout is a file here
    asyncio.run(_run(int(sys.argv[1]), json.loads(sys.argv[2])))
