"""Measures the Postgres ledger empty, and beside many finished and many scheduled jobs.

The databases take turns on one server that this script starts, with durable writes to disk.
"""

import argparse
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import Target, circumstances, publish, table, target_table
from tests.integration.postgres_clients import config_of, migrated, opened
from tests.servers.postgres import Database, PostgresServer, postgres_server

from viralfx.core.ids import new_job_id
from viralfx.jobs.model import JobDraft, completed
from viralfx.jobs.postgres import PostgresJobLedger
from viralfx.postgres import PostgresDatabase

FINISHED = 10_000_000
SCHEDULED = 1_000_000
ROUNDS = 45
JOBS = 2_000
BATCH = 50
PRUNED_AT_ONCE = 500
QUEUES = 3
"""Each ledger has a finished job in each of these, so that all counts have as many rows."""
COUNTS = 50
SETTINGS = {
    "fsync": "on",
    "full_page_writes": "on",
    "shared_buffers": "256MB",
    "max_wal_size": "2GB",
}
CHUNK = 100_000
FILL_FINISHED = """
INSERT INTO viralfx_ops.viralfx_finished_jobs
    (id, queue, task, state, payload, key, created_at, run_at, started_at, finished_at, claims,
    result)
SELECT
    (lpad(to_hex(n), 12, '0') || '70008000' || lpad(to_hex(n), 12, '0'))::uuid,
    (ARRAY['default', 'notifications', 'analytics'])[1 + n % 3], 'noop',
    CASE WHEN n % 100 = 0 THEN 'cancelled' ELSE 'completed' END,
    '{"number": 1}', CASE WHEN n % 10 = 0 THEN 'order ' || n END, at, at, at, at, 1, 'null'
FROM (
    SELECT n, now() - interval '30 days' + n * interval '100 ms' AS at
    FROM generate_series($1::int, $2::int) AS n
) AS numbers
"""
FILL_SCHEDULED = """
INSERT INTO viralfx_ops.viralfx_jobs
    (id, queue, task, state, payload, created_at, run_at, asked_run_at)
SELECT
    (lpad(to_hex(n), 12, '0') || '70009000' || lpad(to_hex(n), 12, '0'))::uuid,
    (ARRAY['default', 'notifications', 'analytics'])[1 + n % 3], 'noop', 'scheduled',
    '{"number": 1}', now(), at, at
FROM (
    SELECT n, now() + interval '1 day' + n * interval '31 s' AS at
    FROM generate_series($1::int, $2::int) AS n
) AS numbers
"""


@dataclass(frozen=True)
class Beside:
    """The jobs that a ledger has beside those of the rounds."""

    finished: int = 0
    scheduled: int = 0

    def __str__(self) -> str:
        if self.finished:
            return f"{self.finished:,} finished"
        return f"{self.scheduled:,} scheduled" if self.scheduled else "none"


@dataclass
class Measured:
    """The results of one ledger, in jobs a second in each round."""

    accepted: list[float] = field(default_factory=list)
    claimed: list[float] = field(default_factory=list)
    settled: list[float] = field(default_factory=list)
    pruned: list[float] = field(default_factory=list)
    counted: list[float] = field(default_factory=list)
    """Calls a second."""
    times: list[float] = field(default_factory=list)
    """Milliseconds for each call that counts."""


RATES = ("accepted", "claimed", "settled", "counted", "pruned")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--jobs", type=int, default=JOBS, help=f"a round; default: {JOBS}")
    parser.add_argument("--finished", type=int, default=FINISHED, help=f"default: {FINISHED}")
    parser.add_argument("--scheduled", type=int, default=SCHEDULED, help=f"default: {SCHEDULED}")
    options = parser.parse_args(arguments)
    ledgers = (Beside(), Beside(finished=options.finished), Beside(scheduled=options.scheduled))
    with postgres_server(settings=SETTINGS) as server:
        found, server_version = uvloop.run(measure(server, ledgers, options.rounds, options.jobs))
    targets = _targets(found)
    lines = [
        *circumstances(
            "Command: `just bench-ledger`",
            f"PostgreSQL {server_version}, asyncpg {version('asyncpg')}, "
            + ", ".join(f"{name}={value}" for name, value in SETTINGS.items()),
            f"{options.jobs:,} no-op jobs in each of {options.rounds} interleaved rounds, {BATCH}"
            f" in one step, {PRUNED_AT_ONCE} in one prune, one connection; counts: {COUNTS} calls a"
            " round, all queues in each",
        ),
        "",
        *_table(found),
        "",
        *target_table(targets),
    ]
    return publish("ledger.py", lines, targets, check=options.check)


async def measure(
    server: PostgresServer, ledgers: Sequence[Beside], rounds: int, jobs: int
) -> tuple[dict[Beside, Measured], str]:
    """Return the results of each ledger, and the server's version."""
    found = {beside: Measured() for beside in ledgers}
    async with AsyncExitStack() as stack:
        filled_ledgers = {
            beside: await stack.enter_async_context(filled(server, beside)) for beside in ledgers
        }
        # Otherwise the writes of the fill go on beside the first rounds.
        server.execute("checkpoint")
        for number in range(-1, rounds):
            for beside, ledger in filled_ledgers.items():
                # The first round warms up the caches.
                seen = found[beside] if number >= 0 else Measured()
                await one_round(ledger, jobs, seen, partial(server.execute, "checkpoint"))
    ((server_version,),) = server.execute("show server_version")
    return found, str(server_version)


