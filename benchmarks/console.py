"""Open pages of the console: the cost of probes beside them, memory per page, and the stop.

Each round measures probes without pages, then with them, on the same process. The ratio is that of
requests for each second of the process's processor time, which other programs do not change. The
stops without and with pages take turns, each of a process of its own.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import psutil
from benchmarks.results import Target, circumstances, command, publish, table, target_table
from benchmarks.servers import CLIENT_CORE, SERVER_CORE, on_core
from tests.servers.ports import free_port

READ_BYTES = 65536
PATHS = ("/health/ready", "/api/v1/queues")
MIN_RATE = 0.95
MAX_KIB = 64.0
MAX_STOP_MILLISECONDS = 100.0
"""How much later a process may end because of its pages."""
_WARM_UP_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Stop:
    """One stop of a process."""

    seconds: float
    """From SIGTERM to the end of the process."""
    cpu_seconds: float
    """Processor time of the process meanwhile."""
    code: int
    reached: int
    """Pages that got the last event."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(prog="just bench-console", description=__doc__)
    add = parser.add_argument
    add("--check", action="store_true", help="exit 1 when a target is missed")
    add("--pages", type=int, default=1000, help="default: 1000")
    add("--rounds", type=int, default=5, help="default: 5; 0: only the stops")
    add("--seconds", type=float, default=5.0, help="of one measurement of a rate; default: 5")
    add("--stops", type=int, default=5, help="stops without and with pages; default: 5 each")
    add("--dry", action="store_true", help="leave RESULTS.md as it is")
    options = parser.parse_args(arguments)
    targets, rows = asyncio.run(_measure(options))
    lines = [
        *circumstances(
            command("bench-console"),
            f"{options.pages} pages that read their stream",
            f"Rates: medians of {options.rounds} rounds; stops: of {options.stops}, in turn",
        ),
        "",
        *table(("stop", "median ms", "least", "most", "processor ms", "last event"), rows),
        "",
        *target_table(targets),
    ]
    return publish("console.py", lines, targets, check=options.check, record=not options.dry)


async def _measure(options: argparse.Namespace) -> tuple[list[Target], list[Sequence[str]]]:
    targets: list[Target] = []

    async def measure(port: int, process: subprocess.Popen[bytes]) -> None:
        targets.extend(await rates(options, port, process))

    if options.rounds:
        await with_process(measure)
    alone: list[Stop] = []
    beside: list[Stop] = []
    for _ in range(options.stops):
        for stops, count in ((alone, 0), (beside, options.pages)):

            async def stop(port: int, process: subprocess.Popen[bytes]) -> None:
                stops.append(await stop_with(count, port, process))  # noqa: B023 - awaited here

            await with_process(stop)
    targets.append(
        Target(
            what=f"stop with {options.pages} open pages - stop without",
            measured=(_middle(beside) - _middle(alone)) * 1000,
            limit=MAX_STOP_MILLISECONDS,
            at_least=False,
            unit=" ms",
            remark="SIGTERM to the end of the process",
        )
    )
    if codes := {each.code for each in (*alone, *beside)} - {0}:
        raise SystemExit(f"exit codes of the stops: {codes}")
    return targets, [
        _row("without pages", alone, 0),
        _row(f"with {options.pages} pages", beside, options.pages),
    ]


def _middle(stops: Sequence[Stop]) -> float:
    return statistics.median(each.seconds for each in stops)


def _row(name: str, stops: Sequence[Stop], count: int) -> Sequence[str]:
    return (
        name,
        f"{_middle(stops) * 1000:.0f}",
        f"{min(each.seconds for each in stops) * 1000:.0f}",
        f"{max(each.seconds for each in stops) * 1000:.0f}",
        f"{statistics.median(each.cpu_seconds for each in stops) * 1000:.0f}",
        f"{min(each.reached for each in stops)} of {count}" if count else "",
    )


