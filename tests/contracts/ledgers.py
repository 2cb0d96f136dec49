"""The ledgers that the contract suite of ``JobLedger`` runs against.

To test a new adapter, add a subclass of :class:`LedgerCase` and a row to ``LEDGERS``.
"""

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from functools import cache
from typing import Any, TypeVar
from uuid import UUID

import pytest
from tests.integration.postgres_clients import config_of, opened
from tests.manual_clock import ManualClock
from tests.servers.pgbouncer import POOLED, Poolers
from tests.servers.postgres import Database
from tests.soak import SOAK

from viralfx.jobs.ledger import JobLedger, QueueCounts
from viralfx.jobs.memory import MemoryJobLedger
from viralfx.jobs.model import (
    Claim,
    Job,
    JobDraft,
    JobError,
    JobState,
    completed,
    failed,
    retried,
)
from viralfx.jobs.postgres import PostgresJobLedger
from viralfx.postgres import PostgresConfig, PostgresDatabase

T = TypeVar("T")

LONG_LEASE = 60.0
"""Seconds of a lease that outlasts every test."""
SHORT_LEASE = 0.2
"""Seconds of a lease whose end a test waits for."""
TURNS = (0, 1, 2, 3, 5, 10, 30, 100) if SOAK else (0, 2, 10, 100)
"""Turns of the loop after which a step is cancelled; a response of a server takes some tens."""
ERROR = JobError(code="error", message="the task raised")
EARLIER = JobError(code="timeout", message="an earlier attempt")

_numbers = itertools.count(1)
_FIRST_ID = UUID("01990000-0000-7000-8000-000000000000").int


class LedgerCase(ABC):
    """An empty ledger, and the operations that its tests need."""

    undoes = True
    """True if an effect is rolled back with its job."""

    def __init__(self, ledger: JobLedger) -> None:
        self.ledger = ledger

    @abstractmethod
    def now(self) -> datetime:
        """Return the time of the ledger, in UTC."""

    @abstractmethod
    async def pass_time(self) -> None:
        """Let a short time of the ledger pass."""

    @abstractmethod
    async def write(self, connection: Any, text: str) -> None:
        """Write as an effect does, through the effect's connection."""

    @abstractmethod
    async def written(self) -> Sequence[str]:
        """Return the texts of effects that were not rolled back, in order."""

    async def until(self, condition: Callable[[], Awaitable[T]]) -> T:
        """Return the first true value of ``condition``; fail after ten seconds."""
        async with asyncio.timeout(10.0):
            while not (seen := await condition()):
                await self.pass_time()
        return seen

    # -- common first steps of tests -----------------------------------------------------------

    async def accept(self, count: int = 1, **more: Any) -> list[Job]:
        """Accept new jobs one after the other."""
        jobs = []
        for _ in range(count):
            (accepted,) = await self.ledger.accept([draft(**more)])
            assert accepted.created
            jobs.append(accepted.job)
        return jobs

    async def claim(
        self,
        count: int = 1,
        *,
        worker: str = "w",
        queue: str = "default",
        lease: float = LONG_LEASE,
    ) -> list[Claim]:
        """Register a worker and claim exactly ``count`` due jobs for it."""
        await self.ledger.register(worker, [queue], lease)
        claims = await self.ledger.claim(queue, worker, count)
        assert len(claims) == count
        return list(claims)

    async def accept_and_claim(self, **more: Any) -> Claim:
        """Accept a new job and claim it."""
        (job,) = await self.accept()
        (claim,) = await self.claim(**more)
        assert claim.id == job.id
        return claim

    async def second_claim(self) -> Claim:
        """Accept a new job, let it fail once with ``EARLIER``, and claim it again."""
        first = await self.accept_and_claim()
        await self.ledger.settle([retried(first, EARLIER, 0.0)])
        (claim,) = await self.claim()
        assert (claim.id, claim.number, claim.attempt) == (first.id, 2, 2)
        return claim

    async def job(self, job_id: str) -> Job:
        """Return a job that exists."""
        found = await self.ledger.get(job_id)
        assert found is not None
        return found

    async def in_state(self, state: JobState, **more: Any) -> Job:
        """Bring a new job into a state; no other job may wait."""
        (job,) = await self.accept(**more)
        if state is JobState.CANCELLED:
            return await self.ledger.cancel(job.id)
        if state is not JobState.WAITING:
            (claim,) = await self.claim(queue=job.queue)
            if state is JobState.COMPLETED:
                await self.ledger.settle([completed(claim, b"1")])
            elif state is JobState.FAILED:
                await self.ledger.settle([failed(claim, ERROR)])
        return await self.job(job.id)

    async def expire(self, worker: str = "w") -> None:
        """Wait until a worker's lease has expired, by the counts of consumers."""
        await self.ledger.register(worker, ["expiring"], SHORT_LEASE)
        await self.until(self._has_expired)

    async def _has_expired(self) -> bool:
        counts = await self.ledger.counts()
        return "expiring" not in counts or not counts["expiring"].consumers


def draft(queue: str = "default", task: str = "task", **more: Any) -> JobDraft:
    """Return a draft; ids increase in the order of the calls."""
    more = {"payload": b"{}", "id": str(UUID(int=_FIRST_ID + next(_numbers)))} | more
    return JobDraft(queue=queue, task=task, **more)


