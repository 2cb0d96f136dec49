"""Executes a claimed job: from its claim to its settlement."""

import asyncio
import inspect
import logging
import math
import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from traceback import TracebackException
from typing import Any

from viralfx.core.clock import Clock
from viralfx.core.correlation import bind_correlation_id, bind_user_id
from viralfx.core.errors import (
    LedgerUnavailableError,
    is_a,
    require_not_negative,
    text_of,
    type_name,
)
from viralfx.jobs.codec import (
    DEFAULT_MAX_BYTES,
    Codec,
    PayloadError,
    ResultError,
    encoded_result,
    storable,
)
from viralfx.jobs.hooks import CombinedHooks, JobHooks, names_of
from viralfx.jobs.ledger import JobLedger
from viralfx.jobs.model import (
    Claim,
    JobError,
    JobState,
    Settlement,
    cancelled,
    completed,
    correlation_id_of_job,
    failed,
    handed_back,
    postponed,
    refused,
    retried,
)
from viralfx.jobs.tasks import (
    Discard,
    HandBackError,
    JobContext,
    Snooze,
    Submitter,
    Task,
    TaskRegistry,
)
from viralfx.jobs.worker import calls as worker_calls
from viralfx.jobs.worker.calls import (
    JobThreads,
    TaskCalls,
    end_forked_child,
    is_closed,
    submitter_for,
)
from viralfx.jobs.worker.running import Execution
from viralfx.resilience.deadline import Cancellation, Deadline
from viralfx.resilience.policy import BackoffPolicy, RetryPolicy

_logger = logging.getLogger("viralfx.jobs")

MAX_MESSAGE_CHARACTERS = 2000
"""Length of an error message in the ledger."""


def message_of(error: BaseException, clean: Callable[[str], str]) -> str:
    """Return an error's message, shortened and in a form that every ledger can store.

    ``clean`` redacts secrets: a driver's error may quote the address that it was given.
    """
    # Redacted first: the beginning of a secret that was cut in two would not be recognised.
    return storable(clean(text_of(error))[:MAX_MESSAGE_CHARACTERS])


MAX_TRACEBACK_CHARACTERS = 4000
"""Length of a traceback in the ledger; the end is the part that is kept."""
_MAX_CLEANED_CHARACTERS = 64 * 1024
_CALLER_FILES = frozenset({__file__, worker_calls.__file__})
"""Their frames come before those of the task."""

_MAX_DELAY_SECONDS = 10 * 365 * 86400.0
"""The longest delay of an attempt: ledgers and Python have a last year."""


def traceback_of(error: BaseException, clean: Callable[[str], str]) -> str | None:
    """Return the end of an error's traceback, without the frames of the worker.

    ``clean`` redacts secrets. None if the error's own code makes that impossible.
    """
    try:
        formatted = TracebackException.from_exception(error)
        _cut_callers(formatted, set())
        text = "".join(formatted.format())
    except BaseException:  # noqa: BLE001 - __str__ and __repr__ may be the task's own code
        return None
    # Most of a long text is not kept, and redaction takes time; it comes before the last cut.
    text = clean(_end_of(text, _MAX_CLEANED_CHARACTERS))
    return storable(_end_of(text, MAX_TRACEBACK_CHARACTERS)).rstrip("\n")


def _end_of(text: str, characters: int) -> str:
    if len(text) <= characters:
        return text
    end = text[-characters:]
    return f"...\n{end.partition(chr(10))[2] or end}"


def _cut_callers(formatted: TracebackException, seen: set[int]) -> None:
    if id(formatted) in seen:
        return
    seen.add(id(formatted))
    stack = formatted.stack
    of_callers = [at for at, frame in enumerate(stack) if frame.filename in _CALLER_FILES]
    if of_callers:
        del stack[: of_callers[-1] + 1]
    more = formatted.exceptions or []
    for each in (formatted.__cause__, formatted.__context__, *more):
        if each is not None:
            _cut_callers(each, seen)


def log_failure(claim: Claim, code: str, error: BaseException | None) -> None:
    """Log that a job failed for good."""
    _logger.error("Job failed", exc_info=error, extra={**names_of(claim), "code": code})


