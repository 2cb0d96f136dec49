"""What a job costs the ledger in Postgres, beside few finished jobs and beside a million.

The databases take turns, on one server of this script's own that writes to disk as it should.
"""

import argparse
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import Target, circumstances, publish, table, target_table
from tests.integration.postgres_clients import config_of, migrated, opened
from tests.servers.postgres import Database, PostgresServer, postgres_server

from viralfx.adapters.postgres import PostgresDatabase, PostgresJobLedger
from viralfx.domain.jobs.job import JobDraft, completed, new_job_id

SIZES = (1_000, 100_000, 1_000_000)
ROUNDS = 9
JOBS = 2_000
BATCH = 50
COUNTS = 50
SETTINGS = {
    "fsync": "on",
    "full_page_writes": "on",
    "shared_buffers": "256MB",
    "max_wal_size": "2GB",
}
CHUNK = 100_000
FILL = """
INSERT INTO viralfx_jobs
    (id, queue, task, state, payload, created_at, run_at, started_at, finished_at, claims, result)
SELECT
    (lpad(to_hex(n), 12, '0') || '70008000' || lpad(to_hex(n), 12, '0'))::uuid,
    (ARRAY['default', 'notifications', 'analytics'])[1 + n % 3], 'noop',
    CASE WHEN n % 100 = 0 THEN 'failed' ELSE 'completed' END,
    '{"number": 1}', at, at, at, at, 1, 'null'
FROM (
    SELECT n, now() - interval '2 days' + n * interval '100 ms' AS at
    FROM generate_series($1::int, $2::int) AS n
) AS numbers
"""
COUNT = """
INSERT INTO viralfx_job_counters (queue, state, count)
SELECT queue, state, count(*) FROM viralfx_jobs GROUP BY queue, state
"""


@dataclass
class Measured:
    """What was seen beside so many finished jobs."""

    accepted: list[float] = field(default_factory=list)
    """Jobs a second, of each round; likewise the next two."""
    claimed: list[float] = field(default_factory=list)
    settled: list[float] = field(default_factory=list)
    counted: list[float] = field(default_factory=list)
    """Milliseconds of each call."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--jobs", type=int, default=JOBS, help=f"a round; default: {JOBS}")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=SIZES, help=f"finished jobs; default: {SIZES}"
    )
    options = parser.parse_args(arguments)
    sizes = sorted(options.sizes)
    with postgres_server(settings=SETTINGS) as server:
        found, server_version = uvloop.run(measure(server, sizes, options.rounds, options.jobs))
    targets = _targets(found)
    lines = [
        *circumstances(
            "Command: `python benchmarks/ledger.py`",
            f"PostgreSQL {server_version}, asyncpg {version('asyncpg')}, "
            + ", ".join(f"{name}={value}" for name, value in SETTINGS.items()),
            f"{options.jobs:,} no-op jobs in each of {options.rounds} interleaved rounds, {BATCH}"
            f" in one step, one connection; counts: {COUNTS} calls a round, all queues in each",
        ),
        "",
        *_table(found),
        "",
        *target_table(targets),
    ]
    return publish("ledger.py", lines, targets, check=options.check)


async def measure(
    server: PostgresServer, sizes: Sequence[int], rounds: int, jobs: int
) -> tuple[dict[int, Measured], str]:
    """Return what was seen for each number of finished jobs, and the server's version."""
    found = {size: Measured() for size in sizes}
    async with AsyncExitStack() as stack:
        ledgers = {size: await stack.enter_async_context(filled(server, size)) for size in sizes}
        for number in range(-1, rounds):
            for size, ledger in ledgers.items():
                # The first one fills the caches.
                await one_round(ledger, jobs, found[size] if number >= 0 else Measured())
    ((server_version,),) = server.execute("show server_version")
    return found, str(server_version)


