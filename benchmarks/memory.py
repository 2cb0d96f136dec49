"""Measures the memory of idle processes, compared with a bare Litestar application.

All programs run at the same time without requests; only their own work runs: health checks,
heartbeats, and polls for jobs.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from benchmarks.jobs.testbed import testbed
from benchmarks.results import Target, circumstances, command, publish, table, target_table
from benchmarks.servers import (
    BACKEND,
    BARE_ASGI,
    BARE_LITESTAR,
    MOUNTED,
    Program,
    Server,
    viralfx,
    worker,
)

ROUNDS = 3
SECONDS = 20.0
"""Seconds after the last program is ready: several rounds of all checks."""
MAX_MIB = 128.0
"""MiB: half of the limit in the manifests."""
MAX_TO_BARE = 1.05
MIB = 2**20
READING = (
    "RSS is what counts against a limit, USS what would be free without the process. Medians of "
    "the rounds; growth is from the first second to the last."
)


@dataclass(frozen=True, slots=True)
class Reading:
    """One process at the end of a round; MiB."""

    rss: float
    uss: float
    growth: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(prog="just bench-memory", description=__doc__)
    add = parser.add_argument
    add("--check", action="store_true", help="exit 1 when a target is missed")
    add("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    add("--seconds", type=float, default=SECONDS, help=f"default: {SECONDS:g}")
    add("--dry", action="store_true", help="leave RESULTS.md as it is")
    options = parser.parse_args(arguments)
    with testbed() as bed:
        where = bed.our_environment(bed.ledger())
        servers = {name: where[name] for name in ("DATABASE_URL", "REDIS_HOST", "REDIS_PORT")}
        on_servers = viralfx("viralfx serve, Postgres and Redis", **servers)
        working = worker("viralfx worker, Postgres and Redis", **servers)
        ready = {
            BARE_ASGI: "/health/live",
            BARE_LITESTAR: "/health/live",
            MOUNTED: "/health/ready",
            BACKEND: "/health/ready",
            on_servers: "/health/ready",
            working: "/health/ready",
        }
        rounds = [_round(ready, options.seconds) for _ in range(options.rounds)]
    middle = {p: _median([readings[p] for readings in rounds]) for p in ready}
    bare = middle[BARE_LITESTAR].rss
    targets = [
        Target(
            what="idle RSS of viralfx serve / idle RSS of bare Litestar",
            measured=middle[BACKEND].rss / bare,
            limit=MAX_TO_BARE,
            at_least=False,
        )
    ]
    targets += [
        Target(
            what=f"idle RSS of {program.name}",
            measured=middle[program].rss,
            limit=MAX_MIB,
            at_least=False,
            unit=" MiB",
            remark=f"{middle[program].rss / bare:.2f} times bare Litestar's",
        )
        for program in (BACKEND, on_servers, working)
    ]
    lines = [
        *circumstances(
            command("bench-memory"),
            f"{len(rounds)} rounds of {options.seconds:g} s; all programs idle beside each other",
        ),
        "",
        *_table(middle),
        "",
        *target_table(targets),
        "",
        READING,
    ]
    return publish("memory.py", lines, targets, check=options.check, record=not options.dry)


def _round(ready: Mapping[Program, str], seconds: float) -> dict[Program, Reading]:
    with ExitStack() as stack:
        running = {p: stack.enter_context(Server(p, anywhere=True)) for p in ready}
        for program, server in running.items():
            server.wait_for_200(ready[program], seconds=60)
        time.sleep(1.0)
        first = {program: server.rss() for program, server in running.items()}
        time.sleep(seconds)
        return {
            program: Reading(
                server.rss() / MIB, server.uss() / MIB, (server.rss() - first[program]) / MIB
            )
            for program, server in running.items()
        }


def _median(readings: Sequence[Reading]) -> Reading:
    return Reading(
        statistics.median(each.rss for each in readings),
        statistics.median(each.uss for each in readings),
        statistics.median(each.growth for each in readings),
    )


def _table(middle: Mapping[Program, Reading]) -> list[str]:
    bare = middle[BARE_LITESTAR].rss
    return table(
        ("program", "RSS MiB", "to bare Litestar", "USS MiB", "growth MiB"),
        (
            (
                program.name,
                f"{reading.rss:.1f}",
                f"{reading.rss / bare:.2f}",
                f"{reading.uss:.1f}",
                f"{reading.growth:+.2f}",
            )
            for program, reading in middle.items()
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
