"""Measures the longest time between two renewals of a lease while code blocks the event loop.

A thread renews the lease in a Postgres that this script starts, as a worker's thread does.
"""

import argparse
import asyncio
import hashlib
import json
import re
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from benchmarks.results import circumstances, command, publish, table
from tests.integration.postgres_clients import config_of, migrated, opened
from tests.servers.postgres import PostgresServer, postgres_server

from viralfx.core.clock import SystemClock
from viralfx.jobs.ledger import LeaseStore, Registration
from viralfx.jobs.postgres import PostgresLeaseStore
from viralfx.jobs.worker.lease import LeaseThread, WorkerView
from viralfx.postgres import PostgresDatabase

LEASE = 0.6
BLOCK_SECONDS = 3.0


@dataclass
class Worker:
    """Records the times of its renewals."""

    renewed: list[float] = field(default_factory=list)

    def view(self) -> WorkerView:
        """Return no jobs."""
        return WorkerView(holding=(), busy_until=time.monotonic() + 60.0)

    async def register(self, store: LeaseStore, view: WorkerView | None) -> Registration:
        """Renew the lease."""
        holding = None if view is None else view.holding
        answer = await store.register("w", ["default"], LEASE, holding)
        self.renewed.append(time.monotonic())
        return answer

    def on_renewed(self, began: float, answer: Registration) -> None:
        """Ignore it: the event loop receives it late."""

    def on_failed(self, error: Exception) -> None:
        """Stop the measurement."""
        raise error


def repeated(step: Callable[[], object]) -> None:
    """Repeat a step for the time of a block."""
    until = time.monotonic() + BLOCK_SECONDS
    while time.monotonic() < until:
        step()


_DATA = bytes(20_000_000)
_TEXT = json.dumps(list(range(3_000_000)))

KINDS: dict[str, Callable[[], object]] = {
    "`time.sleep`": lambda: time.sleep(BLOCK_SECONDS),
    "`subprocess.run`": lambda: subprocess.run(["sleep", f"{BLOCK_SECONDS:g}"], check=True),  # noqa: S607
    "Python code": lambda: repeated(lambda: [number * 2 for number in range(1000)]),
    "`hashlib.sha256`, 20 MB each": lambda: repeated(lambda: hashlib.sha256(_DATA)),
    "`zlib.compress`, 20 MB each": lambda: repeated(lambda: zlib.compress(_DATA)),
    "`json.loads`, 27 MB": lambda: json.loads(_TEXT),
    "`sum(range(3 * 10**7))`": lambda: sum(range(3 * 10**7)),
    "`re` that backtracks": lambda: re.match(r"(a+)+$", "a" * 23 + "b"),
}


async def measure(pool: PostgresDatabase, block: Callable[[], object]) -> tuple[float, float]:
    """Return how long the code blocked, and the longest time between renewals meanwhile."""
    worker = Worker()
    thread = LeaseThread(
        worker,
        lambda: PostgresLeaseStore(pool),
        lease=LEASE,
        retry_delay=lambda _: 0.01,
        clock=SystemClock(),
    )
    renewing = asyncio.create_task(thread.run())
    while len(worker.renewed) < 3:  # noqa: ASYNC110 - the thread sets no event
        await asyncio.sleep(0.01)
    began = time.monotonic()
    block()
    ended, count = time.monotonic(), len(worker.renewed)
    while len(worker.renewed) == count:  # noqa: ASYNC110 - the thread sets no event
        await asyncio.sleep(0.01)
    renewing.cancel()
    await asyncio.wait({renewing})
    times = worker.renewed
    gaps = [b - a for a, b in pairwise(times) if b > began and a < ended]
    return ended - began, max(gaps)


async def measured(server: PostgresServer, rounds: int) -> list[tuple[str, float, float]]:
    """Return the kind of code, its longest block, and the longest time between renewals."""
    config = await migrated(config_of(server))
    async with opened(config) as pool:
        rows = []
        for kind, block in KINDS.items():
            pairs = [await measure(pool, block) for _ in range(rounds)]
            rows.append((kind, max(b for b, _ in pairs), max(g for _, g in pairs)))
        return rows


def main() -> int:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trial", action="store_true", help="record nothing")
    options = parser.parse_args()
    with postgres_server() as server:
        rows = asyncio.run(measured(server, options.rounds))
    lines = [
        *circumstances(
            command("bench-blocked"),
            f"Lease {LEASE:g} s, renewed every {LEASE / 3:g} s",
            f"The longest of {options.rounds} rounds",
        ),
        "",
        *table(
            ("code on the event loop", "blocks, s", "longest time between renewals, s"),
            [(kind, f"{blocked:.2f}", f"{gap:.2f}") for kind, blocked, gap in rows],
        ),
    ]
    return publish("blocked.py", lines, (), check=False, record=not options.trial)


if __name__ == "__main__":
    sys.exit(main())
