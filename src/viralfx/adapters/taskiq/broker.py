"""taskiq's messages as jobs of the ledger: their labels and executions (ADR-0058).

A :class:`Delivery` is one execution of a message by taskiq's receiver. Its outcome is that of the
job.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from concurrent.futures import Executor, Future
from contextlib import suppress
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, ParamSpec, TypeVar

from taskiq import (
    AsyncBroker,
    AsyncResultBackend,
    BrokerMessage,
    TaskiqMessage,
    TaskiqMiddleware,
    TaskiqResult,
)
from taskiq.depends.progress_tracker import TaskProgress
from taskiq.exceptions import NoResultError, TaskRejectedError

from viralfx.adapters.taskiq.messages import (
    MessageError,
    job_progress,
    number_of,
    result_of,
    task_progress,
    type_and_text,
)
from viralfx.adapters.taskiq.retry import (
    DEFAULT_ATTEMPTS,
    RETRY_MIDDLEWARES,
    MessageFailedError,
    RetryRequestedError,
    attempts_of,
)
from viralfx.jobs.model import Job, JobNotFoundError, JobStateError, check_priority
from viralfx.jobs.tasks import Discard, HandBackError, JobContext, Snooze

_logger = logging.getLogger("viralfx.taskiq")

P = ParamSpec("P")
T = TypeVar("T")

DEFAULT_QUEUE = "default"
TIMEOUT_MARGIN = 5.0
"""Seconds between the label ``timeout``, which taskiq enforces, and the timeout of the job."""
RETRIES, REQUEUES = "_retries", "X-Taskiq-requeue"
"""Labels in which taskiq counts how often a message was sent again."""


# -- labels --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a job, from the labels of its message."""

    queue: str | None
    priority: int
    delay: float
    """Seconds until it is due."""


def options_of(labels: Mapping[str, Any]) -> Options:
    """Read the labels ``queue`` (or ``queue_name``), ``priority`` and ``delay``.

    Raises :class:`MessageError`.
    """
    queue = labels.get("queue", labels.get("queue_name"))
    number = number_of(labels, "priority")
    try:
        priority = check_priority(int(number) if number.is_integer() else number)
    except ValueError as error:
        raise MessageError(f"the label {error}") from None
    delay = max(0.0, number_of(labels, "delay"))
    return Options(None if queue is None else str(queue), priority, delay)


def timeout_of(labels: Mapping[str, Any]) -> float | None:
    """Return the timeout of a task's jobs; None without a label. Raises :class:`MessageError`."""
    return number_of(labels, "timeout") + TIMEOUT_MARGIN if "timeout" in labels else None


def schedule_key(
    labels: Mapping[str, Any], declared: Mapping[str, Any], now: datetime
) -> str | None:
    """Return the same key for all schedulers that send a scheduled message in this minute.

    Only for a declared schedule with ``cron`` and a ``schedule_id``: without one its id differs
    from scheduler to scheduler, and other schedules do not fire once a minute.
    """
    schedule_id = labels.get("schedule_id")
    for schedule in declared.get("schedule", []) if schedule_id is not None else []:
        if schedule.get("schedule_id") == schedule_id and "cron" in schedule:
            return f"taskiq:{schedule_id}:{now:%Y-%m-%dT%H:%M}"
    return None


class _Trial(AsyncBroker):
    """A broker that records the tasks that taskiq registers."""

    def __init__(self) -> None:
        super().__init__()
        self.registered: list[str] = []

    async def kick(self, message: BrokerMessage) -> None:
        """Send nothing."""

    async def listen(self) -> AsyncGenerator[bytes, None]:
        yield b""

    def _register_task(self, task_name: str, _task: object) -> None:
        self.registered.append(task_name)


@lru_cache(maxsize=1)
def registers_tasks() -> bool:
    """Return True if taskiq calls a broker for each task; the first False logs one warning.

    Without it a broker finds its tasks when it starts and when it sends a message.
    """
    trial = _Trial()
    with suppress(Exception):
        trial.register_task(_Trial.kick, "trial")
    if trial.registered == ["trial"]:
        return True
    lacking = {"lacking": "AsyncBroker._register_task"}
    _logger.warning("taskiq lacks a part of LedgerBroker: it looks for tasks itself", extra=lacking)
    return False


# -- executions ----------------------------------------------------------------------------------

_DECISIONS = (asyncio.CancelledError, Snooze, HandBackError)
"""Errors that say nothing of the function: no middleware makes a result of them."""

_current: ContextVar["Delivery | None"] = ContextVar("viralfx_taskiq_delivery", default=None)


def current_delivery() -> "Delivery | None":
    """Return the delivery that this code runs in."""
    return _current.get()


