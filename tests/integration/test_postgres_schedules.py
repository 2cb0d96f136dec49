"""Schedules on Postgres: each time once, while workers die, clocks differ and answers are lost."""

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any, cast

import pytest
from tests.contracts.ledgers import draft, later
from tests.integration.job_ledgers import ledger_in
from tests.servers.fault_proxy import CutCommits
from tests.servers.fixtures import FaultProxies
from tests.servers.postgres import Database
from tests.servers.waiting import until
from tests.soak import SOAK

from viralfx.adapters.codec import MsgspecCodec
from viralfx.core.clock import SystemClock
from viralfx.core.errors import LedgerUnavailableError
from viralfx.jobs.ledger import JobLedger
from viralfx.jobs.memory import MemoryNotifier
from viralfx.jobs.postgres import PostgresJobLedger
from viralfx.jobs.schedule import Schedule
from viralfx.jobs.tasks import TaskRegistry, declared_task, task
from viralfx.jobs.worker.worker import JobWorker, WorkerConfig

WORKERS = 4
LEASE = 1.5
SECONDS = float(os.environ.get("VIRALFX_TEST_SECONDS", "60" if SOAK else "6"))
SKEWS = (-7200.0, 0.0, 86_400.0, 3.0)
"""Seconds by which the clocks of the workers are ahead."""


class SkewedClock(SystemClock):
    """A wall clock that is wrong."""

    def __init__(self, seconds: float) -> None:
        self._ahead = timedelta(seconds=seconds)

    def now(self) -> datetime:
        """Return the wrong time."""
        return super().now() + self._ahead


class Connection:
    """The ledger as one worker reaches it; cut, each call hangs, as if the worker had died."""

    def __init__(self, ledger: PostgresJobLedger) -> None:
        self._ledger = ledger
        self.cut = False

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        """Return a method of the ledger."""

        async def call(*arguments: Any, **options: Any) -> Any:
            if self.cut:
                await asyncio.Event().wait()
            return await getattr(self._ledger, name)(*arguments, **options)

        return call


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 90.0)
async def test_each_second_runs_once(migrated_database: Database) -> None:
    """Over workers that die and are replaced, whose clocks differ by hours."""

    @task("tick", cron="* * * * *")
    async def tick(_: None) -> None: ...

    declared = declared_task(tick)
    assert declared is not None
    # A declaration has no seconds; a schedule has, so that there are enough times to see.
    declared = replace(declared, cron="* * * * * *")
    rng = random.Random(7)  # noqa: S311 - chooses workers
    workers: list[tuple[JobWorker, Connection]] = []

    def start(ledger: PostgresJobLedger) -> None:
        """Start another worker."""
        connection = Connection(ledger)
        worker = JobWorker(
            # Later workers have smaller names, so that each replacement changes the leader.
            WorkerConfig(
                name=f"w{999 - len(workers)}",
                queues={"default": 5},
                lease=LEASE,
                sweep_interval=0.5,
            ),
            ledger=cast(JobLedger, connection),
            notifier=MemoryNotifier(),
            tasks=TaskRegistry([declared]),
            codec=MsgspecCodec(),
            clock=SkewedClock(SKEWS[len(workers) % WORKERS]),
        )
        worker.start()
        workers.append((worker, connection))

    def times() -> list[datetime]:
        """Return the times of all jobs, in order."""
        rows = migrated_database.execute(
            "select asked_run_at from viralfx_all_jobs order by asked_run_at"
        )
        return [time for (time,) in rows]

    def left() -> int:
        """Return how many jobs of seconds before the end are not completed."""
        rows = migrated_database.execute("select asked_run_at from viralfx_jobs")
        return sum(time < stopped_at for (time,) in rows)

    loop = asyncio.get_running_loop()
    async with ledger_in(migrated_database, pool_max=10) as ledger:
        for _ in range(WORKERS):
            start(ledger)
        ends = loop.time() + SECONDS
        while loop.time() < ends:
            await asyncio.sleep(rng.uniform(1.0, 2.0) * (5.0 if SOAK else 1.0))
            _, connection = rng.choice([each for each in workers if not each[1].cut])
            connection.cut = True
            start(ledger)
        ((stopped_at,),) = migrated_database.execute("select clock_timestamp()")
        await until(lambda: times()[-1:] > [stopped_at], seconds=30.0)
        await until(lambda: not left(), seconds=30.0)
        found = times()
        for worker, connection in workers:
            connection.cut = False
            await worker.drain(5.0)

    assert {later_ - earlier for earlier, later_ in pairwise(found)} == {timedelta(seconds=1)}
    assert len(found) >= SECONDS - 3
    assert all(time.microsecond == 0 for time in found)


async def test_a_time_runs_once_although_answers_are_lost(
    migrated_database: Database, fault_proxy: FaultProxies
) -> None:
    """A commit may have succeeded or not; a call that made a job says so."""
    proxy = fault_proxy(migrated_database.server.port)
    hourly = Schedule(task="hour", cron="0 * * * *")
    async with ledger_in(migrated_database, through=proxy) as ledger:
        (state,) = await ledger.declare_schedules([hourly], 86_400.0)
        proxy.mode = CutCommits(0.02, random.Random(7))  # noqa: S311 - chooses commits
        created = []
        for hours in range(30):
            time = later(state.since, 3600.0 * hours)
            answer = None
            while answer is None:
                # As a worker does, with a new draft after an outage.
                with suppress(LedgerUnavailableError):
                    answer = await ledger.accept_scheduled(draft(task="hour", run_at=time))
            assert answer.handled_until == time
            created.append(answer.created)
    rows = migrated_database.execute(
        "select count(*), count(distinct asked_run_at) from viralfx_jobs"
    )

    assert rows == [(30, 30)]
    assert sum(created) >= 25
