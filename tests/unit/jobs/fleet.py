"""A ledger, a notifier and workers, with faults to inject."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from datetime import datetime
from typing import Any

from tests.virtual_time import LoopClock

from viralfx.adapters.codec import MsgspecCodec
from viralfx.core.clock import Clock
from viralfx.core.errors import LedgerUnavailableError, WorkLostError
from viralfx.core.ids import new_job_id
from viralfx.jobs.ledger import (
    MAX_ANNOUNCED,
    NO_LIMITS,
    Accepted,
    BulkStep,
    Check,
    Claims,
    Found,
    JobLedger,
    ProgressReport,
    QueueCounts,
    Registration,
    SweepResult,
    UnrunnableJobs,
)
from viralfx.jobs.limits import Limit
from viralfx.jobs.memory import MemoryJobLedger, MemoryNotifier
from viralfx.jobs.model import ANY_JOB, Claim, Job, JobDraft, JobFilter, Settlement
from viralfx.jobs.notifier import JobNotification
from viralfx.jobs.schedule import Schedule, ScheduledAcceptance, ScheduleState
from viralfx.jobs.tasks import Task, TaskRegistry
from viralfx.jobs.worker.worker import JobWorker, WorkerConfig
from viralfx.resilience.policy import RetryPolicy


class FaultyLedger:
    """A ledger that can be unavailable, slow or hang, and records its calls."""

    def __init__(self, ledger: MemoryJobLedger) -> None:
        self._ledger = ledger
        self.calls: list[tuple[str, object]] = []
        self.unavailable: frozenset[str] = frozenset()
        """The methods that raise."""
        self.failing_after: frozenset[str] = frozenset()
        """The methods that take effect and then raise."""
        self.hanging: frozenset[str] = frozenset()
        """The methods that do not return, even if cancelled."""
        self.seconds: dict[str, float] = {}
        """The duration of a method."""

    EVERYTHING = frozenset(
        {
            "accept",
            "claim",
            "due",
            "settle",
            "settle_with_effect",
            "register",
            "deregister",
            "sweep",
            "counts",
            "cancel_requests",
            "report",
            "declare_schedules",
            "accept_scheduled",
            "schedules",
        }
    )

    async def _step(self, name: str, about: object) -> None:
        self.calls.append((name, about))
        if name in self.unavailable:
            raise LedgerUnavailableError("unavailable")
        while name in self.hanging:
            try:
                await asyncio.sleep(0.1)
            except asyncio.CancelledError:
                continue
        if name in self.seconds:
            await asyncio.sleep(self.seconds[name])
        if name in self.unavailable:
            raise LedgerUnavailableError("unavailable")

    def _after(self, name: str) -> None:
        if name in self.failing_after:
            raise LedgerUnavailableError("unavailable, afterwards")

    def count(self, name: str) -> int:
        """Return how often a method was called."""
        return sum(called == name for called, _ in self.calls)

    async def accept(
        self, drafts: Sequence[JobDraft], *, check: Check | None = None
    ) -> Sequence[Accepted]:
        """Accept, with the faults of ``accept``."""
        await self._step("accept", len(drafts))
        accepted = await self._ledger.accept(drafts, check=check)
        self._after("accept")
        return accepted

    async def accept_in(
        self,
        connection: Any,
        drafts: Sequence[JobDraft],
        *,
        check: Check | None = None,
        on_commit: Callable[[Sequence[Accepted]], None],
    ) -> Sequence[Accepted]:
        """Accept in a transaction."""
        return await self._ledger.accept_in(connection, drafts, check=check, on_commit=on_commit)

    async def declare_schedules(
        self, schedules: Sequence[Schedule], forget_after: float
    ) -> Sequence[ScheduleState]:
        """Declare schedules, with the faults of ``declare_schedules``."""
        await self._step("declare_schedules", len(schedules))
        return await self._ledger.declare_schedules(schedules, forget_after)

    async def accept_scheduled(self, draft: JobDraft) -> ScheduledAcceptance | None:
        """Accept a job of a schedule, with the faults of ``accept_scheduled``."""
        await self._step("accept_scheduled", draft)
        accepted = await self._ledger.accept_scheduled(draft)
        self._after("accept_scheduled")
        return accepted

    async def schedules(self) -> Sequence[ScheduleState]:
        """Return the schedules, with the faults of ``schedules``."""
        await self._step("schedules", None)
        return await self._ledger.schedules()

    async def claim(
        self,
        queue: str,
        worker: str,
        limit: int,
        ids: Collection[str] | None = None,
        *,
        tasks: Collection[str] | None = None,
        limits: Mapping[str, Limit] = NO_LIMITS,
    ) -> Claims:
        """Claim, with the faults of ``claim``."""
        await self._step("claim", (queue, worker, limit, ids))
        claims = await self._ledger.claim(queue, worker, limit, ids, tasks=tasks, limits=limits)
        self._after("claim")
        return claims

    async def due(
        self,
        queues: Collection[str],
        tasks: Collection[str] | None = None,
        *,
        within: float = 0.0,
    ) -> Mapping[str, float]:
        """Ask for due jobs, with the faults of ``due``."""
        await self._step("due", tuple(queues))
        return await self._ledger.due(queues, tasks, within=within)

    async def settle(self, settlements: Sequence[Settlement]) -> Collection[str]:
        """Settle, with the faults of ``settle``."""
        await self._step("settle", list(settlements))
        taken = await self._ledger.settle(settlements)
        self._after("settle")
        return taken

    async def settle_with_effect(
        self,
        claim: Claim,
        effect: Callable[[Any], Awaitable[bytes]],
        progress: Callable[[], bytes | None] = lambda: None,
    ) -> bool:
        """Settle with an effect, with the faults of ``settle_with_effect``."""
        await self._step("settle_with_effect", claim)
        taken = await self._ledger.settle_with_effect(claim, effect, progress)
        self._after("settle_with_effect")
        return taken

    async def register(
        self,
        worker: str,
        queues: Collection[str],
        lease: float,
        holding: Collection[str] | None = None,
        *,
        tasks: Collection[str] | None = None,
        eligible: bool = True,
        grace: float | None = None,
    ) -> Registration:
        """Register, with the faults of ``register``."""
        await self._step("register", worker)
        return await self._ledger.register(
            worker, queues, lease, holding, tasks=tasks, eligible=eligible, grace=grace
        )

    async def deregister(self, worker: str) -> Mapping[str, Sequence[str]]:
        """Deregister, with the faults of ``deregister``."""
        await self._step("deregister", worker)
        return await self._ledger.deregister(worker)

    async def sweep(self, max_crashes: int, before: datetime | None = None) -> SweepResult:
        """Sweep, with the faults of ``sweep``."""
        await self._step("sweep", max_crashes)
        return await self._ledger.sweep(max_crashes, before)

    async def expire(
        self, patience: float, before: datetime | None = None
    ) -> Mapping[str, Sequence[str]]:
        """Expire, with the faults of ``expire``."""
        await self._step("expire", patience)
        return await self._ledger.expire(patience, before)

    async def unrunnable(self) -> Sequence[UnrunnableJobs]:
        """Count jobs that no worker can run, with the faults of ``unrunnable``."""
        await self._step("unrunnable", None)
        return await self._ledger.unrunnable()

    async def counts(self) -> Mapping[str, QueueCounts]:
        """Count, with the faults of ``counts``."""
        await self._step("counts", None)
        return await self._ledger.counts()

    async def pause(self, queue: str) -> None:
        """Pause a queue, without faults."""
        await self._ledger.pause(queue)

    async def resume(self, queue: str, limit: int = MAX_ANNOUNCED) -> Sequence[str]:
        """Resume a queue, without faults."""
        return await self._ledger.resume(queue, limit)

    async def get(self, job_id: str) -> Job | None:
        """Return a job, without faults."""
        return await self._ledger.get(job_id)

    async def page(self, wanted: JobFilter = ANY_JOB) -> Sequence[Job]:
        """Return a page, without faults."""
        return await self._ledger.page(wanted)

    async def find(self, correlation_id: str, wanted: JobFilter = ANY_JOB) -> Found:
        """Search, without faults."""
        return await self._ledger.find(correlation_id, wanted)

    async def retry(self, job_id: str) -> Job:
        """Retry, without faults."""
        return await self._ledger.retry(job_id)

    async def run(self, job_id: str) -> Job:
        """Make due, without faults."""
        return await self._ledger.run(job_id)

    async def pause_schedule(self, task: str) -> bool:
        """Pause a schedule, without faults."""
        return await self._ledger.pause_schedule(task)

    async def resume_schedule(self, task: str) -> bool:
        """Resume a schedule, without faults."""
        return await self._ledger.resume_schedule(task)

    async def cancel(self, job_id: str, *, running: bool = False) -> Job:
        """Cancel, without faults."""
        return await self._ledger.cancel(job_id, running=running)

    async def search(self, wanted: JobFilter) -> Found:
        """Search, without faults."""
        return await self._ledger.search(wanted)

    def retry_all(self, wanted: JobFilter, most: int | None = None) -> AsyncIterator[BulkStep]:
        """Retry many, without faults."""
        return self._ledger.retry_all(wanted, most)

    async def cancel_all(
        self, wanted: JobFilter, most: int | None = None
    ) -> AsyncIterator[BulkStep]:
        """Cancel many, with the faults of ``cancel_all`` in each step and after it."""
        await self._step("cancel_all", most)
        async for step in self._ledger.cancel_all(wanted, most):
            yield step
            self._after("cancel_all")

    async def cancel_requests(self, worker: str) -> Mapping[str, int]:
        """Return requests to cancel, with the faults of ``cancel_requests``."""
        await self._step("cancel_requests", worker)
        return await self._ledger.cancel_requests(worker)

    async def report(self, reports: Sequence[ProgressReport]) -> None:
        """Store reports, with the faults of ``report``."""
        await self._step("report", list(reports))
        await self._ledger.report(reports)

    async def prune(
        self, older_than: float, limit: int = 1000, *, failed: bool | None = None
    ) -> int:
        """Prune, with the faults of ``prune``."""
        await self._step("prune", failed)
        return await self._ledger.prune(older_than, limit, failed=failed)


class FaultyNotifier(MemoryNotifier):
    """A notifier in memory that can be unavailable or disconnected, and records notifications."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[JobNotification] = []
        self.unavailable = False
        self.disconnected = False
        self.seconds = 0.0

    async def notify(self, notification: JobNotification) -> None:
        """Send a notification, unless it is unavailable; deliver it, unless it is disconnected."""
        if self.seconds:
            await asyncio.sleep(self.seconds)
        if self.unavailable:
            raise ConnectionError("the notifier is unavailable")
        self.sent.append(notification)
        if not self.disconnected:
            await super().notify(notification)

    def is_connected(self, queue: str) -> bool:
        """Return whether it delivers notifications."""
        return not self.disconnected and super().is_connected(queue)


