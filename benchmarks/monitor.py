"""Measures the processor time of a process that runs only health checks.

Each size runs in a process of its own, on uvloop, with the log, the lifecycle and the metrics of a
service. Each check passes at once, so the monitor itself is measured. A reader takes the report
every 100 ms and keeps it, as probes do. The floor is a process with the same number of tasks that
only sleep: the cost of event loop and machine without the monitor.
"""

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import uvloop
from benchmarks.results import Target, circumstances, command, publish, table, target_table

from viralfx.bootstrap.assembly import assemble
from viralfx.domain.health.check_runner import CheckCompleted
from viralfx.domain.health.model import Observation, Status
from viralfx.settings import Settings

SIZES = (10, 100, 1000, 3000)
AIMED_AT = 1000
"""Checks of the target."""
MAX_PERCENT = 5.0
"""Percent of a core."""
INTERVAL = 5.0
"""Seconds between two attempts of a check: the default of HEALTH_CHECK_INTERVAL."""
WARM_UP = 1.2 * INTERVAL
"""Seconds until the attempts, which all start together, are spread over the interval."""
READ_EVERY = 0.1
ROUNDS = 3
SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Reading:
    """One process in one round."""

    percent: float
    """Processor time, in percent of a core."""
    each: float
    """Microseconds for each attempt."""


class Passing:
    """A check that passes at once."""

    async def check(self) -> Observation:
        """Return a passing observation."""
        return Observation(status=Status.PASS, message="fine")


async def monitored(checks: int, seconds: float) -> Reading:
    """Run the monitor."""
    own = {f"check-{number}": Passing() for number in range(checks)}
    operations = assemble(Settings(), checks=own).operations
    monitor, attempts, kept = operations.monitor, 0, None

    def count(event: object) -> None:
        nonlocal attempts
        attempts += isinstance(event, CheckCompleted)

    monitor.subscribe(count)
    operations.lifecycle.application_ready()
    await operations.start()
    monitor.start()

    async def work() -> None:
        nonlocal kept
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            await asyncio.sleep(READ_EVERY)
            kept = monitor.report()

    await asyncio.sleep(WARM_UP)
    reading = await _measure(work, lambda: attempts)
    await monitor.stop()
    return reading


async def sleeping(tasks: int, seconds: float) -> Reading:
    """Run tasks that only sleep, at the rate of the checks."""
    turns = 0

    async def sleep(number: int) -> None:
        nonlocal turns
        await asyncio.sleep(number / tasks * INTERVAL)
        while True:
            await asyncio.sleep(INTERVAL)
            turns += 1

    running = [asyncio.create_task(sleep(number)) for number in range(tasks)]
    await asyncio.sleep(WARM_UP)
    reading = await _measure(lambda: asyncio.sleep(seconds), lambda: turns)
    for task in running:
        task.cancel()
    return reading


async def _measure(work: Callable[[], Awaitable[None]], counted: Callable[[], int]) -> Reading:
    first, cpu, began = counted(), time.process_time(), time.monotonic()
    await work()
    cpu, passed = time.process_time() - cpu, time.monotonic() - began
    return Reading(100 * cpu / passed, 1e6 * cpu / max(1, counted() - first))


PROGRAMS = {"monitor": monitored, "floor": sleeping}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(prog="just bench-monitor", description=__doc__)
    add = parser.add_argument
    add("--check", action="store_true", help="exit 1 when the target is missed")
    add("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    add("--seconds", type=float, default=SECONDS, help=f"of each process; default: {SECONDS:g}")
    add("--dry", action="store_true", help="leave RESULTS.md as it is")
    add("--process", nargs=2, metavar=("PROGRAM", "SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.process:
        program, size = options.process
        reading = uvloop.run(PROGRAMS[program](int(size), options.seconds))
        print(reading.percent, reading.each)
        return 0
    keys = [(program, size) for size in SIZES for program in PROGRAMS]
    rounds = [{key: _run(*key, options.seconds) for key in keys} for _ in range(options.rounds)]
    middle = {key: _median([readings[key] for readings in rounds]) for key in keys}
    targets = [
        Target(
            what=f"{AIMED_AT} checks at {INTERVAL:g} s",
            measured=middle["monitor", AIMED_AT].percent,
            limit=MAX_PERCENT,
            at_least=False,
            unit=" %",
            remark=f"of a core; the floor is {middle['floor', AIMED_AT].percent:.2f} %",
        )
    ]
    lines = [
        *circumstances(
            command("bench-monitor"),
            f"{len(rounds)} rounds of {options.seconds:g} s, one process at a time; medians",
            f"Each check is attempted every {INTERVAL:g} s; the report is read every"
            f" {READ_EVERY * 1000:g} ms",
        ),
        "",
        *_table(middle),
        "",
        *target_table(targets),
    ]
    return publish("monitor.py", lines, targets, check=options.check, record=not options.dry)


def _run(program: str, size: int, seconds: float) -> Reading:
    arguments = ["--process", program, str(size), "--seconds", str(seconds)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.monitor", *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    percent, each = map(float, done.stdout.split()[-2:])
    return Reading(percent, each)


def _median(readings: Sequence[Reading]) -> Reading:
    return Reading(
        statistics.median(each.percent for each in readings),
        statistics.median(each.each for each in readings),
    )


def _table(middle: dict[tuple[str, int], Reading]) -> list[str]:
    return table(
        ("checks", "% of a core", "floor %", "µs per attempt", "floor µs"),
        (
            (
                f"{size:,}",
                f"{middle['monitor', size].percent:.2f}",
                f"{middle['floor', size].percent:.2f}",
                f"{middle['monitor', size].each:.0f}",
                f"{middle['floor', size].each:.0f}",
            )
            for size in SIZES
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