CANCEL_GRACE_SECONDS = 1.0
"""Time, and up to twice as much, that a task has to end after its timeout cancelled it; then the
worker abandons it."""

LEDGER_RETRY_SECONDS = 1.0
"""Time until a job is tried again whose transaction the ledger could not finish."""

_MAX_INTERRUPTIONS = 30
"""Such transactions of a job in a worker after which another counts as the task's failure: then the
task itself ends the connection, for example by idling in the transaction."""
_MAX_INTERRUPTED_JOBS = 1000


class TaskExitedError(Exception):
    """A task raised an exception that would end the process, such as ``SystemExit``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Executor:
    """Executes claims. ``default_timeout`` is in seconds."""

    ledger: JobLedger
    tasks: TaskRegistry
    codec: Codec
    default_retry: RetryPolicy
    default_timeout: float
    max_result_bytes: int = DEFAULT_MAX_BYTES
    clock: Clock
    on_fenced: Callable[[Claim], None]
    """Called if a transaction was rolled back because another worker had claimed its job."""
    clean: Callable[[str], str]
    """Redacts the secrets in a text."""
    threads: JobThreads
    """Run the plain functions of tasks."""
    on_begin: Callable[[], None]
    """Called for each job; its task may wait for a connection before it begins."""
    on_begun: Callable[[Execution, float], bool]
    """Called before each task begins, with its timeout in seconds; False: it must not begin."""
    hooks: JobHooks = field(default_factory=CombinedHooks)
    submit: Submitter | None = None
    """Submits the jobs of tasks; None: they cannot submit any."""
    calls: TaskCalls = field(default_factory=TaskCalls)
    _refused_tasks: set[str] = field(default_factory=set, repr=False)
    """Tasks for which a refused payload was logged."""
    _interruptions: Counter[str] = field(default_factory=Counter, repr=False)
    """The interrupted transactions of jobs since they ended without an error."""

    def timeout_of(self, task: Task) -> float:
        """Return the seconds that one attempt may take."""
        return self.default_timeout if task.timeout is None else task.timeout

    async def execute(self, execution: Execution) -> Settlement | None:
        """Run the task and return its settlement; None if the task's transaction recorded it.

        Raises nothing but ``CancelledError``, and not even that while the job is cancelled or
        handed back.
        """
        self.on_begin()
        claim = execution.claim
        bind_correlation_id(correlation_id_of_job(claim))
        bind_user_id(claim.user_id)
        with self.hooks.executing(claim) as ended:
            settlement: Settlement | None = None
            task = self.tasks.find(claim.task)
            try:
                if not task.transactional:
                    settlement = completed(claim, await self._call(execution, task, None))
                elif not await self.ledger.settle_with_effect(
                    claim, partial(self._call, execution, task), execution.last_progress
                ):
                    self.on_fenced(claim)
                else:
                    for call_now in execution.after_commit:
                        call_now()
            except BaseException as error:
                if _is_end(execution, error):
                    raise
                settlement = self._settled(execution, task, error)
            if settlement is None or settlement.error is None:
                self._interruptions.pop(claim.id, None)
            if settlement is not None and execution.progress is not None:
                settlement = settlement._replace(progress=execution.last_progress())
            ended(settlement)
        return settlement

    async def _call(self, execution: Execution, task: Task, connection: object) -> bytes:
        """Call the task under its timeout; return its encoded result."""
        claim = execution.claim
        timeout = self.timeout_of(task)
        if not self.on_begun(execution, timeout):
            raise HandBackError("the job was released to other workers")
        process = os.getpid()
        # From here on, the code of the payload's type and of the result count as the job's own.
        execution.begin_own_code()
        try:
            try:
                payload = self._decoded(task, claim)
                # The timeout starts here: waiting for a connection does not count.
                deadline = Deadline(timeout, clock=self.clock)
                cancelled = Cancellation(deadline)
                execution.recording, execution.deadline = False, deadline
                execution.cancelled = cancelled
                context = None
                if self.calls.use_context(task):
                    context = JobContext(
                        id=claim.id,
                        attempt=claim.attempt,
                        deadline=deadline,
                        correlation_id=correlation_id_of_job(claim),
                        created_at=claim.created_at,
                        fence=claim.number,
                        connection=connection,
                        cancelled=cancelled,
                        on_report=execution.report,
                        submitter=submitter_for(
                            task, self.submit, connection, execution.after_commit
                        ),
                    )
                async with deadline:
                    in_thread = None
                    if task.in_thread:
                        in_thread = partial(
                            self.threads.run,
                            cancelled=cancelled,
                            deadline=deadline,
                            is_abandoned=lambda: execution.abandoned,
                        )
                    result = await self.calls.call(task, payload, context, in_thread)
                limit = self.max_result_bytes
                return encoded_result(self.codec, result, limit, task.result_type)
            except (Exception, asyncio.CancelledError):
                raise
            except BaseException as error:
                if _is_end(execution, error):
                    raise
                raise _exited(error) from error
            finally:
                end_forked_child(process)
                if execution.cancelled is not None:
                    execution.cancelled.set()  # for threads that the task has left behind
                execution.end_own_code()
                if execution.cancelled_itself:
                    await worker_calls.withdraw_cancellations(self.clock)
        except BaseException as error:
            execution.raised = error
            raise

    def _decoded(self, task: Task, claim: Claim) -> Any:
        # After the record that the job has begun: code of the payload's type may block the loop.
        # Otherwise each worker in turn would be blocked by the job, and would then release it.
        if task.read is None:
            return self.codec.decode(claim.payload, task.payload_type)
        return task.read(claim.payload, claim.id)

    def _refuse(self, claim: Claim, error: PayloadError) -> Settlement:
        # The process that accepted the job could decode it, so a worker of its version can, too.
        if claim.task not in self._refused_tasks:
            self._refused_tasks.add(claim.task)
            _logger.warning(
                "Jobs left to other workers: their payload does not fit the task here",
                exc_info=error,
                extra=names_of(claim),
            )
        return refused(claim, message_of(error, self.clean))

    def _settled(self, execution: Execution, task: Task, error: BaseException) -> Settlement:
        """Return the settlement of a failure; if the error's own code raises, the job fails."""
        try:
            if not (is_a(error, Exception) or is_a(error, asyncio.CancelledError)):
                exited = _exited(error)
                exited.__cause__ = error
                error = exited
            if execution.cancelling:
                return self.cancelled(execution, error)
            return self._settle(execution, task, error)
        except BaseException as raised:  # noqa: BLE001 - such as a property that exits
            claim, reason = execution.claim, self._reason("error", raised)
            message = f"settling the task's error raised {type_name(raised)}: {reason.message}"
            reason = replace(reason, message=message[:MAX_MESSAGE_CHARACTERS])
            # Without the error itself, since other handlers of the log would call its code.
            extra = {**names_of(claim), "code": reason.code, "reason": reason.message}
            with suppress(BaseException):
                _logger.error("Job failed", extra=extra)  # noqa: TRY400
            return failed(claim, reason)

    def _settle(self, execution: Execution, task: Task, error: BaseException) -> Settlement:
        claim = execution.claim
        if is_a(error, PayloadError) and execution.deadline is None:
            # The task has not begun: a PayloadError of its own is an ordinary failure.
            return self._refuse(claim, error)
        if is_a(error, ResultError):
            # The task has done its work: another attempt would only do it again.
            log_failure(claim, "result", error)
            return failed(claim, self._reason("result", error))
        if execution.handing_back or is_a(error, HandBackError):
            return handed_back(claim)
        if is_a(error, Snooze):
            # A subclass may set them itself, or not at all.
            require_not_negative("the seconds of a Snooze", error.seconds)
            delay = float(min(error.seconds, _MAX_DELAY_SECONDS))
            return Settlement(claim=claim, state=JobState.WAITING, delay=delay)
        if not is_a(error, Exception):
            # The task awaited something that was cancelled; the task itself was not.
            error = TaskExitedError("the task raised CancelledError without being cancelled")
        if is_a(error, LedgerUnavailableError) and self._was_interrupted(execution, error):
            # The task did not fail. If its transaction was committed, the ledger skips this.
            reason = self._reason("error", error)
            return postponed(claim, reason, LEDGER_RETRY_SECONDS)
        return self._by_policy(claim, task, _code_of(execution, error), error)

    def _was_interrupted(self, execution: Execution, error: LedgerUnavailableError) -> bool:
        """Return True if the ledger failed, and presumably not because of the task."""
        by_task = error is execution.raised
        if by_task or execution.deadline is None:  # or it has not begun
            return not by_task
        job_id, counted = execution.claim.id, self._interruptions
        if len(counted) >= _MAX_INTERRUPTED_JOBS:
            counted.clear()
        counted[job_id] += 1
        return counted[job_id] <= _MAX_INTERRUPTIONS

    def cancelled(self, execution: Execution, error: BaseException | None = None) -> Settlement:
        """Return the settlement of a job that ended on request; ``error``: how its task ended."""
        claim = execution.claim
        _logger.info("Job cancelled", extra=names_of(claim))
        if error is None or is_a(error, asyncio.CancelledError):
            return cancelled(claim)
        return cancelled(claim, self._reason(_code_of(execution, error), error))

    def timed_out(self, execution: Execution) -> Settlement:
        """Return the settlement of a job whose task ignored the cancellation by its timeout."""
        claim = execution.claim
        task = self.tasks.find(claim.task)
        limit = self.timeout_of(task)
        error = TimeoutError(f"the task ignored its cancellation after {limit:g} s")
        if execution.cancelling:
            return self.cancelled(execution, error)
        settlement = self._by_policy(claim, task, "timeout", error)
        return settlement._replace(progress=execution.last_progress())

    def _by_policy(self, claim: Claim, task: Task, code: str, error: Exception) -> Settlement:
        reason = self._reason(code, error)
        delay = None
        if not is_a(error, Discard):
            delay = _next_delay(task.retry or self.default_retry, claim, error)
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
        return JobError(
            code=code,
            message=message_of(error, self.clean),
            traceback=traceback_of(error, self.clean),
        )


