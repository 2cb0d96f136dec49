"""Measures promises about jobs on real processes: transactions, schedules, limits and delays.

``orders``: transactions that write an order and submit its job; half of them roll back.
``schedule`` and ``limits``: see worker_fleets.py.
``delays``: the time until a running task sees its cancellation, and the API shows its progress.

Each part has a section of its own in RESULTS.md.
"""

import argparse
import asyncio
import math
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import asyncpg
import httpx
from benchmarks.jobs.promise_tasks import CANCELLED, MODULE, OBSERVED, ORDER
from benchmarks.jobs.testbed import Testbed, testbed
from benchmarks.jobs.worker_fleets import (
    BYSTANDERS,
    MINUTES,
    READY_SECONDS,
    ROUNDS,
    Part,
    limits,
    none,
    schedule,
)
from benchmarks.results import Target, circumstances, command, publish, table, target_table
from benchmarks.servers import Server, viralfx, worker
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from tests.integration.test_postgres_enqueue import psql
from tests.servers.postgres import Database
from tests.servers.waiting import wait_until
from tests.system.jobs import JOBS

from viralfx.bootstrap.assembly import assemble
from viralfx.jobs.service import JobService
from viralfx.settings import read_settings

ORDERS = 10_000
SAMPLES = 100
"""Of each delay."""
MAX_DELAY_SECONDS = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(prog="just bench-promises", description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", default=[*PARTS], choices=PARTS, help="default: all")
    add("--orders", type=int, default=ORDERS, help=f"each way; default: {ORDERS}")
    add("--minutes", type=float, default=MINUTES, help=f"of the schedule; default: {MINUTES:g}")
    add("--kills", type=int, help="of its workers; default: one a minute")
    add("--each-second", action="store_true", help="a schedule of every second, for a trial")
    add("--rounds", type=int, default=ROUNDS, help=f"of the limits; default: {ROUNDS}")
    add("--jobs", type=int, default=BYSTANDERS, help=f"in each; default: {BYSTANDERS}")
    add("--samples", type=int, default=SAMPLES, help=f"of each delay; default: {SAMPLES}")
    add("--check", action="store_true", help="exit 1 when a target is missed")
    add("--dry", action="store_true", help="leave RESULTS.md as it is")
    options = parser.parse_args(arguments)
    if options.each_second and not options.dry:
        parser.error("--each-second is for a trial: add --dry")
    codes = []
    with testbed() as bed:
        for name in options.only:
            part = PARTS[name](bed, options)
            lines = [
                *circumstances(command("bench-promises"), str(bed), part.how),
                "",
                *part.table,
                "",
                *target_table(part.targets),
                "",
                part.reading,
            ]
            section = f"jobs.promises.{name}"
            codes.append(
                publish(section, lines, part.targets, check=options.check, record=not options.dry)
            )
    return max(codes)


# -- orders --------------------------------------------------------------------------------------


INSERT = "INSERT INTO orders VALUES ({})"


def _is_kept(number: int) -> bool:
    """Return True if the transaction of an order commits."""
    return number % 2 == 0


async def _by_asyncpg(jobs: JobService, url: str, orders: int) -> None:
    connection = await asyncpg.connect(url)
    for number in range(orders):
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(INSERT.format(number))
        await jobs.submit(ORDER, number, connection=connection)
        await (transaction.commit() if _is_kept(number) else transaction.rollback())
    await connection.close()


async def _by_session(jobs: JobService, url: str, orders: int) -> None:
    engine = create_async_engine(url.replace("postgresql:", "postgresql+asyncpg:"))
    sessions = async_sessionmaker(engine)
    for number in range(orders):
        async with sessions() as session:
            await session.execute(text(INSERT.format(number)))
            await jobs.submit(ORDER, number, connection=session)
            await (session.commit() if _is_kept(number) else session.rollback())
    await engine.dispose()


async def _by_psql(_: JobService, url: str, orders: int) -> None:
    script = "".join(
        f"BEGIN; {INSERT.format(number)};"
        f" SELECT viralfx_ops.enqueue('{ORDER}', '{number}');"
        f" {'COMMIT' if _is_kept(number) else 'ROLLBACK'};\n"
        for number in range(orders)
    )
    arguments = [psql(), "-qAt", "-v", "ON_ERROR_STOP=1", url]
    await asyncio.to_thread(
        lambda: subprocess.run(
            arguments, input=script, text=True, stdout=subprocess.DEVNULL, check=True
        )
    )


WAYS: Mapping[str, Callable[[JobService, str, int], Awaitable[None]]] = {
    "asyncpg": _by_asyncpg,
    "SQLAlchemy's AsyncSession": _by_session,
    "`enqueue` in psql": _by_psql,
}


def orders(bed: Testbed, options: argparse.Namespace) -> Part:
    """Place orders each way; count their jobs."""
    rows, targets = [], []
    for way, place in WAYS.items():
        database = Database(bed.postgres, bed.ledger())
        database.execute("CREATE TABLE orders (number int PRIMARY KEY)")
        environment = {**bed.our_environment(database.name, with_redis=False)}
        environment["TASK_MODULES"] = MODULE
        seconds = asyncio.run(_placed(environment, place, database.url, options.orders))
        committed = [number for (number,) in database.execute("SELECT * FROM orders ORDER BY 1")]
        jobs = database.execute(
            f"SELECT payload::text::int FROM viralfx_ops.viralfx_all_jobs WHERE task = '{ORDER}'"  # noqa: S608 - a constant
        )
        of_jobs = Counter(number for (number,) in jobs)
        kept = Counter(filter(_is_kept, range(options.orders)))
        if committed != [*kept]:
            raise RuntimeError(f"{way}: {len(committed)} orders were committed")
        wrong = ((of_jobs - kept) + (kept - of_jobs)).total()
        targets.append(none(f"jobs too many or too few, by {way}", wrong))
        rolled_back = options.orders - len(committed)
        figures = (len(committed), rolled_back, of_jobs.total())
        rate = f"{options.orders / seconds:,.0f}"
        rows.append((way, *(f"{figure:,}" for figure in figures), rate))
        bed.drop(database.name)
    return Part(
        how=f"{options.orders:,} orders each way, one after another on one connection",
        table=table(("way", "committed", "rolled back", "jobs", "transactions/s"), rows),
        targets=targets,
        reading="The payload of a job is the number of its order, so each one is compared.",
    )


async def _placed(
    environment: Mapping[str, str],
    place: Callable[[JobService, str, int], Awaitable[None]],
    url: str,
    count: int,
) -> float:
    """Place orders; return the seconds."""
    assembly = assemble(read_settings(environment))
    await assembly.operations.start()
    try:
        began = time.monotonic()
        await place(assembly.jobs.service, url, count)
        return time.monotonic() - began
    finally:
        assembly.operations.shutdown.trigger("the orders are placed")
        await assembly.operations.shutdown.run()


# -- delays --------------------------------------------------------------------------------------


def delays(bed: Testbed, options: argparse.Namespace) -> Part:
    """Measure how soon progress is shown and a cancellation is seen, job by job."""
    name = bed.ledger()
    environment = {**bed.our_environment(name, with_redis=False), "TASK_MODULES": MODULE}
    rng = random.Random(options.samples)  # noqa: S311 - the same pauses in each run
    with ExitStack() as stack:
        programs = (viralfx("viralfx serve", **environment), worker("worker", **environment))
        servers = [stack.enter_context(Server(each, anywhere=True)) for each in programs]
        for server in servers:
            server.wait_for_200("/health/ready", seconds=READY_SECONDS)
        base = f"http://127.0.0.1:{servers[0].port}"
        client = stack.enter_context(httpx.Client(base_url=base, timeout=30))
        samples = [_delays_of_one(client, rng) for _ in range(options.samples)]
    bed.drop(name)
    shown, seen = zip(*samples, strict=True)
    found = {"progress shown": sorted(shown), "cancellation seen": sorted(seen)}
    return Part(
        how=f"{options.samples} jobs one after another, one worker, no Redis",
        table=table(
            ("delay", "p50 s", "p99 s", "longest s"),
            (
                (what, *(f"{_rank(each, share):.2f}" for share in (0.5, 0.99, 1.0)))
                for what, each in found.items()
            ),
        ),
        targets=[
            Target(
                what=f"{what}, longest",
                measured=each[-1],
                limit=MAX_DELAY_SECONDS,
                at_least=False,
                unit=" s",
            )
            for what, each in found.items()
        ],
        reading="A task reports the time a hundred times a second. The delay of its progress is the"
        " age of the report that the API shows at a random moment, with the time of the request."
        " That of a cancellation is from the request to the moment at which the task gets its"
        " `CancelledError`. Both have one clock, the monotonic one of the machine.",
    )


def _delays_of_one(client: httpx.Client, rng: random.Random) -> tuple[float, float]:
    """Return the age of the progress shown, and the time until the cancellation was seen."""

    def job() -> dict[str, Any]:
        shown: dict[str, Any] = client.get(address).raise_for_status().json()
        return shown

    body = {"task": OBSERVED, "payload": None}
    accepted = client.post(JOBS, json=body).raise_for_status().json()
    address = f"{JOBS}/{accepted['id']}"
    wait_until(lambda: job()["progress"], what="progress")
    time.sleep(rng.uniform(0.0, 1.0))
    reported = job()["progress"]["current"]
    age = time.monotonic() - reported
    time.sleep(rng.uniform(0.0, 1.0))
    requested = time.monotonic()
    client.post(f"{address}/cancel").raise_for_status()
    wait_until(lambda: job()["state"] == "cancelled", what="cancellation")
    progress = job()["progress"]
    if progress["message"] != CANCELLED:
        raise RuntimeError(f"the task has not reported its cancellation: {progress}")
    return age, progress["current"] - requested


def _rank(values: Sequence[float], share: float) -> float:
    """Return the percentile of sorted values by the nearest rank; ``share`` is from 0 to 1."""
    return values[max(0, math.ceil(len(values) * share) - 1)]


PARTS: Mapping[str, Callable[[Testbed, argparse.Namespace], Part]] = {
    each.__name__: each for each in (orders, schedule, limits, delays)
}

if __name__ == "__main__":
    sys.exit(main())
