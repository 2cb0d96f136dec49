"""Tests of an application's jobs: run and inspect its submissions, without servers.

The functions work in plain tests, in coroutines, and beside Litestar's test clients. Time is moved.
Jobs must be in memory, as without DATABASE_URL. Your own database may be a real one: jobs that you
submit in its transactions are there after the commit.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import msgspec

from viralfx.bootstrap.jobs import JobRuntime
from viralfx.core.errors import ConfigurationError
from viralfx.jobs.codec import same_json
from viralfx.jobs.memory import MemoryJobLedger, MemoryTransaction
from viralfx.jobs.model import Claim, Job, JobError, JobFilter, JobState
from viralfx.jobs.worker.calls import JobTask
from viralfx.jobs.worker.running import Execution
from viralfx.web.layer import OperationsLayer

__all__ = ["Jobs", "SubmittedJob", "assert_submitted", "run_pending", "submitted"]

T = TypeVar("T")
AnyTask = str | Callable[..., Any]  # its name or its function

MAX_EXECUTIONS = 10_000
"""Executions in one call of :func:`run_pending`; more are an endless chain of jobs."""

_OTHERS_PAUSE_SECONDS = 0.002
"""Between two looks at jobs that the worker of a started application runs."""
_LEASE_SECONDS = 10.0**9


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmittedJob:
    """A job as a test sees it; payload and result are decoded JSON."""

    id: str
    task: str
    queue: str
    payload: Any
    key: str | None
    priority: int
    run_at: datetime
    """When it is or was due; UTC."""
    state: JobState
    attempts: int
    """Failures and time-outs of the task."""
    result: Any
    """None until it has completed."""
    error: JobError | None
    """The last error, until it completes."""


class Jobs(list[SubmittedJob]):
    """Jobs in a list. For a coroutine it is awaitable, and awaiting it returns the list."""

    if TYPE_CHECKING:

        def __await__(self) -> Generator[Any, None, "Jobs"]:
            """Return this list."""


class _AwaitableJobs(Jobs):
    """Jobs that are read again when they are awaited, after late reports of commits."""

    def __init__(self, jobs: Jobs, read_again: Callable[[], Awaitable[Jobs]]) -> None:
        super().__init__(jobs)
        self._read_again = read_again

    def __await__(self) -> Generator[Any, None, Jobs]:
        self[:] = yield from self._read_again().__await__()
        return self


def submitted(plugin: OperationsLayer, task: AnyTask | None = None) -> Jobs:
    """Return the jobs that were submitted, of one ``task`` or all, in the order of submission.

    ``task`` is a name or a function. Jobs that already ran are included, and those of schedules are
    not. Raises :class:`ConfigurationError` if the jobs are not in memory.
    """
    memory = _memory_of(runtime := _runtime(plugin))
    name = None if task is None else runtime.tasks.name_of(task)

    async def page() -> Sequence[Job]:
        return memory.submitted()

    def read() -> Jobs:
        loop = plugin.loop
        if loop is None or loop is _running_loop():
            jobs = _at_once(page())
        else:
            jobs = asyncio.run_coroutine_threadsafe(page(), loop).result()
        return _views(runtime, [job for job in jobs if name in (None, job.task)])

    async def read_again() -> Jobs:
        await memory.transactions.settle()
        return read()

    return read() if _running_loop() is None else _AwaitableJobs(read(), read_again)


def assert_submitted(
    plugin: OperationsLayer, task: AnyTask, payload: Any = ..., *, count: int | None = None
) -> Sequence[SubmittedJob]:
    """Assert that jobs of ``task`` were submitted, with ``payload`` if it is given; return them.

    Payloads are compared as JSON. ``count`` is the number of jobs there must be; None: at least 1.
    """
    name = (runtime := _runtime(plugin)).tasks.name_of(task)
    of_task: list[SubmittedJob] = submitted(plugin, name)
    found = of_task
    if payload is not ...:
        kind = runtime.tasks.find(name).payload_type if name in runtime.tasks else Any
        wanted = runtime.codec.encode(payload, kind)
        found = Jobs(job for job in of_task if same_json(msgspec.json.encode(job.payload), wanted))
    if len(found) == count or (count is None and found):
        return found
    what = f"{name!r}" + ("" if payload is ... else f" with {payload!r}")
    others = [job.payload for job in of_task] or sorted({job.task for job in submitted(plugin)})
    raise AssertionError(
        f"{len(found)} jobs of {what} were submitted, not {count or 'any'};"
        f" there are {others or 'none'}"
    )


def run_pending(
    plugin: OperationsLayer,
    *,
    until: timedelta | datetime | None = None,
    raise_errors: bool = False,
    connection: Any = None,
) -> Jobs:
    """Run the jobs that are due, one after the other; return them in their order.

    Jobs that they submit run too. A retry runs at once: the ledger's time moves on by its delay.
    ``until`` moves it further, by a time or to a moment, and runs each job when it becomes due. The
    clocks of the system and of other code do not move.

    With ``raise_errors`` the first error of a task is raised. A coroutine has to await the result,
    other code may. In an application that was started the jobs run on its event loop, and beside
    its own worker.

    ``connection`` is the ``context.connection`` of transactional tasks: a connection of asyncpg to
    your test database. Each of these tasks runs in a transaction of it, or in a savepoint if you
    have begun one, which is rolled back if the task fails.

    Raises :class:`ConfigurationError` if the jobs are not in memory, or if a task has a dependency
    that the application does not provide, and ``TypeError`` or ``ValueError`` for another
    ``until``.
    """
    runtime = _runtime(plugin)
    _check_until(until)
    running = _Run(runtime, raise_errors=raise_errors, connection=connection).run(until)
    mine, loop = _running_loop(), plugin.loop
    pending: Any = running  # awaitable, as Jobs are
    if loop is None or loop is mine:
        return asyncio.run(running) if mine is None else cast("Jobs", pending)
    elsewhere = asyncio.run_coroutine_threadsafe(running, loop)
    pending = None if mine is None else asyncio.wrap_future(elsewhere)
    return elsewhere.result() if mine is None else cast("Jobs", pending)


def _check_until(until: object) -> None:
    if not (until is None or isinstance(until, timedelta | datetime)):
        raise TypeError(
            f"run_pending: until must be a timedelta or a datetime, such as timedelta(days=1):"
            f" {until!r}"
        )
    if isinstance(until, datetime) and until.tzinfo is None:
        raise ValueError(
            f"run_pending: until must have a time zone, as datetime.now(UTC) has: {until!r}"
        )


class _Run:
    """One call of :func:`run_pending`."""

    def __init__(self, runtime: JobRuntime, *, raise_errors: bool, connection: Any) -> None:
        self._runtime = runtime
        self._memory = _memory_of(runtime)
        self._raise_errors = raise_errors
        # The worker is never started: only its executor is used.
        self._executor = runtime.make_worker(()).executor
        if connection is not None:
            lent: Any = _Lent(self._memory, connection)
            self._executor = replace(self._executor, ledger=lent)
        self._name = f"testing-{secrets.token_hex(4)}"
        self._ran: dict[str, None] = {}
        self._executions = 0

    async def run(self, until: timedelta | datetime | None) -> Jobs:
        memory = self._memory
        if problems := list(self._runtime.calls.problems(self._runtime.tasks)):
            raise ConfigurationError(problems)
        end = memory.now() + until if isinstance(until, timedelta) else until
        await self._memory.register(self._name, (), _LEASE_SECONDS, eligible=False)
        try:
            while (moment := await self._run_due(end)) is not None:
                memory.advance(moment)
        finally:
            self._executor.threads.close()
            await self._memory.deregister(self._name)
        if end is not None:
            memory.advance(end)
        jobs = [await self._memory.get(job_id) for job_id in self._ran]
        return _views(self._runtime, [job for job in jobs if job is not None])

    async def _run_due(self, end: datetime | None) -> datetime | None:
        """Run all due jobs; return the moment to move to, and None at the end."""
        memory = self._memory
        while True:
            unfinished = [
                job
                for state in (JobState.WAITING, JobState.ACTIVE)
                for job in await self._memory.page(JobFilter(state=state, limit=10**9))
            ]
            waiting = [job for job in unfinished if job.state is JobState.WAITING]
            now, ran = memory.now(), self._executions
            due = [job for job in waiting if job.run_at <= now]
            for job in sorted(due, key=lambda job: (-job.priority, job.run_at, job.id)):
                for claim in await self._memory.claim(
                    job.queue, self._name, 1, (job.id,), tasks=self._runtime.tasks.names
                ):
                    await self._execute(claim)
            if self._executions > ran:
                continue
            if len(unfinished) == len(waiting):
                break
            # The application's own worker runs jobs, or it has ended without handing them back.
            await self._memory.sweep(MAX_EXECUTIONS)
            await asyncio.sleep(_OTHERS_PAUSE_SECONDS)
        later = [
            job.run_at
            for job in waiting
            if job.run_at > now and (end is not None or (job.id in self._ran and job.attempts))
        ]
        moment = min(later, default=None)
        return None if moment is None or (end is not None and moment > end) else moment

    async def _execute(self, claim: Claim) -> None:
        self._executions += 1
        if self._executions > MAX_EXECUTIONS:
            raise RuntimeError(
                f"run_pending: {MAX_EXECUTIONS} executions, the last one of task {claim.task!r};"
                " do its jobs submit jobs without end?"
            )
        self._ran[claim.id] = None
        execution = Execution(claim)
        execution.task = JobTask(self._executor.execute(execution), job=claim.id)
        settlement = await execution.task
        if settlement is not None:
            await self._memory.settle([settlement])
        if self._raise_errors and settlement is not None and settlement.error is not None:
            error = settlement.error
            raise execution.raised or RuntimeError(f"{claim.task}: {error.code}: {error.message}")


class _Lent:
    """Completes the jobs of transactional tasks beside a transaction of the test's connection."""

    def __init__(self, memory: MemoryJobLedger, connection: Any) -> None:
        self._memory = memory
        self._connection = connection

    async def settle_with_effect(
        self, claim: Claim, effect: Callable[[Any], Awaitable[bytes]], *arguments: Any
    ) -> bool:
        """Do as :meth:`JobLedger.settle_with_effect`, with this connection for the effect."""
        memory, connection = self._memory, self._connection

        async def with_connection(transaction: MemoryTransaction) -> bytes:
            with memory.transactions.lend(connection, transaction):
                async with connection.transaction():
                    return await effect(connection)

        return await memory.settle_with_effect(claim, with_connection, *arguments)