def _code_of(execution: Execution, error: BaseException) -> str:
    if is_a(error, Discard):
        return "discarded"
    deadline = execution.deadline
    cut = deadline is not None and deadline.cut
    return "timeout" if cut and is_a(error, TimeoutError) else "error"


def _is_end(execution: Execution, error: BaseException) -> bool:
    """Return True if the asyncio task itself ends: it is cancelled, or its coroutine closed."""
    if is_a(error, GeneratorExit):
        return is_closed(execution.task)
    if execution.handing_back or execution.cancelling:
        return False
    current = asyncio.current_task()
    is_cancelled = current is not None and current.cancelling() > 0
    return is_cancelled and is_a(error, asyncio.CancelledError)


def _exited(error: BaseException) -> TaskExitedError:
    # The process handles signals elsewhere, so the exception is the task's own.
    return TaskExitedError(f"the task raised {type_name(error)}({text_of(error)})")


def _next_delay(policy: RetryPolicy, claim: Claim, error: Exception) -> float | None:
    """Return the seconds until the next attempt; None: no attempt is left, or the policy fails."""
    most = claim.max_attempts
    if most is not None and claim.attempt >= most:
        return None
    delay: Any = None
    try:
        if most is not None and isinstance(policy, BackoffPolicy):
            # A subclass may take other parameters; then its own attempts count up to that number.
            with suppress(Exception):
                policy = replace(policy, attempts=most)
        delay = policy.next_delay(claim.attempt, error)
        if delay is None or not 0 <= delay < math.inf:
            return None
        # A plain number: the ledger and the clock take nothing else.
        seconds = float(min(delay, _MAX_DELAY_SECONDS))
    except BaseException:
        # A policy that raises must neither keep its job active nor end the worker.
        if inspect.iscoroutine(delay):
            delay.close()
        _logger.exception("Retry policy failed", extra={"policy": type_name(policy)})
        return None
    return seconds if 0 <= seconds < math.inf else None