class Page:
    """A client that reads one stream."""

    def __init__(self, writer: asyncio.StreamWriter, reader: asyncio.StreamReader) -> None:
        self.reached = False
        self.writer = writer
        self.reading = asyncio.ensure_future(self._drain(reader))

    async def _drain(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(READ_BYTES):
            self.reached = self.reached or b"event: bye" in data

    def leave(self) -> None:
        """Close the connection."""
        self.writer.close()
        self.reading.cancel()


async def open_pages(port: int, count: int) -> list[Page]:
    """Open some pages that read their stream."""
    opened = []
    for _ in range(count):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await reader.readuntil(b"event: snapshot")
        opened.append(Page(writer, reader))
    return opened


async def probe_rate(process: psutil.Process, port: int, path: str, seconds: float) -> float:
    """Return the requests of 16 keep-alive clients for each second of the process's own time."""
    before = _cpu_seconds(process)
    arguments = (sys.executable, "-m", "benchmarks.keepalive", str(port), path, "16", str(seconds))
    load = await asyncio.create_subprocess_exec(*arguments, stdout=subprocess.PIPE)
    output, _ = await load.communicate()
    found = json.loads(output)
    if found["failed"]:
        raise SystemExit(f"{found['failed']} requests failed: {found['why']}")
    return float(found["requests"]) / (_cpu_seconds(process) - before)


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def rates(
    options: argparse.Namespace, port: int, started: subprocess.Popen[bytes]
) -> list[Target]:
    """Run the rounds, and return the ratios of the rates and the memory of a page."""
    process = psutil.Process(started.pid)
    before = process.memory_info().rss
    per_page: list[float] = []
    targets = []
    for path in PATHS:
        ratios = []
        for _ in range(options.rounds):
            alone = await probe_rate(process, port, path, options.seconds)
            opened = await open_pages(port, options.pages)
            per_page.append((process.memory_info().rss - before) / options.pages / 1024)
            beside = await probe_rate(process, port, path, options.seconds)
            for page in opened:
                page.leave()
            ratios.append(beside / alone)
        targets.append(
            Target(
                what=f"`{path}` beside {options.pages} open pages, to none",
                measured=statistics.median(ratios),
                limit=MIN_RATE,
                at_least=True,
                remark="requests for each second of processor time",
            )
        )
    targets.append(
        Target(
            what="memory of an open page",
            measured=max(per_page),
            limit=MAX_KIB,
            at_least=False,
            unit=" KiB",
        )
    )
    return targets


async def stop_with(count: int, port: int, started: subprocess.Popen[bytes]) -> Stop:
    """Stop a process with some open pages."""
    process = psutil.Process(started.pid)
    opened = await open_pages(port, count)
    used, began = _cpu_seconds(process), time.monotonic()
    started.send_signal(signal.SIGTERM)
    # Not Popen.wait, which polls; and in a thread, so that the pages go on reading.
    _, status, usage = await asyncio.to_thread(os.wait4, started.pid, 0)
    seconds = time.monotonic() - began
    started.returncode = os.waitstatus_to_exitcode(status)
    await asyncio.gather(*(page.reading for page in opened), return_exceptions=True)
    for page in opened:
        page.writer.close()
    return Stop(
        seconds,
        usage.ru_utime + usage.ru_stime - used,
        started.returncode,
        sum(page.reached for page in opened),
    )


def _start(port: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "CONSOLE_MAX_STREAMS": "10000",
        "LOG_LEVEL": "error",
        "HTTP_MAX_CONNECTIONS": "4000",
    }
    with on_core(SERVER_CORE):
        arguments = (sys.executable, "-m", "viralfx", "serve", "--host", "127.0.0.1")
        return subprocess.Popen((*arguments, "--port", str(port)), env=environment)


async def with_process(work: Callable[[int, subprocess.Popen[bytes]], Awaitable[None]]) -> None:
    """Start a process with room for the pages, and do some work with it."""
    port = free_port()
    process = _start(port)
    try:
        for _ in range(600):
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
            else:
                writer.close()
                break
        await asyncio.sleep(_WARM_UP_SECONDS)
        with on_core(CLIENT_CORE):
            await work(port, process)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


if __name__ == "__main__":
    raise SystemExit(main())