def _memory_of(runtime: JobRuntime) -> MemoryJobLedger:
    assert runtime.memory is not None  # noqa: S101 - narrows for the type checker
    return runtime.memory


def _runtime(plugin: object) -> JobRuntime:
    if not isinstance(plugin, OperationsLayer):
        raise TypeError(f"viralfx.testing: pass the plugin, not {type(plugin).__qualname__}")
    runtime = plugin.assembly.jobs
    if runtime.memory is None:
        problem = (
            "viralfx.testing: the jobs are in the database of DATABASE_URL; unset it for the tests,"
            " or pass OperationsConfig(settings=Settings())"
        )
        raise ConfigurationError([problem])
    return runtime


def _running_loop() -> asyncio.AbstractEventLoop | None:
    with suppress(RuntimeError):
        return asyncio.get_running_loop()
    return None


def _at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine that waits for nothing, as those of the ledger in memory."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    coroutine.close()
    raise RuntimeError("the ledger in memory waited")


def _views(runtime: JobRuntime, jobs: Sequence[Job]) -> Jobs:
    own = runtime.calls.built_in - {"notifications.webhook"}
    return Jobs(_view(job) for job in jobs if job.task not in own)


def _view(job: Job) -> SubmittedJob:
    return SubmittedJob(
        id=job.id,
        task=job.task,
        queue=job.queue,
        payload=msgspec.json.decode(job.payload),
        key=job.key,
        priority=job.priority,
        run_at=job.run_at,
        state=job.state,
        attempts=job.attempts,
        result=None if job.result is None else msgspec.json.decode(job.result),
        error=job.error,
    )