@asynccontextmanager
async def filled(server: PostgresServer, beside: Beside) -> AsyncIterator[PostgresJobLedger]:
    """Return a ledger with these jobs in a database of its own."""
    database = Database(server, server.create_database())
    config = await migrated(config_of(database, pool_max=4, statement_timeout=0))
    async with opened(config) as pool:
        await fill(pool, max(QUEUES, beside.finished))
        await fill(pool, beside.scheduled, FILL_SCHEDULED)
        ledger = PostgresJobLedger(pool)
        await ledger.register("worker", ["default"], 86_400.0)
        await ledger.sweep(5)
        counts = (await ledger.counts()).values()
        finished = sum(each.completed + each.cancelled for each in counts)
        _require(finished == max(QUEUES, beside.finished))
        _require(sum(each.scheduled for each in counts) == beside.scheduled)
        yield ledger


async def fill(pool: PostgresDatabase, jobs: int, statement: str = FILL_FINISHED) -> None:
    """Insert jobs, and vacuum the tables, as in a ledger that has run for a while."""
    async with pool.acquire() as connection:
        for first in range(1, jobs + 1, CHUNK):
            await connection.execute(statement, first, min(jobs, first + CHUNK - 1))
        if jobs:
            tables = "viralfx_ops.viralfx_jobs, viralfx_ops.viralfx_finished_jobs"
            await connection.execute(f"VACUUM (ANALYZE) {tables}")


async def one_round(
    ledger: PostgresJobLedger, jobs: int, seen: Measured, checkpoint: Callable[[], object]
) -> None:
    """Process jobs from acceptance to deletion, and measure.

    A checkpoint comes before the deletion, because a service deletes jobs hours after they
    finished: the first change of a page after a checkpoint logs the whole page.
    """
    drafts = [
        JobDraft(id=new_job_id(), queue="default", task="noop", payload=b'{"number": 1}')
        for _ in range(jobs)
    ]
    with timed(seen.accepted, jobs):
        for first in range(0, jobs, BATCH):
            await ledger.accept(drafts[first : first + BATCH])
    with timed(seen.counted, COUNTS):
        for _ in range(COUNTS):
            started = time.perf_counter()
            counts = await ledger.counts()
            seen.times.append((time.perf_counter() - started) * 1000)
            _require(counts["default"].waiting == jobs)
    claims = []
    with timed(seen.claimed, jobs):
        while claimed := await ledger.claim("default", "worker", BATCH):
            claims.append(claimed)
    _require(sum(map(len, claims)) == jobs)
    with timed(seen.settled, jobs):
        for claimed in claims:
            taken = await ledger.settle([completed(claim, b"null") for claim in claimed])
            _require(len(taken) == len(claimed))
    # As the leader of the workers does.
    await ledger.sweep(5)
    pruned = 0
    checkpoint()
    with timed(seen.pruned, jobs):
        while pruned < jobs:
            deleted = await ledger.prune(0.0, min(PRUNED_AT_ONCE, jobs - pruned), failed=False)
            _require(deleted)
            pruned += deleted


@contextmanager
def timed(rates: list[float], times: int) -> Iterator[None]:
    """Add how often a second something was done that the block does so many times."""
    started = time.perf_counter()
    yield
    rates.append(times / (time.perf_counter() - started))


def _require(condition: object) -> None:
    if not condition:
        raise RuntimeError("the ledger did not do what was measured")


def _ratio(found: dict[Beside, Measured], beside: Beside, rate: str) -> float:
    """Return the median over the rounds of a rate by that of the empty ledger."""
    pairs = zip(getattr(found[beside], rate), getattr(found[Beside()], rate), strict=True)
    return float(statistics.median(full / empty for full, empty in pairs))


def _targets(found: dict[Beside, Measured]) -> list[Target]:
    finished, scheduled = [beside for beside in found if beside != Beside()]
    asked = [(finished, rate) for rate in RATES] + [(scheduled, "counted")]
    return [
        Target(
            what=f"{rate}, beside {beside} / beside none",
            measured=_ratio(found, beside, rate),
            limit=0.9,
            at_least=True,
            remark="rates, median of the rounds",
        )
        for beside, rate in asked
    ]


def _table(found: dict[Beside, Measured]) -> list[str]:
    header = (
        "other jobs",
        "accept /s",
        "claim /s",
        "settle /s",
        "prune /s",
        "counts ms",
        "99 % ms",
    )
    return table(
        header,
        (
            (
                str(beside),
                *(
                    f"{statistics.median(rates):,.0f}"
                    for rates in (seen.accepted, seen.claimed, seen.settled, seen.pruned)
                ),
                f"{statistics.median(seen.times):.2f}",
                f"{statistics.quantiles(seen.times, n=100)[98]:.2f}",
            )
            for beside, seen in found.items()
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
