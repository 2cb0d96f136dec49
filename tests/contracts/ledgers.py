"""The ledgers that the contract of ``JobLedger`` is run against, and what its tests do with one.

A new adapter adds a subclass of :class:`Kept` and a row to ``LEDGERS``.
"""

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID

import pytest
from tests.integration.postgres_clients import config_of, opened
from tests.manual_clock import ManualClock
from tests.servers.postgres import Database

from viralfx.adapters.memory import MemoryJobLedger
from viralfx.adapters.postgres import PostgresDatabase, PostgresJobLedger
from viralfx.domain.jobs.job import (
    Claim,
    Job,
    JobDraft,
    JobError,
    JobState,
    completed,
    failed,
    retried,
)
from viralfx.domain.jobs.ledger import JobLedger, QueueCounts

T = TypeVar("T")

LONG = 60.0
"""Seconds of a lease that outlives any test."""
SHORT = 0.2
"""Seconds of a lease that a test waits for."""
TURNS = (0, 1, 2, 3, 5, 10, 30, 100)
"""Of the loop, after which a step is cut: a server's answer takes some tens."""
ERROR = JobError(code="error", message="the task raised")
EARLIER = JobError(code="timeout", message="an earlier attempt")

_numbers = itertools.count(1)
_FIRST_ID = UUID("01990000-0000-7000-8000-000000000000").int


class Kept(ABC):
    """A ledger, empty, with what tests need besides."""

    undoes = True
    """Whether what an effect wrote is rolled back with its job."""

    def __init__(self, ledger: JobLedger) -> None:
        self.ledger = ledger

    @abstractmethod
    def now(self) -> datetime:
        """Return the ledger's time, in UTC."""

    @abstractmethod
    async def pass_time(self) -> None:
        """Let a little of the ledger's time pass."""

    @abstractmethod
    async def write(self, connection: Any, text: str) -> None:
        """Write what an effect writes, through the connection it was given."""

    @abstractmethod
    async def written(self) -> Sequence[str]:
        """Return what effects wrote and nothing undid, in order."""

    async def until(self, look: Callable[[], Awaitable[T]]) -> T:
        """Look until what is seen is true and return it, for at most ten seconds."""
        async with asyncio.timeout(10.0):
            while not (seen := await look()):
                await self.pass_time()
        return seen

    # -- short ways to what many tests begin with ---------------------------------------------

    async def accept(self, count: int = 1, **more: Any) -> list[Job]:
        """Have new jobs accepted one after the other."""
        jobs = []
        for _ in range(count):
            (accepted,) = await self.ledger.accept([draft(**more)])
            assert accepted.created
            jobs.append(accepted.job)
        return jobs

    async def claim(
        self, count: int = 1, *, worker: str = "w", queue: str = "default", lease: float = LONG
    ) -> list[Claim]:
        """Give due jobs, just so many, to a worker that registers for this."""
        await self.ledger.register(worker, [queue], lease)
        claims = await self.ledger.claim(queue, worker, count)
        assert len(claims) == count
        return list(claims)

    async def accept_and_claim(self, **more: Any) -> Claim:
        """Have a new job accepted and given to a worker."""
        (job,) = await self.accept()
        (claim,) = await self.claim(**more)
        assert claim.id == job.id
        return claim

    async def second_claim(self) -> Claim:
        """Have a new job accepted, fail once with ``EARLIER``, and given to a worker again."""
        first = await self.accept_and_claim()
        await self.ledger.settle([retried(first, EARLIER, 0.0)])
        (claim,) = await self.claim()
        assert (claim.id, claim.number, claim.attempt) == (first.id, 2, 2)
        return claim

    async def job(self, job_id: str) -> Job:
        """Return a job that there is."""
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
        """Wait until a worker's lease is over, by its being forgotten in the counts."""
        await self.ledger.register(worker, ["expiring"], SHORT)
        await self.until(self._nobody_expires)

    async def _nobody_expires(self) -> bool:
        counts = await self.ledger.counts()
        return "expiring" not in counts or not counts["expiring"].consumers


def draft(queue: str = "default", task: str = "task", **more: Any) -> JobDraft:
    """Make a draft; ids are in the order in which they are made."""
    more = {"payload": b"{}", "id": str(UUID(int=_FIRST_ID + next(_numbers)))} | more
    return JobDraft(queue=queue, task=task, **more)


class _MemoryKept(Kept):
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
        assert connection is None
        self._written.append(text)

    async def written(self) -> Sequence[str]:
        return self._written


@asynccontextmanager
async def _memory(_: pytest.FixtureRequest) -> AsyncIterator[Kept]:
    yield _MemoryKept()


class _PostgresKept(Kept):
    def __init__(self, pool: PostgresDatabase, database: Database) -> None:
        self._database = database
        super().__init__(PostgresJobLedger(pool))

    def now(self) -> datetime:
        ((now,),) = self._database.execute("select clock_timestamp()")
        assert isinstance(now, datetime)
        return now

    async def pass_time(self) -> None:
        await asyncio.sleep(0.01)

    async def write(self, connection: Any, text: str) -> None:
        await connection.execute("insert into effects (text) values ($1)", text)

    async def written(self) -> Sequence[str]:
        return [text for (text,) in self._database.execute("select text from effects order by id")]


@asynccontextmanager
async def _postgres(request: pytest.FixtureRequest) -> AsyncIterator[Kept]:
    database: Database = request.getfixturevalue("ledger_database")
    # What a test before this one cut off may still be under way.
    database.execute(_END_OTHERS)
    database.execute(_EMPTY)
    async with opened(config_of(database, pool_max=10)) as pool:
        yield _PostgresKept(pool, database)


_END_OTHERS = """
select pg_terminate_backend(pid, 10000) from pg_stat_activity
where datname = current_database() and pid <> pg_backend_pid()
"""
_EMPTY = """
truncate effects, viralfx_jobs, viralfx_workers, viralfx_job_counters restart identity
"""


Make = Callable[[pytest.FixtureRequest], AbstractAsyncContextManager[Kept]]

LEDGERS: dict[str, Make] = {"memory": _memory, "postgres": _postgres}


async def cut(step: Coroutine[Any, Any, object], turns: int) -> None:
    """Cancel a step after so many turns of the loop, and wait for its end."""
    task = asyncio.create_task(step)
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    async with asyncio.timeout(10.0):
        await asyncio.wait({task})


async def totals(kept: Kept, queue: str = "default") -> QueueCounts:
    """Return the counts of a queue's jobs, without how long they wait and who consumes it."""
    return replace((await kept.ledger.counts())[queue], oldest_due=0.0, consumers=0)


def ids(jobs: Iterable[Job | Claim]) -> list[str]:
    """Return their ids, in order."""
    return [job.id for job in jobs]


def later(moment: datetime, seconds: float) -> datetime:
    """Return a moment some seconds after another, or before it."""
    return moment + timedelta(seconds=seconds)
