"""Measures retries and cancellations of many jobs at once, and claims of other jobs beside them.

The server is started by this script, with durable writes to disk.
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence

import uvloop
from benchmarks.ledger import SETTINGS
from benchmarks.results import Target, circumstances, command, publish, table, target_table
from tests.integration.postgres_clients import config_of, migrated, opened
from tests.servers.postgres import Database, PostgresServer, postgres_server

from viralfx.core.ids import new_job_id
from viralfx.jobs.ledger import BulkStep
from viralfx.jobs.model import JobDraft, JobFilter, completed
from viralfx.jobs.postgres import PostgresJobLedger

JOBS = 100_000
LIMIT_SECONDS = 10.0
BATCH = 50
FILL = """
INSERT INTO viralfx_ops.viralfx_jobs
    (id, queue, task, payload, created_at, run_at, finished_at, state, attempts, claims,
    error_code, error_message, history)
SELECT (lpad(to_hex(n), 12, '0') || '70008000' || lpad(to_hex(n), 12, '0'))::uuid, 'default',
    'orders.ship', '{{"number": 1}}', now(), now(), now(), 'failed', 3, 3, 'error', 'planted',
    '[{{"code": "error"}}]'
FROM generate_series(1, {jobs}) AS n
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(prog="just bench-bulk", description=__doc__)
    add = parser.add_argument
    add("--jobs", type=int, default=JOBS, help=f"failed jobs; default: {JOBS}")
    add("--dry", action="store_true", help="leave RESULTS.md as it is")
    options = parser.parse_args(arguments)
    with postgres_server(settings=SETTINGS) as server:
        found = uvloop.run(_measure(server, options.jobs))
    (retried, _), (cancelled, _) = found["retry"], found["cancel"]
    targets = [
        Target(
            what=f"{name} {options.jobs:,} jobs",
            measured=seconds,
            limit=LIMIT_SECONDS,
            at_least=False,
            unit=" s",
        )
        for name, seconds in (("retry", retried), ("cancel", cancelled))
    ]
    lines = [
        *circumstances(
            command("bench-bulk"), f"Beside it one worker claims and completes {BATCH} jobs a time"
        ),
        "",
        *table(
            ("change", "seconds", "jobs a second", "claim beside it, median", "longest"),
            (
                (
                    f"{name} {options.jobs:,} jobs",
                    f"{seconds:.1f}",
                    f"{options.jobs / seconds:,.0f}",
                    f"{statistics.median(claims) * 1000:.1f} ms",
                    f"{max(claims) * 1000:.0f} ms",
                )
                for name, (seconds, claims) in found.items()
            ),
        ),
        "",
        *target_table(targets),
    ]
    return publish("jobs.bulk", lines, targets, check=False, record=not options.dry)


async def _measure(server: PostgresServer, jobs: int) -> dict[str, tuple[float, list[float]]]:
    database = Database(server, server.create_database())
    config = await migrated(config_of(database))
    async with opened(config) as pool:
        ledger = PostgresJobLedger(pool)
        await ledger.register("w", ["other"], 86_400.0)
        database.execute(FILL.format(jobs=jobs))
        database.execute("VACUUM ANALYZE viralfx_ops.viralfx_jobs")
        changes: dict[str, Callable[[JobFilter], AsyncIterator[BulkStep]]] = {
            "retry": ledger.retry_all,
            "cancel": ledger.cancel_all,
        }
        return {name: await _beside(ledger, change, jobs) for name, change in changes.items()}


async def _beside(
    ledger: PostgresJobLedger, change: Callable[[JobFilter], AsyncIterator[BulkStep]], jobs: int
) -> tuple[float, list[float]]:
    """Change all jobs; return the seconds, and those of each claim meanwhile."""
    claims: list[float] = []
    working = asyncio.create_task(_work(ledger, claims))
    began = time.perf_counter()
    changed = sum([step.count async for step in change(JobFilter(task="orders.ship"))])
    seconds = time.perf_counter() - began
    working.cancel()
    await asyncio.wait({working})
    if changed != jobs:
        raise RuntimeError(f"{changed} of {jobs} jobs were changed")
    return seconds, claims


async def _work(ledger: PostgresJobLedger, claims: list[float]) -> None:
    while True:
        drafts = [
            JobDraft(id=new_job_id(), queue="other", task="orders.note", payload=b"1")
            for _ in range(BATCH)
        ]
        await ledger.accept(drafts)
        began = time.perf_counter()
        found = await ledger.claim("other", "w", BATCH)
        claims.append(time.perf_counter() - began)
        await ledger.settle([completed(claim, b"1") for claim in found])


if __name__ == "__main__":
    sys.exit(main())
