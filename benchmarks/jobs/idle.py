"""Counts the transactions of idle workers in Postgres.

Runs one worker process with its health checks beside rows of the others, which cost nothing, and
multiplies its transactions by the number of workers.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence

from benchmarks.jobs.testbed import Testbed, testbed
from benchmarks.results import Target, circumstances, command, publish, table, target_table
from benchmarks.servers import Server, worker
from tests.servers.postgres import Database, transactions

WORKERS = (3, 10, 30, 100)
SECONDS = 40.0
START_SECONDS = 12.0
"""Time until the first renewal after the start, which tells the worker of the others."""
MAX_TRANSACTIONS = {10: 10.0, 100: 70.0}
"""A second, of that many workers."""
REDIS, NOTIFY, POLLS = "with Redis", "without Redis", "where they poll"
SETTINGS: Mapping[str, Mapping[str, str]] = {
    REDIS: {},
    NOTIFY: {},
    # The server is reached directly, but a pooler is declared, so that no worker listens.
    POLLS: {"DB_POOLER": "transaction"},
}
READING = (
    "Ten workers share five polls a second, and any number ten, so most of the cost of many "
    "workers is their renewals and health checks."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(prog="just bench-idle", description=__doc__)
    add = parser.add_argument
    add("--seconds", type=float, default=SECONDS, help=f"of each row; default: {SECONDS:g}")
    add("--dry", action="store_true", help="leave RESULTS.md as it is")
    options = parser.parse_args(arguments)
    rates: dict[tuple[int, str], float] = {}
    with testbed() as bed:
        for workers in WORKERS:
            for transport in SETTINGS:
                rates[workers, transport] = _rate(bed, workers, transport, options.seconds)
        where = str(bed)
    targets = [
        Target(
            what=f"transactions a second of {workers} idle workers, {transport}",
            measured=rates[workers, transport],
            limit=limit,
            at_least=False,
        )
        for workers, limit in MAX_TRANSACTIONS.items()
        for transport in SETTINGS
    ]
    lines = [
        *circumstances(
            command("bench-idle"),
            where,
            f"{options.seconds:g} s for each number; default settings, health checks included",
        ),
        "",
        *table(
            ("workers", *(f"transactions/s {transport}" for transport in SETTINGS)),
            (
                (str(workers), *(f"{rates[workers, transport]:.1f}" for transport in SETTINGS))
                for workers in WORKERS
            ),
        ),
        "",
        *target_table(targets),
        "",
        READING,
    ]
    return publish("jobs.idle", lines, targets, check=True, record=not options.dry)


def _rate(bed: Testbed, workers: int, transport: str, seconds: float) -> float:
    """Return the transactions a second of all workers."""
    database = Database(bed.postgres, bed.ledger())
    database.execute(
        "INSERT INTO viralfx_ops.viralfx_workers (worker, queues, lease_until)"  # noqa: S608 - a number
        " SELECT '!another-' || number, '{default}', now() + interval '1 hour'"
        f" FROM generate_series(2, {workers:d}) AS number"
    )
    environment = {
        **bed.our_environment(database.name, with_redis=transport == REDIS),
        **SETTINGS[transport],
    }
    with Server(worker("viralfx worker", **environment), anywhere=True) as working:
        working.wait_for_200("/health/ready", seconds=60)
        time.sleep(START_SECONDS)
        before, began = transactions(database), time.monotonic()
        time.sleep(seconds)
        return (transactions(database) - before) / (time.monotonic() - began) * workers


if __name__ == "__main__":
    sys.exit(main())