@asynccontextmanager
async def filled(server: PostgresServer, size: int) -> AsyncIterator[PostgresJobLedger]:
    """Return a ledger with so many finished jobs in a database of its own."""
    database = Database(server, server.create_database())
    config = await migrated(config_of(database, pool_max=4, statement_timeout=0))
    async with opened(config) as pool:
        await fill(pool, size)
        ledger = PostgresJobLedger(pool)
        await ledger.register("worker", ["default"], 86_400.0)
        counts = await ledger.counts()
        _require(sum(each.completed + each.failed for each in counts.values()) == size)
        yield ledger


async def fill(pool: PostgresDatabase, size: int) -> None:
    """Write finished jobs as a ledger has them after a while: looked at by vacuum."""
    async with pool.acquire() as connection:
        for first in range(1, size + 1, CHUNK):
            await connection.execute(FILL, first, min(size, first + CHUNK - 1))
        await connection.execute(COUNT)
        await connection.execute("VACUUM (ANALYZE) viralfx_jobs")


async def one_round(ledger: PostgresJobLedger, jobs: int, seen: Measured) -> None:
    """Take jobs from their acceptance to their end, and count."""
    drafts = [
        JobDraft(id=new_job_id(), queue="default", task="noop", payload=b'{"number": 1}')
        for _ in range(jobs)
    ]
    started = time.perf_counter()
    for first in range(0, jobs, BATCH):
        await ledger.accept(drafts[first : first + BATCH])
    seen.accepted.append(jobs / (time.perf_counter() - started))
    for _ in range(COUNTS):
        started = time.perf_counter()
        counts = await ledger.counts()
        seen.counted.append((time.perf_counter() - started) * 1000)
        _require(counts["default"].waiting == jobs)
    claims = []
    started = time.perf_counter()
    while claimed := await ledger.claim("default", "worker", BATCH):
        claims.append(claimed)
    seen.claimed.append(jobs / (time.perf_counter() - started))
    _require(sum(map(len, claims)) == jobs)
    started = time.perf_counter()
    for claimed in claims:
        taken = await ledger.settle([completed(claim, b"null") for claim in claimed])
        _require(len(taken) == len(claimed))
    seen.settled.append(jobs / (time.perf_counter() - started))
    # As the periodic ones do; so there are as many finished jobs as before.
    await ledger.sweep(5)
    _require(await ledger.prune(0.0, jobs) == jobs)


def _require(condition: object) -> None:
    if not condition:
        raise RuntimeError("the ledger did not do what was measured")


def _per_job(seen: Measured) -> list[float]:
    """Return the microseconds that one job took in each round, from its acceptance to its end."""
    rates = zip(seen.accepted, seen.claimed, seen.settled, strict=True)
    return [1e6 * sum(1 / rate for rate in rates_of_round) for rates_of_round in rates]


def _targets(found: dict[int, Measured]) -> list[Target]:
    smallest, largest = min(found), max(found)
    pairs = zip(_per_job(found[smallest]), _per_job(found[largest]), strict=True)
    return [
        Target(
            what=f"counts of all queues beside {largest:,} finished jobs",
            measured=statistics.median(found[largest].counted),
            limit=10,
            at_least=False,
            unit=" ms",
            remark="one query, with a backlog of a round",
        ),
        Target(
            what=f"rate beside {largest:,} / rate beside {smallest:,}",
            measured=statistics.median(small / large for small, large in pairs),
            limit=0.9,
            at_least=True,
            remark="accept, claim and settle together, median of rounds",
        ),
    ]


def _table(found: dict[int, Measured]) -> list[str]:
    header = (
        "finished jobs",
        "accept /s",
        "claim /s",
        "settle /s",
        "whole job µs",
        "counts ms",
        "99 % ms",
    )
    return table(
        header,
        (
            (
                f"{size:,}",
                *(
                    f"{statistics.median(rates):,.0f}"
                    for rates in (seen.accepted, seen.claimed, seen.settled, _per_job(seen))
                ),
                f"{statistics.median(seen.counted):.2f}",
                f"{statistics.quantiles(seen.counted, n=100)[98]:.2f}",
            )
            for size, seen in found.items()
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