@dataclass(frozen=True, slots=True)
class JobsOfTest:
    """The jobs of a plugin within one test, for the fixture ``viralfx_jobs``."""

    plugin: OperationsLayer

    def submitted(self, task: AnyTask | None = None) -> Jobs:
        """See :func:`submitted`."""
        return submitted(self.plugin, task)

    def assert_submitted(
        self, task: AnyTask, payload: Any = ..., *, count: int | None = None
    ) -> Sequence[SubmittedJob]:
        """See :func:`assert_submitted`."""
        return assert_submitted(self.plugin, task, payload, count=count)

    def run_pending(
        self,
        *,
        until: timedelta | datetime | None = None,
        raise_errors: bool = False,
        connection: Any = None,
    ) -> Jobs:
        """See :func:`run_pending`."""
        return run_pending(
            self.plugin, until=until, raise_errors=raise_errors, connection=connection
        )


def _hold() -> Iterator[Callable[[OperationsLayer], JobsOfTest]]:
    """Return a function that gives a test the jobs of a plugin, from an empty ledger on.

    They run in ``run_pending`` only, also while the application is started, until the test ends.
    Call it before the application starts.
    """
    held: list[OperationsLayer] = []

    def hold(plugin: OperationsLayer) -> JobsOfTest:
        _runtime(plugin)
        if plugin.loop is not None:
            raise RuntimeError("viralfx_jobs: pass the plugin before its application starts")
        plugin.rewire(run_jobs=False)
        held.append(plugin)
        return JobsOfTest(plugin)

    yield hold
    for plugin in held:
        if plugin.loop is None:
            plugin.rewire()


try:
    import pytest
except ImportError:  # an application may use the functions without it
    pass
else:
    viralfx_jobs = pytest.fixture(name="viralfx_jobs")(_hold)
    """The fixture: import it in a ``conftest.py``."""
