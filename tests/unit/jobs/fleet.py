"""A ledger, a bell and workers, and what may happen to them."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

from tests.virtual_time import LoopClock

from viralfx.adapters.codec import MsgspecCodec
from viralfx.adapters.memory import MemoryBell, MemoryJobLedger
from viralfx.domain.errors import WorkLostError
from viralfx.domain.jobs.job import (
    Claim,
    Job,
    JobDraft,
    JobState,
    LedgerUnavailableError,
    Settlement,
    new_job_id,
)
from viralfx.domain.jobs.ledger import Accepted, Found, JobLedger, QueueCounts, Swept
from viralfx.domain.jobs.tasks import Task, TaskRegistry
from viralfx.domain.jobs.transport import Bell
from viralfx.domain.jobs.worker import JobWorker
from viralfx.domain.resilience.retry_policy import RetryPolicy


class ShakyLedger:
    """The way to a ledger: it can be away, slow, or hang; it notes the calls made to it."""

    def __init__(self, kept: MemoryJobLedger) -> None:
        self._kept = kept
        self.calls: list[tuple[str, object]] = []
        self.away: frozenset[str] = frozenset()
        """The steps that fail now."""
        self.away_after: frozenset[str] = frozenset()
        """The steps that happen and fail all the same."""
        self.hanging: frozenset[str] = frozenset()
        """The steps that do not answer, whoever cancels them."""
        self.seconds: dict[str, float] = {}
        """How long a step takes."""

    EVERYTHING = frozenset(
        {"accept", "claim", "settle", "settle_with_effect", "register", "leave", "sweep", "counts"}
    )

    async def _step(self, name: str, about: object) -> None:
        self.calls.append((name, about))
        if name in self.away:
            raise LedgerUnavailableError("away")
        while name in self.hanging:
            try:
                await asyncio.sleep(0.1)
            except asyncio.CancelledError:
                continue
        if name in self.seconds:
            await asyncio.sleep(self.seconds[name])
        if name in self.away:
            raise LedgerUnavailableError("away")

    def _after(self, name: str) -> None:
        if name in self.away_after:
            raise LedgerUnavailableError("away, afterwards")

    def count(self, name: str) -> int:
        """Return how often a step was asked for."""
        return sum(called == name for called, _ in self.calls)

    async def accept(self, drafts: Sequence[JobDraft]) -> Sequence[Accepted]:
        """Accept, when it answers."""
        await self._step("accept", len(drafts))
        accepted = await self._kept.accept(drafts)
        self._after("accept")
        return accepted

    async def claim(
        self, queue: str, worker: str, limit: int, ids: Collection[str] | None = None
    ) -> Sequence[Claim]:
        """Claim, likewise."""
        await self._step("claim", (queue, worker, limit, ids))
        claims = await self._kept.claim(queue, worker, limit, ids)
        self._after("claim")
        return claims

    async def settle(self, settlements: Sequence[Settlement]) -> Collection[str]:
        """Settle, likewise."""
        await self._step("settle", list(settlements))
        taken = await self._kept.settle(settlements)
        self._after("settle")
        return taken

    async def settle_with_effect(
        self, claim: Claim, effect: Callable[[Any], Awaitable[bytes]]
    ) -> bool:
        """Settle with an effect, likewise."""
        await self._step("settle_with_effect", claim)
        taken = await self._kept.settle_with_effect(claim, effect)
        self._after("settle_with_effect")
        return taken

    async def register(
        self,
        worker: str,
        queues: Collection[str],
        lease: float,
        holding: Collection[str] | None = None,
    ) -> datetime:
        """Register, likewise."""
        await self._step("register", worker)
        return await self._kept.register(worker, queues, lease, holding)

    async def leave(self, worker: str) -> Mapping[str, Sequence[str]]:
        """Leave, likewise."""
        await self._step("leave", worker)
        return await self._kept.leave(worker)

    async def sweep(self, max_crashes: int, before: datetime | None = None) -> Swept:
        """Sweep, likewise."""
        await self._step("sweep", max_crashes)
        return await self._kept.sweep(max_crashes, before)

    async def counts(self) -> Mapping[str, QueueCounts]:
        """Count, likewise."""
        await self._step("counts", None)
        return await self._kept.counts()

    async def get(self, job_id: str) -> Job | None:
        """Get, always."""
        return await self._kept.get(job_id)

    async def page(
        self,
        *,
        queue: str | None = None,
        state: JobState | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> Sequence[Job]:
        """Return a page, always."""
        return await self._kept.page(queue=queue, state=state, before=before, limit=limit)

    async def find(
        self,
        correlation_id: str,
        *,
        queue: str | None = None,
        state: JobState | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> Found:
        """Look, always."""
        return await self._kept.find(
            correlation_id, queue=queue, state=state, before=before, limit=limit
        )

    async def retry(self, job_id: str) -> Job:
        """Retry, always."""
        return await self._kept.retry(job_id)

    async def cancel(self, job_id: str) -> Job:
        """Cancel, always."""
        return await self._kept.cancel(job_id)

    async def prune(self, older_than: float, limit: int = 1000) -> int:
        """Prune, always."""
        return await self._kept.prune(older_than, limit)


class ShakyBell(MemoryBell):
    """A bell in memory that can be away or deaf; it keeps what was rung."""

    def __init__(self) -> None:
        super().__init__()
        self.rung: list[Bell] = []
        self.away = False
        self.deaf = False
        self.seconds = 0.0

    async def ring(self, bell: Bell) -> None:
        """Ring, unless it is away or deaf."""
        if self.seconds:
            await asyncio.sleep(self.seconds)
        if self.away:
            raise ConnectionError("the transport is away")
        self.rung.append(bell)
        if not self.deaf:
            await super().ring(bell)

    def hears(self, queue: str) -> bool:
        """Tell whether it does."""
        return not self.deaf and super().hears(queue)


class Fleet:
    """Workers on one ledger, and the tasks they know."""

    def __init__(self) -> None:
        self.clock = LoopClock()
        self.kept = MemoryJobLedger(self.clock)
        """The ledger, as those see it for whom it is never away."""
        self.ledger = ShakyLedger(self.kept)
        self.bell = ShakyBell()
        self.tasks = TaskRegistry()
        self.done: list[Any] = []
        """The payloads of executions that came to their end, in order."""
        self.cancelled: list[Any] = []
        self.running = 0
        self.most_running = 0
        self._workers: list[JobWorker] = []
        self.declare("note", self.note)
        self.declare("sleep", self.sleep)

    def declare(
        self,
        name: str,
        function: Callable[..., Awaitable[Any]],
        *,
        queue: str = "default",
        payload_type: Any = Any,
        wants_context: bool = False,
        transactional: bool = False,
        timeout: float | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        """Declare a task that all workers know."""
        self.tasks.add(
            Task(
                name=name,
                function=function,
                queue=queue,
                payload_type=payload_type,
                wants_context=wants_context or transactional,
                transactional=transactional,
                timeout=timeout,
                retry=retry,
            )
        )

    async def note(self, payload: Any) -> Any:
        """Note the payload and return it."""
        self.done.append(payload)
        return payload

    async def sleep(self, payload: float) -> None:
        """Take so many seconds."""
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(payload)
            self.done.append(payload)
        except asyncio.CancelledError:
            self.cancelled.append(payload)
            raise
        finally:
            self.running -= 1

    def worker(self, name: str = "w", *, ledger: JobLedger | None = None, **more: Any) -> JobWorker:
        """Make a worker that is not started."""
        options: dict[str, Any] = {"queues": {"default": 10}, "tasks": self.tasks} | more
        worker = JobWorker(
            ledger=ledger or self.ledger,
            transport=self.bell,
            codec=MsgspecCodec(),
            worker=name,
            clock=self.clock,
            **options,
        )
        self._workers.append(worker)
        return worker

    def start(self, name: str = "w", **options: Any) -> JobWorker:
        """Make a worker and start it."""
        worker = self.worker(name, **options)
        worker.start()
        return worker

    async def stop(self) -> None:
        """Let all workers leave."""
        self.ledger.away = self.ledger.away_after = self.ledger.hanging = frozenset()
        for worker in self._workers:
            with suppress(WorkLostError):
                await worker.drain(1.0)

    async def accept(
        self, name: str = "note", payload: str = "0", *, queue: str = "default", **more: Any
    ) -> str:
        """Accept a job without telling anybody; return its id."""
        draft = JobDraft(id=new_job_id(), queue=queue, task=name, payload=payload.encode(), **more)
        (accepted,) = await self.kept.accept([draft])
        return accepted.job.id

    async def submit(self, name: str = "note", payload: str = "0", **more: Any) -> str:
        """Accept a job and ring for it; return its id."""
        job_id = await self.accept(name, payload, **more)
        await self.bell.ring(Bell(queue=more.get("queue", "default"), ids=(job_id,)))
        return job_id

    async def job(self, job_id: str) -> Job:
        """Return a job that there is."""
        job = await self.ledger.get(job_id)
        assert job is not None
        return job

    async def until(self, look: Callable[[], Any], within: float = 60.0) -> float:
        """Let time pass until ``look`` returns what is true; return the seconds it took."""
        began = self.clock.monotonic()
        while True:
            seen = look()
            if asyncio.iscoroutine(seen):
                seen = await seen
            passed = self.clock.monotonic() - began
            if seen:
                return passed
            assert passed < within, "it did not come to that"
            await asyncio.sleep(max(0.001, passed / 150))

    async def final(self, *ids: str, within: float = 60.0) -> float:
        """Let time pass until the jobs are final; return the seconds until the last one was."""
        began = self.clock.now()

        async def all_final() -> bool:
            return all([(await self.job(job_id)).state.final for job_id in ids])

        await self.until(all_final, within)
        ends = [job.finished_at for job in [await self.job(job_id) for job_id in ids]]
        return max([(end - began).total_seconds() for end in ends if end is not None], default=0.0)
