"""Measures start, stop, and requests lost at a stop under load, compared with uvicorn.

The programs take turns; start-up and idle stop are measured on the same process.
"""

import argparse
import asyncio
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.keepalive import KeepAliveClients
from benchmarks.results import Target, circumstances, publish, table, target_table
from benchmarks.servers import (
    BACKEND,
    BARE_ASGI,
    BARE_LITESTAR,
    CLIENT_CORE,
    MOUNTED,
    Program,
    Server,
    on_core,
    viralfx,
)

ROUNDS = 15
RUNS_UNDER_LOAD = 10
CLIENTS = 256
BUSY_SECONDS = 0.5
"""Seconds of load before SIGTERM."""
LEAVE_AFTER = 0.5
"""Seconds after SIGTERM at which the clients reconnect elsewhere, as behind a load balancer."""
MAX_SECONDS = 30.0

FIRST_200 = {
    BARE_ASGI: "/health/live",
    BARE_LITESTAR: "/health/live",
    BACKEND: "/health/ready",
    MOUNTED: "/work",
}
UNDER_LOAD = (
    viralfx("viralfx serve --app", "benchmarks.peers.mounted", SHUTDOWN_READINESS_DELAY="1000"),
    BARE_LITESTAR,
)


@dataclass(frozen=True, slots=True)
class Life:
    """One process without load."""

    start: float
    """Seconds from its start to the first 200."""
    stop: float
    """Seconds from SIGTERM to its end."""


@dataclass(frozen=True, slots=True)
class Stop:
    """One stop under load."""

    responded: int
    lost: int
    why: str
    seconds: float
    """Seconds from SIGTERM to the end of the process."""
    code: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    options = parser.parse_args(arguments)
    with on_core(CLIENT_CORE):
        rounds = [{p: live_once(p) for p in FIRST_200} for _ in range(1 + options.rounds)]
        stops = [{p: stop_under_load(p) for p in UNDER_LOAD} for _ in range(RUNS_UNDER_LOAD)]
    del rounds[0]  # filled the caches
    targets = [*_idle_targets(rounds), *_load_targets(stops)]
    lines = [
        *circumstances(
            "Command: `python benchmarks/shutdown.py`",
            f"Start and idle stop: medians of {len(rounds)} interleaved rounds",
            f"Stop under load: {CLIENTS} keep-alive clients on a 20 ms handler, "
            f"SHUTDOWN_READINESS_DELAY=1000, clients leave {LEAVE_AFTER:g} s after SIGTERM; "
            f"{len(stops)} interleaved runs",
        ),
        "",
        *_life_table(rounds),
        "",
        *_stop_table(stops),
        "",
        *target_table(targets),
    ]
    return publish("shutdown.py", lines, targets, check=options.check)


def live_once(program: Program) -> Life:
    """Start a program, wait for its first 200, and stop it."""
    with Server(program) as server:
        start = server.wait_for_200(FIRST_200[program])
        server.terminate()
        return Life(start, server.wait_for_exit()[1])


def stop_under_load(program: Program) -> Stop:
    """Stop a program while clients use it."""
    with Server(program) as server:
        server.wait_for_200("/slow")
        clients = KeepAliveClients(server.port, "/slow", count=CLIENTS)
        code, seconds = uvloop.run(_use_and_stop(server, clients))
    reasons = Counter(clients.lost).most_common(1)
    why = reasons[0][0] if reasons else ""
    return Stop(clients.responded, len(clients.lost), why, seconds, code)


async def _use_and_stop(server: Server, clients: KeepAliveClients) -> tuple[int, float]:
    async with asyncio.timeout(MAX_SECONDS):
        await clients.come()
        await asyncio.sleep(BUSY_SECONDS)
        server.terminate()
        # In a thread, so that the end is noticed while the clients continue.
        ended = asyncio.create_task(asyncio.to_thread(server.wait_for_exit))
        await asyncio.sleep(LEAVE_AFTER)
        await clients.leave()
        return await ended


def _idle_targets(rounds: Sequence[dict[Program, Life]]) -> list[Target]:
    return [
        Target(
            what="start of viralfx serve / start of bare Litestar",
            measured=statistics.median(r[BACKEND].start / r[BARE_LITESTAR].start for r in rounds),
            limit=1.2,
            at_least=False,
            remark="to the first 200, for viralfx of `/health/ready`",
        ),
        Target(
            what="idle stop of viralfx serve - idle stop of bare uvicorn",
            measured=statistics.median(
                (r[BACKEND].stop - r[BARE_ASGI].stop) * 1000 for r in rounds
            ),
            limit=150,
            at_least=False,
            unit=" ms",
            remark="SIGTERM to the end of the process",
        ),
    ]


def _load_targets(stops: Sequence[dict[Program, Stop]]) -> list[Target]:
    ours, theirs = ([stop[program] for stop in stops] for program in UNDER_LOAD)
    return [
        Target(
            what=f"requests lost in {len(stops)} stops of viralfx serve under load",
            measured=sum(stop.lost for stop in ours),
            limit=0,
            at_least=False,
            remark=f"bare uvicorn: {sum(stop.lost for stop in theirs)}",
        ),
        Target(
            what=f"stops of {len(stops)} with exit code 0",
            measured=sum(stop.code == 0 for stop in ours),
            limit=len(stops),
            at_least=True,
        ),
    ]


def _life_table(rounds: Sequence[dict[Program, Life]]) -> list[str]:
    return table(
        ("program", "start ms", "idle stop ms"),
        (
            (
                f"{program.name}, first 200 of `{path}`",
                f"{statistics.median(r[program].start for r in rounds) * 1000:.0f}",
                f"{statistics.median(r[program].stop for r in rounds) * 1000:.0f}",
            )
            for program, path in FIRST_200.items()
        ),
    )


def _stop_table(stops: Sequence[dict[Program, Stop]]) -> list[str]:
    rows = []
    for program in UNDER_LOAD:
        mine = [stop[program] for stop in stops]
        why = Counter(stop.why for stop in mine if stop.why).most_common(1)
        rows.append(
            (
                program.name,
                f"{sum(stop.responded for stop in mine):,}",
                f"{sum(stop.lost for stop in mine):,}",
                f"{statistics.median(stop.seconds for stop in mine):.2f}",
                ", ".join(str(code) for code in sorted({stop.code for stop in mine})),
                why[0][0] if why else "",
            )
        )
    header = ("program", "answered", "lost", "stop s", "exit codes", "mostly")
    return table(header, rows)


if __name__ == "__main__":
    sys.exit(main())