class Delivery:
    """One execution of a message: from its claim until taskiq's receiver has processed it."""

    def __init__(self, data: bytes, task_id: str, job: JobContext) -> None:
        self.data = data
        self.task_id = task_id
        self.job = job
        self.taken = False
        """True once a receiver has it."""
        self.error: BaseException | None = None
        """The error of the function; a middleware may put another one or a value in the result."""
        self.result: TaskiqResult[Any] | None = None
        self.message: TaskiqMessage | None = None
        self.progress: TaskProgress[Any] | None = None
        self.threads: list[Future[None]] = []
        """Each is done when a function of the message has returned from its thread."""
        self._again: float | None = None
        self._retried_by_middleware = False
        self._task: asyncio.Task[Any] | None = None
        self._context = copy_context()
        self._failure: BaseException | None = None
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def is_over(self) -> bool:
        """True once its outcome is known."""
        return self._ended.done()

    def follow(self, task: "asyncio.Task[Any]") -> None:
        """End with ``task``, in which the receiver processes the message."""
        if self._task is None and not self.is_over:
            self._task = task
            self.taken = True
            task.add_done_callback(self._on_end)

    def begin(self, message: TaskiqMessage) -> TaskiqMessage:
        """Begin in the receiver's task; return the message with the counts of its retries."""
        if (task := asyncio.current_task()) is not None:
            self.follow(task)
            # By its name the log tells which job blocks the event loop.
            task.set_name(self.job.id)
        for variable, value in self._context.items():
            variable.set(value)
        _current.set(self)
        self.message = message
        if self.job.attempt > 1:
            message.labels[RETRIES] = self.job.attempt - 1
        if repeated := self.job.fence - self.job.attempt:
            message.labels[REQUEUES] = str(repeated)
        return message

    def ack(self) -> None:
        """Complete a message that no receiver of taskiq processes; otherwise do nothing.

        The end of the receiver's task completes the others, so that job and result are one step.
        """
        if self._task is None:
            self._end()

    def send_again(self, message: BrokerMessage) -> None:
        """Run the message again after this execution."""
        self._again = options_of(message.labels).delay

    def give_back(self) -> None:
        """End without an outcome, so that another worker runs the job; cancel the running call."""
        if not self.is_over:
            self._failure = HandBackError("the receiver of taskiq has stopped")
            if self._task is not None:
                self._task.cancel()
            self._end()

    def leave_retries(self) -> None:
        """Leave it to a middleware whether a failed message runs again."""
        self._retried_by_middleware = True

    async def outcome(self) -> Any:
        """Wait for the end; return the value of the task, or raise why there is none.

        A cancellation is passed on to the receiver's task, whose end is awaited. So is that of a
        function in a thread, which Python cannot stop, until a second cancellation.
        """
        cancelled = await self._until_returned(await self._until_over())
        error = self._error()
        late = cancelled and not self.job.deadline.remaining()
        # If it was not asked for, it is an error of the function, as any other.
        asked, again = cancelled or error is not self.error, self._again is not None
        if isinstance(error, asyncio.CancelledError) and asked and not (late and again):
            raise error
        if isinstance(error, Snooze | HandBackError):
            raise error
        if error is not None and isinstance(self.error, Discard):
            raise Discard(type_and_text(error)) from error
        if error is not None and not isinstance(error, NoResultError):
            if self._again is not None:
                raise RetryRequestedError(error, self._again) from error
            raise MessageFailedError(error, self._attempts(error)) from error
        if self._again is not None:
            raise Snooze(self._again)
        if self._task is not None and self.message is None:
            raise MessageFailedError(MessageError("the receiver did not run the message"))
        return None if self.result is None else self.result.return_value

    def _error(self) -> BaseException | None:
        """Return the error of the result, which middlewares may have replaced or removed."""
        if self._failure is not None or self.result is None:
            return self._failure or self.error
        error, replaced = self.error, self.result.error
        if error is None:
            return replaced
        # A message that is sent again has no result, also if a middleware made one of the error.
        if isinstance(error, _DECISIONS) or self._again is not None:
            return error
        if not self.result.is_err:
            return None
        # NoResultError, without a message that is sent again, is no reason why the task failed.
        return error if replaced is None or isinstance(replaced, NoResultError) else replaced

    async def _until_over(self) -> bool:
        cancelled = False
        while not self.is_over:
            try:
                await asyncio.wait({self._ended})
            except asyncio.CancelledError:
                cancelled = True
                if self._task is None:
                    self._end()
                    raise
                self._task.cancel()
        return cancelled

    async def _until_returned(self, cancelled: bool) -> bool:  # noqa: FBT001 - private
        for ended in map(asyncio.wrap_future, self.threads):
            while not ended.done() and (self.job.cancelled.requested or not cancelled):
                try:
                    await asyncio.wait({ended})
                except asyncio.CancelledError:
                    if cancelled:
                        raise
                    cancelled = True
        return cancelled

    def _attempts(self, error: BaseException) -> int:
        if self._failure is not None:  # of a middleware, not of the task
            return DEFAULT_ATTEMPTS
        if self._retried_by_middleware or isinstance(self.error or error, TaskRejectedError):
            return 1
        return 1 if self.message is None else attempts_of(self.message.labels)

    def _on_end(self, task: "asyncio.Task[Any]") -> None:
        failure = asyncio.CancelledError() if task.cancelled() else task.exception()
        if not self.is_over:
            self._failure = failure
            self._end()

    def _end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)


