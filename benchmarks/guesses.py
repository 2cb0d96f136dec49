"""Counts how many wrong tokens a second a process answers, and measures the key of a session.

A guesser sends one request after another on each of some connections, and connects again where the
process ends one. A patient guesser waits for each response. A hasty one gives up a response after
50 ms, since a right token is answered at once, and connects again. All come from one address.
Meanwhile requests with the right token are timed. The program also runs in a checkout of an older
version, for the numbers before.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress

from benchmarks.results import circumstances, command, publish, table
from tests.system.service import running

TOKEN = "planted-management-4b7e1d9c6a02f853"
SECONDS = 10.0
CONNECTIONS = 50
_HASTE = 0.05


def _request(token: str) -> bytes:
    lines = ("GET /health/tasks HTTP/1.1", "Host: localhost", f"Authorization: Bearer {token}")
    return "\r\n".join([*lines, "", ""]).encode()


class Guesser:
    """Sends wrong tokens over some connections until the time is over."""

    def __init__(self, port: int, *, connections: int, patience: float | None) -> None:
        self.tried = 0
        self._port = port
        self._connections = connections
        self._patience = patience

    async def run(self, seconds: float) -> float:
        """Return the guesses a second of which the guesser knows that they are wrong."""
        began = time.monotonic()
        guessing = [self._guess(began + seconds) for _ in range(self._connections)]
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(*guessing)
        return self.tried / (time.monotonic() - began)

    async def _guess(self, until: float) -> None:
        while time.monotonic() < until:
            with suppress(OSError, EOFError, TimeoutError):
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
                try:
                    await self._converse(reader, writer, until)
                finally:
                    writer.close()

    async def _converse(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, until: float
    ) -> None:
        while time.monotonic() < until:
            writer.write(_request(f"wrong-token-{self.tried}"))
            try:
                async with asyncio.timeout(self._patience):
                    closes = await read_response(reader)
            except TimeoutError:
                self.tried += 1
                return
            self.tried += 1
            if closes:
                return


async def read_response(reader: asyncio.StreamReader) -> bool:
    """Read a response; return whether the connection ends. Raises ``EOFError`` at its end."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    await reader.readexactly(length)
    return b"connection: close" in head


async def _right(port: int, times: list[float]) -> None:
    """Time requests with the right token until the task is cancelled."""
    while True:
        began = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(_request(TOKEN))
        await read_response(reader)
        writer.close()
        times.append((time.monotonic() - began) * 1000)
        await asyncio.sleep(0.1)


async def _measure(port: int, connections: int, patience: float | None) -> tuple[float, float]:
    times: list[float] = []
    right = asyncio.create_task(_right(port, times))
    rate = await Guesser(port, connections=connections, patience=patience).run(SECONDS)
    right.cancel()
    return rate, max(times)


def _key() -> str:
    """Return the milliseconds that the key of a session takes."""
    try:
        from viralfx.web.sessions import stretch  # noqa: PLC0415 - an older version has none
    except ImportError:
        return "none"
    times = []
    for _ in range(5):
        began = time.perf_counter()
        stretch(b"token")
        times.append((time.perf_counter() - began) * 1000)
    return f"{statistics.median(times):.0f} ms"


CASES = {
    "patient, 1 connection": (1, None),
    f"patient, {CONNECTIONS} connections": (CONNECTIONS, None),
    f"hasty, {CONNECTIONS} connections": (CONNECTIONS, _HASTE),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(prog="just bench-guesses", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="leave RESULTS.md as it is")
    options = parser.parse_args(arguments)
    rows = []
    for name, (connections, patience) in CASES.items():
        # A process for each, since one forgets guesses with time.
        with running(environment={"MANAGEMENT_TOKEN": TOKEN}) as service:
            service.wait_ready()
            rate, right = asyncio.run(_measure(service.port, connections, patience))
        rows.append((name, f"{rate:,.1f}", f"{right:.0f} ms"))
    lines = [
        *circumstances(command("bench-guesses"), f"{SECONDS:g} s for each guesser"),
        "",
        *table(("guesser", "wrong tokens a second", "slowest right token"), rows),
        "",
        f"The key of a session: {_key()}.",
    ]
    return publish("guesses.py", lines, (), check=False, record=not options.dry)


if __name__ == "__main__":
    raise SystemExit(main())