class _MemoryCase(LedgerCase):
    undoes = False

    def __init__(self) -> None:
        self.clock = ManualClock()
        self._written: list[str] = []
        super().__init__(MemoryJobLedger(self.clock))

    def now(self) -> datetime:
        return self.clock.now()

    async def pass_time(self) -> None:
        await self.clock.advance(0.01)

    async def write(self, connection: Any, text: str) -> None:
        assert connection is not None
        self._written.append(text)

    async def written(self) -> Sequence[str]:
        return self._written


async def _memory(_: pytest.FixtureRequest, __: "Pools") -> LedgerCase:
    return _MemoryCase()


class _PostgresCase(LedgerCase):
    def __init__(self, pool: PostgresDatabase, database: Database) -> None:
        self._database = database
        super().__init__(PostgresJobLedger(pool))

    def now(self) -> datetime:
        ((now,),) = self._database.execute("select clock_timestamp()")
        assert isinstance(now, datetime)
        return now

    async def pass_time(self) -> None:
        await asyncio.sleep(0.02)

    async def write(self, connection: Any, text: str) -> None:
        await connection.execute("insert into effects (text) values ($1)", text)

    async def written(self) -> Sequence[str]:
        return [text for (text,) in self._database.execute("select text from effects order by id")]


class Pools:
    """The pools of the tests of one file, which run in one loop.

    Each statement costs a new connection ten times as much as one that has run it. Each test of
    a soak run has a pool of its own.
    """

    def __init__(self, stack: AsyncExitStack) -> None:
        """``stack`` closes them."""
        self._stack = stack
        self._opened: dict[str, PostgresDatabase] = {}

    async def empty(self, name: str, config: PostgresConfig) -> PostgresDatabase:
        """Return a pool on a database without rows; it is opened at the first call."""
        if SOAK:
            await self._stack.aclose()
            self._opened.clear()
        if name not in self._opened:
            pool = await self._stack.enter_async_context(opened(config))
            if not SOAK:
                # The ledgers of all tests take turns with one connection for heartbeats.
                pool.dedicated = cache(pool.dedicated)  # type: ignore[method-assign]
            self._opened[name] = pool
        async with self._opened[name].acquire() as connection:
            await connection.execute(_EMPTY)
        return self._opened[name]


@asynccontextmanager
async def open_pools() -> AsyncIterator[Pools]:
    """Return pools that are closed at the end of the block."""
    async with AsyncExitStack() as stack:
        yield Pools(stack)


async def _postgres(request: pytest.FixtureRequest, pools: Pools) -> LedgerCase:
    database: Database = request.getfixturevalue("ledger_database")
    pool = await pools.empty("direct", config_of(database, pool_max=10))
    return _PostgresCase(pool, database)


def _behind(mode: str, prepared: int) -> "Make":
    async def made(request: pytest.FixtureRequest, pools: Pools) -> LedgerCase:
        database: Database = request.getfixturevalue("ledger_database")
        poolers: Poolers = request.getfixturevalue("shared_pgbouncer")
        pooler = poolers(database.server, mode, max_prepared_statements=prepared)
        config = config_of(database, through=pooler, pooler=mode, pool_max=10)
        return _PostgresCase(await pools.empty(f"{mode} {prepared}", config), database)

    return made


# A call that an earlier test cancelled may still be running. TRUNCATE replaces the files of a table
# and of its indexes, which costs five times as much as deleting a few rows.
_EMPTY = """
do $$ declare name text; begin
    perform pg_terminate_backend(pid, 10000) from pg_stat_activity
    where datname = current_database() and pid <> pg_backend_pid() and state <> 'idle';
    foreach name in array array[
        'public.effects', 'viralfx_ops.viralfx_jobs', 'viralfx_ops.viralfx_finished_jobs',
        'viralfx_ops.viralfx_job_counters', 'viralfx_ops.viralfx_workers',
        'viralfx_ops.viralfx_unknown_tasks', 'viralfx_ops.viralfx_schedules',
        'viralfx_ops.viralfx_paused_queues', 'viralfx_ops.viralfx_task_limits',
        'viralfx_ops.viralfx_instances', 'viralfx_ops.viralfx_transitions'
    ] loop
        if pg_relation_size(name::regclass) > 100000 then execute 'truncate ' || name;
        else execute 'delete from ' || name; end if;
    end loop;
end $$
"""


Make = Callable[[pytest.FixtureRequest, Pools], Awaitable[LedgerCase]]

LEDGERS: dict[str, Make] = {
    "memory": _memory,
    "postgres": _postgres,
    **{f"pgbouncer {mode} {number}": _behind(mode, number) for mode, number in POOLED},
}


async def cancelled_after(step: Coroutine[Any, Any, object], turns: int) -> None:
    """Cancel a step after so many turns of the loop, and wait until it has ended."""
    task = asyncio.create_task(step)
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    async with asyncio.timeout(10.0):
        await asyncio.wait({task})


async def totals(case: LedgerCase, queue: str = "default") -> QueueCounts:
    """Return the counts of a queue without ``oldest_due`` and ``consumers``."""
    return replace((await case.ledger.counts())[queue], oldest_due=0.0, consumers=0)


def ids(jobs: Iterable[Job | Claim]) -> list[str]:
    """Return the ids of jobs, in order."""
    return [job.id for job in jobs]


def listed(job: Job) -> Job:
    """Return a job as a list has it: without payload, result and history."""
    return replace(job, payload=b"", result=None, history=())


def later(moment: datetime, seconds: float) -> datetime:
    """Return the moment ``seconds`` after another one; negative for before."""
    return moment + timedelta(seconds=seconds)
