"""One execution of a job: from its claim to what becomes of it."""

import asyncio
import logging
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from viralfx.domain.clock import Clock
from viralfx.domain.correlation import bind_correlation_id
from viralfx.domain.jobs.codec import Codec, PayloadError, ResultError
from viralfx.domain.jobs.job import (
    Claim,
    JobError,
    LedgerUnavailableError,
    Settlement,
    completed,
    conversation_of,
    failed,
    handed_back,
    postponed,
    retried,
)
from viralfx.domain.jobs.ledger import JobLedger
from viralfx.domain.jobs.observing import JobObserver, Unobserved
from viralfx.domain.jobs.reporting import log_failure, message_of, names_of
from viralfx.domain.jobs.tasks import JobContext, Task, TaskRegistry, UnknownTaskError
from viralfx.domain.resilience.deadline import Deadline
from viralfx.domain.resilience.retry_policy import RetryPolicy

_logger = logging.getLogger("viralfx.jobs")

UNKNOWN_TASK_PAUSE = 10.0
"""Seconds, and up to a fifth more, until a job is tried again whose task is unknown here."""

UNKNOWN_TASK_PATIENCE = 3600.0
"""Seconds since its acceptance after which such a job fails."""

_LEAST_TRIES = 30
"""Claims that such a job is given in any case: it may have been accepted long before it was due,
and a deploy takes minutes."""

PATIENCE = 1.0
"""Seconds, and up to twice as many, that a task has to end after its timeout cancelled it; then
it is left behind."""

LEDGER_PAUSE = 1.0
"""Seconds until a job is tried again whose transaction the ledger could not finish."""

_MOST_CLAIMS_UNSPENT = 30
"""Claims without a spent attempt from which on such a transaction counts as the task's failure: it
is the task, then, that ends its connection, by waiting in a transaction or by what it asks for."""


class TaskExitedError(Exception):
    """A task raised what is meant to end a program."""


class Execution:
    """The execution of a claim, seen from outside: it can be called back or given up."""

    __slots__ = ("abandoned", "called_back", "claim", "deadline", "late", "recording", "runner")

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.deadline: Deadline | None = None
        """Of the task, once it was begun."""
        self.runner: asyncio.Task[None] | None = None
        self.recording = False
        """The task has returned; only the ledger is still needed."""
        self.late = False
        """It was seen to run on after its deadline."""
        self.called_back = False
        self.abandoned = False
        """Nobody waits for it any more; whatever comes of it is dropped."""

    def is_late(self) -> bool:
        """Tell whether the task runs on although its timeout cancelled it."""
        if self.deadline is None or self.recording:
            return False
        return not self.deadline.remaining()

    def call_back(self) -> None:
        """Cancel the task, if it is still running, so that the job is handed back."""
        if not self.recording:
            self.called_back = True
            self.cancel()

    def cancel(self) -> None:
        """Cancel whatever is under way."""
        if self.runner is not None:
            self.runner.cancel()