class DeliveryMiddleware(TaskiqMiddleware):
    """Reports the steps of the receiver to deliveries; the outermost middleware of a broker."""

    def __init__(self, find: Callable[[str], Delivery | None]) -> None:
        """``find`` returns the delivery of a task id."""
        super().__init__()
        self._find = find

    def pre_execute(self, message: TaskiqMessage) -> TaskiqMessage:
        """Begin the delivery."""
        delivery = self._find(message.task_id)
        if delivery is None:
            return message
        if any(isinstance(each, RETRY_MIDDLEWARES) for each in self.broker.middlewares):
            delivery.leave_retries()
        return delivery.begin(message)

    def on_error(
        self,
        message: TaskiqMessage,  # noqa: ARG002 - taskiq's signature
        result: TaskiqResult[Any],  # noqa: ARG002
        exception: BaseException,
    ) -> None:
        """Keep the error: retry middlewares replace that of the result."""
        if (delivery := current_delivery()) is not None:
            delivery.error = exception

    def post_execute(
        self,
        message: TaskiqMessage,  # noqa: ARG002
        result: TaskiqResult[Any],
    ) -> None:
        """Keep the result; the job's record takes the place of a result backend."""
        if (delivery := current_delivery()) is not None:
            delivery.result = result


class ThreadForEachCall(Executor):
    """Runs each function in a daemon thread of its own: one that hangs blocks no other."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """Start a thread for ``fn``."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()
        ended: Future[None] = Future()

        def run() -> None:
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001 - any is the outcome
                future.set_exception(error)
            else:
                future.set_result(result)
            ended.set_result(None)

        threading.Thread(target=run, name="taskiq", daemon=True).start()
        if (delivery := current_delivery()) is not None:
            delivery.threads.append(ended)
        return future


class LedgerResultBackend(AsyncResultBackend[Any]):
    """Reads results from the jobs of a :class:`LedgerBroker`, where its worker records them."""

    def __init__(
        self,
        find: Callable[[str], Coroutine[Any, Any, Job]],
        labels: Callable[[Job], Mapping[str, Any]],
    ) -> None:
        """Find the job of a task id with ``find``, which raises :class:`JobNotFoundError`.

        ``labels`` returns the labels of a job's message.
        """
        self._find = find
        self._labels = labels

    async def set_result(self, task_id: str, result: TaskiqResult[Any]) -> None:
        """Do nothing: the end of the execution records the result, in one step with its end."""

    async def is_result_ready(self, task_id: str) -> bool:
        """Return True once the job is completed, failed or cancelled."""
        try:
            return (await self._find(task_id)).state.final
        except JobNotFoundError:
            return False

    async def get_result(self, task_id: str, with_logs: bool = False) -> TaskiqResult[Any]:  # noqa: ARG002, FBT001, FBT002 - taskiq's signature
        """Return the result of a final job.

        Raises :class:`JobNotFoundError`, and :class:`JobStateError` for any other job.
        """
        job = await self._find(task_id)
        if not job.state.final:
            raise JobStateError(f"the job is {job.state}, so it has no result yet", job.state)
        return result_of(job, self._labels(job))

    async def set_progress(self, task_id: str, progress: TaskProgress[Any]) -> None:
        """Report the progress of the task that calls this; of another one does nothing."""
        delivery = current_delivery()
        if delivery is not None and delivery.task_id == task_id:
            delivery.job.on_report(job_progress(progress))
            delivery.progress = progress

    async def get_progress(self, task_id: str) -> TaskProgress[Any] | None:
        """Return the last progress of a task; None without one."""
        delivery = current_delivery()
        if delivery is not None and delivery.task_id == task_id and delivery.progress is not None:
            return delivery.progress
        return task_progress(await self._find(task_id))
