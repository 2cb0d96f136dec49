"""Counts the transactions of idle workers in Postgres.

Runs one worker process with its health checks beside rows of the others, which cost nothing, and
multiplies its transactions by the number of workers.
"""

import argparse
import sys
import time
from collections.abc import Sequence

from benchmarks.jobs.testbed import Testbed, testbed
from benchmarks.results import Target, circumstances, command, publish, table, target_table
from benchmarks.servers import Server, worker
from tests.servers.postgres import Database, transactions

WORKERS = (3, 30, 100)
SECONDS = 40.0
START_SECONDS = 12.0
"""Time until the first renewal after the start, which tells the worker of the others."""
MAX_TRANSACTIONS = 50.0
"""A second, of 100 workers."""
READING = (
    "The workers share ten polls a second, so most of the cost of many workers is their renewals "
    "and health checks."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(prog="just bench-idle", description=__doc__)
    add = parser.add_argument
    add("--seconds", type=float, default=SECONDS, help=f"of each row; default: {SECONDS:g}")
    add("--dry", action="store_true", help="leave RESULTS.md as it is")
    options = parser.parse_args(arguments)
    rates: dict[tuple[int, bool], float] = {}
    with testbed() as bed:
        for workers in WORKERS:
            for notified in (True, False):
                rates[workers, notified] = _rate(
                    bed, workers, notified=notified, seconds=options.seconds
                )
        where = str(bed)
    targets = [
        Target(
            what=f"transactions a second of {WORKERS[-1]} idle workers, {how}",
            measured=rates[WORKERS[-1], notified],
            limit=MAX_TRANSACTIONS,
            at_least=False,
        )
        for notified, how in ((True, "with Redis"), (False, "without Redis"))
    ]
    lines = [
        *circumstances(
            command("bench-idle"),
            where,
            f"{options.seconds:g} s for each number; default settings, health checks included",
        ),
        "",
        *table(
            ("workers", "transactions/s with Redis", "transactions/s without Redis"),
            (
                (str(workers), f"{rates[workers, True]:.1f}", f"{rates[workers, False]:.1f}")
                for workers in WORKERS
            ),
        ),
        "",
        *target_table(targets),
        "",
        READING,
    ]
    return publish("jobs.idle", lines, targets, check=True, record=not options.dry)


def _rate(bed: Testbed, workers: int, *, notified: bool, seconds: float) -> float:
    """Return the transactions a second of all workers."""
    database = Database(bed.postgres, bed.ledger())
    database.execute(
        "INSERT INTO viralfx_ops.viralfx_workers (worker, queues, lease_until)"  # noqa: S608 - a number
        " SELECT '!another-' || number, '{default}', now() + interval '1 hour'"
        f" FROM generate_series(2, {workers:d}) AS number"
    )
    environment = bed.our_environment(database.name, with_redis=notified)
    with Server(worker("viralfx worker", **environment), anywhere=True) as working:
        working.wait_for_200("/health/ready", seconds=60)
        time.sleep(START_SECONDS)
        before, began = transactions(database), time.monotonic()
        time.sleep(seconds)
        return (transactions(database) - before) / (time.monotonic() - began) * workers


if __name__ == "__main__":
    sys.exit(main())
