"""Measures claims of jobs whose task the worker knows, also beside a backlog of an unknown task.

The ways to claim take turns on one server that this script starts, with durable writes to disk.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence

import uvloop
from benchmarks.ledger import SETTINGS
from benchmarks.results import Target, circumstances, command, publish, table, target_table
from tests.integration.postgres_clients import config_of, migrated, opened
from tests.servers.postgres import Database, PostgresServer, postgres_server

from viralfx.jobs.postgres import PostgresJobLedger
from viralfx.jobs.postgres.claims import CLAIM
from viralfx.postgres import PostgresDatabase
from viralfx.postgres.migrations import qualified

KNOWN = (5, 50, 300)
BACKLOG = 100_000
ROUNDS = 60
BATCH = 50
FILL = """
INSERT INTO viralfx_ops.viralfx_jobs (id, queue, task, payload, created_at, run_at, state)
SELECT gen_random_uuid(), 'default', '{task}', '{{}}', now(),
    now() - interval '{age}' + n * interval '1 ms', 'waiting'
FROM generate_series(1, {jobs}) AS n
"""
UNDO = "UPDATE viralfx_ops.viralfx_jobs SET state = 'waiting', worker = NULL WHERE state = 'active'"

Claim = Callable[[], Awaitable[object]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(prog="just bench-unknown", description=__doc__)
    add = parser.add_argument
    add("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    add("--backlog", type=int, default=BACKLOG, help=f"jobs that wait; default: {BACKLOG}")
    add("--dry", action="store_true", help="leave RESULTS.md as it is")
    options = parser.parse_args(arguments)
    with postgres_server(settings=SETTINGS) as server:
        found = uvloop.run(_measure(server, options.backlog, options.rounds))
    base = found["known", "any task"]
    targets = [
        Target(
            what=f"claim limited to {count} known tasks, to a claim of any task",
            measured=found["known", f"{count} known tasks"] / base,
            limit=1.1,
            at_least=False,
            unit=" x",
        )
        for count in KNOWN
    ]
    lines = [
        *circumstances(
            command("bench-unknown"),
            f"Claims of {BATCH} jobs, {options.rounds} in each way, in turns",
        ),
        "",
        *table(
            (f"median of a claim beside {options.backlog:,} jobs", "of a known task", "unknown"),
            (
                (way, *(f"{found[task, way] * 1000:.1f} ms" for task in ("known", "unknown")))
                for way in (*(f"{count} known tasks" for count in KNOWN), "in order")
            ),
        ),
        "",
        *target_table(targets),
        "",
        f"A claim of any task takes {base * 1000:.1f} ms. `in order` has 300 known tasks, too.",
    ]
    return publish("jobs.unknown", lines, targets, check=False, record=not options.dry)


async def _measure(
    server: PostgresServer, backlog: int, rounds: int
) -> dict[tuple[str, str], float]:
    found = {}
    database = Database(server, server.create_database())
    config = await migrated(config_of(database))
    async with opened(config) as pool:
        ledger = PostgresJobLedger(pool)
        await ledger.register("w", ["default"], 86_400.0)
        for task in ("known", "unknown"):
            database.execute("TRUNCATE viralfx_ops.viralfx_jobs")
            database.execute(FILL.format(task=_name(task), age="2 hours", jobs=backlog))
            database.execute(FILL.format(task=_name("known"), age="1 hour", jobs=10 * BATCH))
            database.execute("VACUUM ANALYZE viralfx_ops.viralfx_jobs")
            ways = _ways(ledger, pool, any_task=task == "known")
            for way, seconds in (await _in_turns(ways, pool, rounds)).items():
                found[task, way] = statistics.median(seconds)
    return found


def _ways(ledger: PostgresJobLedger, pool: PostgresDatabase, *, any_task: bool) -> dict[str, Claim]:
    def limited(count: int) -> Claim:
        tasks = _tasks(count)
        return lambda: ledger.claim("default", "w", BATCH, tasks=tasks)

    claim = qualified(CLAIM, pool.config.settings.schema)

    async def in_order() -> None:
        async with pool.acquire() as connection:
            limits: list[list[object]] = [[] for _ in range(5)]
            await connection.fetch(
                claim, "default", "w", BATCH, 1, _tasks(KNOWN[-1]), True, *limits
            )

    ways: dict[str, Claim] = {f"{count} known tasks": limited(count) for count in KNOWN}
    if any_task:
        ways["any task"] = lambda: ledger.claim("default", "w", BATCH)
    return {**ways, "in order": in_order}


async def _in_turns(
    ways: dict[str, Claim], pool: PostgresDatabase, rounds: int
) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, claim in ways.items():
            began = time.perf_counter()
            await claim()
            taken[way].append(time.perf_counter() - began)
            async with pool.acquire() as connection:
                await connection.execute(UNDO)
    return taken


def _name(task: str) -> str:
    return "orders.task-0" if task == "known" else "orders.unknown"


def _tasks(count: int) -> list[str]:
    return [f"orders.task-{number}" for number in range(count)]


if __name__ == "__main__":
    sys.exit(main())