class Fleet:
    """Workers that share a ledger, and the tasks that they know."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or LoopClock()
        self.memory_ledger = MemoryJobLedger(self.clock)
        """The ledger without faults."""
        self.ledger = FaultyLedger(self.memory_ledger)
        self.notifier = FaultyNotifier()
        self.tasks = TaskRegistry()
        self.done: list[Any] = []
        """The payloads of finished executions, in order."""
        self.cancelled: list[Any] = []
        self.running = 0
        self.max_running = 0
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
        cron: str | None = None,
        catch_up: bool = False,
        **limits: Any,
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
                cron=cron,
                catch_up=catch_up,
                **limits,
            )
        )

    async def note(self, payload: Any) -> Any:
        """Record the payload and return it."""
        self.done.append(payload)
        return payload

    async def sleep(self, payload: float) -> None:
        """Sleep for the payload's number of seconds."""
        self.running += 1
        self.max_running = max(self.max_running, self.running)
        try:
            await asyncio.sleep(payload)
            self.done.append(payload)
        except asyncio.CancelledError:
            self.cancelled.append(payload)
            raise
        finally:
            self.running -= 1

    def worker(
        self, name: str = "w", *, ledger: JobLedger | None = None, **options: Any
    ) -> JobWorker:
        """Return a worker that is not started; options are those of its config or its own."""
        configured = {each.name for each in fields(WorkerConfig)} & options.keys()
        config = {"queues": {"default": 10}} | {key: options.pop(key) for key in configured}
        given: dict[str, Any] = {"tasks": self.tasks, "clock": self.clock} | options
        worker = JobWorker(
            WorkerConfig(name=name, **config),
            ledger=ledger or self.ledger,
            notifier=self.notifier,
            codec=MsgspecCodec(),
            **given,
        )
        self._workers.append(worker)
        return worker

    def start(self, name: str = "w", **options: Any) -> JobWorker:
        """Return a worker that is started."""
        worker = self.worker(name, **options)
        worker.start()
        return worker

    async def stop(self) -> None:
        """Drain all workers."""
        self.ledger.unavailable = self.ledger.failing_after = self.ledger.hanging = frozenset()
        for worker in self._workers:
            with suppress(WorkLostError):
                await worker.drain(1.0)

    async def accept(
        self, name: str = "note", payload: str = "0", *, queue: str = "default", **more: Any
    ) -> str:
        """Accept a job without a notification; return its id."""
        draft = JobDraft(id=new_job_id(), queue=queue, task=name, payload=payload.encode(), **more)
        (accepted,) = await self.memory_ledger.accept([draft])
        return accepted.job.id

    async def submit(self, name: str = "note", payload: str = "0", **more: Any) -> str:
        """Accept a job and notify workers; return its id."""
        job_id = await self.accept(name, payload, **more)
        await self.notifier.notify(
            JobNotification(queue=more.get("queue", "default"), ids=(job_id,))
        )
        return job_id

    async def job(self, job_id: str) -> Job:
        """Return a job that exists."""
        job = await self.ledger.get(job_id)
        assert job is not None
        return job

    async def until(self, condition: Callable[[], Any], within: float = 60.0) -> float:
        """Let time pass until ``condition`` returns a true value; return the seconds it took."""
        began = self.clock.monotonic()
        while True:
            seen = condition()
            if asyncio.iscoroutine(seen):
                seen = await seen
            passed = self.clock.monotonic() - began
            if seen:
                return passed
            assert passed < within, "it did not come to that"
            await asyncio.sleep(max(0.001, passed / 20))

    async def final(self, *ids: str, within: float = 60.0) -> float:
        """Let time pass until the jobs are final; return the seconds until the last one was."""
        began = self.clock.now()

        async def all_final() -> bool:
            return all([(await self.job(job_id)).state.final for job_id in ids])

        await self.until(all_final, within)
        ends = [job.finished_at for job in [await self.job(job_id) for job_id in ids]]
        return max([(end - began).total_seconds() for end in ends if end is not None], default=0.0)