@dataclass(frozen=True, slots=True, kw_only=True)
class Executor:
    """Runs claims to their settlement. ``default_timeout`` is in seconds."""

    ledger: JobLedger
    tasks: TaskRegistry
    codec: Codec
    default_retry: RetryPolicy
    default_timeout: float
    clock: Clock
    on_fenced: Callable[[Claim], None]
    """Called where an effect was rolled back because its job had been given to somebody else."""
    clean: Callable[[str], str]
    """Takes the secrets out of a text."""
    observer: JobObserver = field(default_factory=Unobserved)

    rng: random.Random = field(default_factory=random.Random, repr=False)
    _unknown_tasks: set[str] = field(default_factory=set, repr=False)
    """Those that were told of."""

    def timeout_of(self, task: Task) -> float:
        """Return the seconds that one attempt may take."""
        return self.default_timeout if task.timeout is None else task.timeout

    async def execute(self, execution: Execution) -> Settlement | None:
        """Run the task and say what becomes of the job; None when that is recorded already.

        Raises nothing but ``CancelledError``, and that only where the execution was not called
        back.
        """
        claim = execution.claim
        bind_correlation_id(conversation_of(claim))
        with self.observer.executing(claim) as ended:
            settlement = await self._execute(execution)
            ended(settlement)
        return settlement

    async def _execute(self, execution: Execution) -> Settlement | None:
        claim = execution.claim
        try:
            task = self.tasks.find(claim.task)
        except UnknownTaskError as error:
            return self._unknown(claim, error)
        run = _Run(self, execution, task)
        try:
            run.payload = self.codec.decode(claim.payload, task.payload_type)
        except PayloadError as error:
            log_failure(claim, "payload", error)
            return failed(claim, self._reason("payload", error))
        except Exception as error:  # noqa: BLE001 - what decodes may be the task's own code
            return self._settle(run, error)
        try:
            if task.transactional:
                return await run.with_effect()
            return completed(claim, await run.result(None))
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - any becomes an outcome
            return self._settle(run, error)

    def _unknown(self, claim: Claim, error: Exception) -> Settlement:
        # Another version of the program may know it: one that is being deployed, or replaced.
        reason = self._reason("unknown_task", error)
        age = (self.clock.now() - claim.created_at).total_seconds()
        if age >= UNKNOWN_TASK_PATIENCE and claim.number >= _LEAST_TRIES:
            log_failure(claim, reason.code, None)
            return failed(claim, reason)
        if claim.task not in self._unknown_tasks:
            self._unknown_tasks.add(claim.task)
            _logger.warning("Jobs postponed: their task is unknown here", extra=names_of(claim))
        # Not in step with this worker's own looks, or it might be the first each time.
        return postponed(claim, reason, UNKNOWN_TASK_PAUSE * self.rng.uniform(1.0, 1.2))

    def _settle(self, run: "_Run", error: Exception | asyncio.CancelledError) -> Settlement:
        claim = run.execution.claim
        if run.execution.called_back:
            return handed_back(claim)
        if isinstance(error, asyncio.CancelledError):
            if _is_cancelled():
                raise error
            # Something that the task waited for was cancelled.
            error = TaskExitedError("the task raised CancelledError, but nobody had cancelled it")
        if isinstance(error, LedgerUnavailableError) and run.was_cut_off(error):
            # The task did not fail, and it may even be completed: then this is passed over.
            reason = self._reason("error", error)
            return postponed(claim, reason, LEDGER_PAUSE)
        return self._by_policy(claim, run.task, run.code_of(error), error)

    def overrun(self, claim: Claim) -> Settlement:
        """Say what becomes of a job whose task did not end when its timeout cancelled it."""
        task = self.tasks.find(claim.task)
        limit = self.timeout_of(task)
        error = TimeoutError(f"the task ignored its cancellation after {limit:g} s")
        return self._by_policy(claim, task, "timeout", error)

    def _by_policy(self, claim: Claim, task: Task, code: str, error: Exception) -> Settlement:
        reason = self._reason(code, error)
        delay = _next_delay(task.retry or self.default_retry, claim.attempt, error)
        if delay is None:
            log_failure(claim, code, error)
            return failed(claim, reason)
        _logger.warning(
            "Job attempt failed",
            exc_info=error,
            extra={**names_of(claim), "code": code, "delay": delay},
        )
        return retried(claim, reason, delay)

    def _reason(self, code: str, error: BaseException) -> JobError:
        return JobError(code=code, message=message_of(error, self.clean))


class _Run:
    """One call of a task's function."""

    __slots__ = ("_executor", "execution", "payload", "raised", "task")

    def __init__(self, executor: Executor, execution: Execution, task: Task) -> None:
        self.execution = execution
        self.task = task
        self.payload: Any = None
        self.raised: BaseException | None = None
        """What the task raised, or its result."""
        self._executor = executor

    async def result(self, connection: Any) -> bytes:
        """Return the encoded result."""
        try:
            return self._executor.codec.encode(await self._call(connection))
        except BaseException as error:
            self.raised = error
            raise

    async def with_effect(self) -> Settlement | None:
        """Run in the transaction that completes the job."""
        claim = self.execution.claim
        if not await self._executor.ledger.settle_with_effect(claim, self.result):
            self._executor.on_fenced(claim)
        return None

    async def _call(self, connection: Any) -> object:
        claim, task, execution = self.execution.claim, self.task, self.execution
        # From here, not from the claim: the wait for a connection is not the task's.
        timeout = self._executor.timeout_of(task)
        deadline = Deadline(timeout, clock=self._executor.clock)
        execution.recording, execution.deadline = False, deadline
        try:
            async with deadline:
                if not task.wants_context:
                    return await task.function(self.payload)
                context = JobContext(
                    id=claim.id,
                    attempt=claim.attempt,
                    deadline=deadline,
                    correlation_id=conversation_of(claim),
                    created_at=claim.created_at,
                    connection=connection,
                )
                return await task.function(self.payload, context)
        except (Exception, asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException as error:
            # Signals are the runner's: here it was the task, and it must not end the worker.
            raise TaskExitedError(f"the task raised {type(error).__name__}({error})") from error
        finally:
            execution.recording = True

    def was_cut_off(self, error: LedgerUnavailableError) -> bool:
        """Tell whether it was the ledger that failed, and not, by all that is known, the task."""
        claim, begun = self.execution.claim, self.execution.deadline is not None
        too_often = claim.number - claim.attempt >= _MOST_CLAIMS_UNSPENT
        return error is not self.raised and not (begun and too_often)

    def code_of(self, error: Exception) -> str:
        if isinstance(error, ResultError):
            return "result"
        deadline = self.execution.deadline
        cut = deadline is not None and deadline.cut
        return "timeout" if cut and isinstance(error, TimeoutError) else "error"


def _is_cancelled() -> bool:
    current = asyncio.current_task()
    return current is not None and current.cancelling() > 0


def _next_delay(policy: RetryPolicy, attempt: int, error: Exception) -> float | None:
    try:
        delay = policy.next_delay(attempt, error)
    except Exception:
        # A boundary: a policy that fails must not keep its job for ever.
        _logger.exception("Retry policy failed", extra={"policy": type(policy).__name__})
        return None
    return delay if delay is not None and 0 <= delay < math.inf else None
