"""Measures claims with priorities, limits and a paused queue against plain ones.

Each case has a database of its own on one server that this script starts. The cases take turns, and
the first one is measured twice, so that the ratio of two equal ones shows the noise.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.results import Target, circumstances, publish, table, target_table
from tests.integration.postgres_clients import config_of, migrated, opened
from tests.servers.postgres import Database, PostgresServer, postgres_server

from viralfx.core.ids import new_job_id
from viralfx.jobs.ledger import NO_LIMITS
from viralfx.jobs.limits import Limit, Rate
from viralfx.jobs.model import Claim, JobDraft, completed
from viralfx.jobs.postgres import PostgresJobLedger
from viralfx.postgres import PostgresDatabase

ROUNDS = 15
JOBS = 1_000
BATCH = 20
KEPT = 10
"""Claims whose jobs are active at the same time."""
KEYS = 2_000
PRIORITIES = 20
BESIDE = 5_000
MAX_RATIO = 1.5
SETTINGS = {"shared_buffers": "256MB", "max_wal_size": "2GB"}


def _draft(_: int, **more: object) -> JobDraft:
    values = {"queue": "default", "task": "noop", "payload": b'{"number": 1}'} | more
    return JobDraft(id=new_job_id(), **values)  # type: ignore[arg-type]


def _with_priority(number: int) -> JobDraft:
    return _draft(number, priority=number % PRIORITIES)


def _with_key(number: int) -> JobDraft:
    return _draft(number, concurrency_key=f"customer-{number % KEYS}")


@dataclass(frozen=True)
class Case:
    """A way to claim, and the jobs that are claimed."""

    name: str
    draft: Callable[[int], JobDraft] = _draft
    limits: Mapping[str, Limit] = field(default_factory=lambda: NO_LIMITS)
    beside: Callable[[int], JobDraft] | None = None
    """Makes jobs that are never claimed."""
    paused: str | None = None


def _much_later(number: int) -> JobDraft:
    return _draft(number, priority=30, run_at=datetime.now(UTC) + timedelta(days=1))


PLAIN = Case("plain")
CASES = (
    PLAIN,
    Case("plain, again"),
    Case(f"{PRIORITIES} priorities", _with_priority),
    Case(f"{BESIDE:,} not due at a higher priority", beside=_much_later),
    Case(
        f"beside a paused queue with {BESIDE:,} jobs",
        beside=lambda number: _draft(number, queue="other"),
        paused="other",
    ),
    Case("concurrency", limits={"noop": Limit(concurrency=1_000)}),
    Case("rate", limits={"noop": Limit(rate=Rate(1_000_000, 60.0))}),
    Case(
        f"concurrency of each of {KEYS:,} keys",
        _with_key,
        {"noop": Limit(concurrency=1, keyed=True)},
    ),
    Case("limits of another task", limits={"other": Limit(concurrency=5)}),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--jobs", type=int, default=JOBS, help=f"a round; default: {JOBS}")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"a claim; default: {BATCH}")
    options = parser.parse_args(arguments)
    with postgres_server(settings=SETTINGS) as server:
        found, server_version = uvloop.run(
            measure(server, options.rounds, options.jobs, options.batch)
        )
    targets = [
        Target(
            what=f"a claim, {case.name} / plain",
            measured=_ratio(found, case),
            limit=MAX_RATIO,
            at_least=False,
            remark="medians of the rounds",
        )
        for case in CASES[1:]
    ]
    lines = [
        *circumstances(
            "Command: `just bench-limits`",
            f"PostgreSQL {server_version}, asyncpg {version('asyncpg')}, "
            + ", ".join(f"{name}={value}" for name, value in SETTINGS.items()),
            f"{options.jobs:,} no-op jobs in each of {options.rounds} interleaved rounds, claimed"
            f" {options.batch} at once over one connection, {KEPT} claims active at the same time",
        ),
        "",
        *table(
            ("claims", "ms a claim", "99 % ms"),
            (
                (
                    case.name,
                    f"{statistics.median(itertools.chain(*found[case.name])):.2f}",
                    f"{statistics.quantiles(itertools.chain(*found[case.name]), n=100)[98]:.2f}",
                )
                for case in CASES
            ),
        ),
        "",
        *target_table(targets),
    ]
    return publish("limits.py", lines, targets, check=options.check)


def _ratio(found: Mapping[str, list[list[float]]], case: Case) -> float:
    pairs = zip(found[case.name], found[PLAIN.name], strict=True)
    return statistics.median(
        statistics.median(one) / statistics.median(plain) for one, plain in pairs
    )


async def measure(
    server: PostgresServer, rounds: int, jobs: int, batch: int
) -> tuple[dict[str, list[list[float]]], str]:
    """Return the milliseconds of each claim of each round by case, and the server's version."""
    found: dict[str, list[list[float]]] = {case.name: [] for case in CASES}
    async with AsyncExitStack() as stack:
        ledgers = {
            case.name: await stack.enter_async_context(_prepared(server, case)) for case in CASES
        }
        for number in range(-1, rounds):
            # Each round begins elsewhere, so that none always follows the same one.
            first = max(number, 0) % len(CASES)
            for case in (*CASES[first:], *CASES[:first]):
                times = await _one_round(ledgers[case.name], case, jobs, batch)
                if number >= 0:  # the first round warms up the caches
                    found[case.name].append(times)
    ((server_version,),) = server.execute("show server_version")
    return found, str(server_version)


@asynccontextmanager
async def _prepared(server: PostgresServer, case: Case) -> AsyncIterator[PostgresJobLedger]:
    """Return the ledger of a case in a database of its own."""
    database = Database(server, server.create_database())
    config = await migrated(config_of(database, pool_max=4, statement_timeout=0))
    async with opened(config) as pool:
        ledger = PostgresJobLedger(pool)
        await ledger.register("worker", ["default"], 86_400.0)
        if case.beside is not None:
            for first in range(0, BESIDE, 500):
                await ledger.accept([case.beside(first + number) for number in range(500)])
            # As if the sweep had found that they are due soon.
            await _execute(pool, "UPDATE viralfx_ops.viralfx_jobs SET state = 'waiting'")
        if case.paused is not None:
            await ledger.pause(case.paused)
        await _execute(pool, "VACUUM (ANALYZE) viralfx_ops.viralfx_jobs")
        yield ledger


async def _execute(pool: PostgresDatabase, statement: str) -> None:
    async with pool.acquire() as connection:
        await connection.execute(statement)


async def _one_round(ledger: PostgresJobLedger, case: Case, jobs: int, batch: int) -> list[float]:
    """Accept, claim and complete jobs; return the milliseconds of each claim."""
    for first in range(0, jobs, 100):
        await ledger.accept([case.draft(first + number) for number in range(min(100, jobs))])
    times: list[float] = []
    active: deque[Sequence[Claim]] = deque()
    claimed = 0
    while claimed < jobs:
        began = time.perf_counter()
        claims = await ledger.claim(
            "default", "worker", batch, tasks=["noop", "other"], limits=case.limits
        )
        times.append((time.perf_counter() - began) * 1000)
        if not claims:
            raise RuntimeError("the ledger did not do what was measured")
        claimed += len(claims)
        active.append(claims)
        if len(active) > KEPT:
            await _complete(ledger, active.popleft())
    while active:
        await _complete(ledger, active.popleft())
    await ledger.sweep(5)
    return times


async def _complete(ledger: PostgresJobLedger, claims: Sequence[Claim]) -> None:
    await ledger.settle([completed(claim, b"null") for claim in claims])


if __name__ == "__main__":
    sys.exit(main())
