"""A broker of taskiq whose messages are jobs of the ledger (ADR-0058)."""

import asyncio
import logging
import os
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import msgspec

from viralfx.bootstrap import Assembly, assemble
from viralfx.core.correlation import current_correlation_id, current_user_id
from viralfx.core.errors import ConfigurationError, ViralFXError
from viralfx.core.extras import needed_by
from viralfx.core.ids import new_job_id
from viralfx.domain.shutdown import Phase
from viralfx.jobs.codec import PayloadError
from viralfx.jobs.hooks import TaskHost
from viralfx.jobs.model import Job, JobDraft, JobStateError, KeyConflictError
from viralfx.jobs.service import JobService
from viralfx.jobs.tasks import (
    JobContext,
    Snooze,
    Task,
    TaskRegistry,
    declared_task,
    mark,
)
from viralfx.settings import read_settings
from viralfx.telemetry.tracing import module_of_application, tracing_of

with needed_by("viralfx.taskiq"):
    from taskiq import (
        AckableMessage,
        AsyncBroker,
        AsyncTaskiqDecoratedTask,
        BrokerMessage,
        SmartRetryMiddleware,
        TaskiqEvents,
        TaskiqMessage,
    )
    from taskiq.receiver import Receiver
    from taskiq.utils import maybe_awaitable

    from viralfx.adapters.taskiq.broker import (
        DEFAULT_QUEUE,
        Delivery,
        DeliveryMiddleware,
        LedgerResultBackend,
        ThreadForEachCall,
        current_delivery,
        options_of,
        registers_tasks,
        schedule_key,
        timeout_of,
    )
    from viralfx.adapters.taskiq.messages import (
        MessageError,
        arguments_type,
        job_id_of,
        json_of,
        message_of,
        payload_of,
        type_and_text,
    )
    from viralfx.adapters.taskiq.retry import MessageRetries, attempts_of

__all__ = ["LedgerBroker", "LedgerResultBackend"]

_logger = logging.getLogger("viralfx.taskiq")

T = TypeVar("T")

_MIN_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 0.005, 0.1
"""Between two looks at another event loop, which cannot wake this one."""
_MAX_END_SECONDS = 10.0
"""How long an event loop may take to end once it has cancelled its tasks."""
_START_RETRY_SECONDS = 1.0
"""Time until a job is tried again whose broker could not start."""
_MAX_TASKS = 1_000_000
"""For the receiver: the slots of the worker limit how many messages run at once."""


@dataclass(slots=True)
class _Own:
    """The services that a broker wired for itself."""

    assembly: Assembly
    outbox: "asyncio.Queue[Delivery]" = field(default_factory=asyncio.Queue)
    """Messages for :meth:`LedgerBroker.listen`."""
    pulled: bool = False
    """True once :meth:`LedgerBroker.listen` was called: a receiver of taskiq runs the messages."""
    closing: bool = False
    draining: "asyncio.Task[None] | None" = None
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    @property
    def in_process(self) -> bool:
        """True if this process runs the messages, because no other one can."""
        return self.assembly.jobs.in_memory and not self.pulled

    def run_jobs(self) -> None:
        """Start the worker of this process on the loop of its services; a second call is harmless.

        Nothing happens if that loop has ended.
        """
        if self.loop is asyncio.get_running_loop():
            self._start_worker()
            return
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._start_worker)

    def _start_worker(self) -> None:
        jobs = self.assembly.jobs
        if jobs.worker is None:
            jobs.enable_worker()
        jobs.start()

    def begin_drain(self) -> None:
        """Begin to run the started jobs, or to hand them back."""
        if self.draining is None:
            self.draining = asyncio.create_task(self._drain(), name="taskiq-drain")

    async def drain(self) -> None:
        """Run the started jobs, or hand them back; all callers share one drain."""
        self.begin_drain()
        if self.draining is not None:
            await asyncio.wait({self.draining})

    async def _drain(self) -> None:
        budget = self.assembly.operations.shutdown.budgets.of(Phase.DRAIN)
        try:
            await self.assembly.jobs.drain(budget)
        except ViralFXError as error:
            _logger.warning("Jobs were not drained", extra={"reason": str(error)})

    async def close(self) -> None:
        """Close all connections."""
        self.assembly.operations.shutdown.trigger("the broker is shut down")
        await self.assembly.operations.shutdown.run()


@dataclass(slots=True)
class _Opening:
    """An event loop that connects to the servers, while others wait for it."""

    service: JobService | None = None
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    process: int = field(default_factory=os.getpid)

    @property
    def is_abandoned(self) -> bool:
        """True if it will never end: its loop has, or it is that of another process."""
        return self.process != os.getpid() or not self.loop.is_running()


class LedgerBroker(AsyncBroker, TaskHost):
    """A taskiq broker whose messages are jobs: an accepted message is not lost.

    The settings come from the environment when the broker starts: without ``DATABASE_URL`` the
    messages are in memory and run in this process, as with taskiq's ``InMemoryBroker``. With it
    they run in ``taskiq worker``, or in ``viralfx worker`` if ``--app`` names the broker or
    ``TASK_MODULES`` its module.

    The task id is the id of the job, so it is used once: to send another message with the id of an
    unfinished job raises :class:`KeyConflictError`, of a finished one :class:`JobStateError`.
    The labels ``queue`` (or ``queue_name``), ``priority`` (the higher first), ``delay`` and
    ``timeout`` (seconds) are those of the job; ``concurrency`` and ``rate_limit`` those of
    ``@task``. The label ``max_retries`` says how often a task that fails may run in all, once
    without it, and ``retry_on_error`` alone allows three times; a middleware of taskiq for retries
    decides in their place.

    Messages may be sent on any event loop, and on several at once. The connections belong to the
    loop that needed them first; another one opens its own once that loop has ended.
    """

    def __init__(self) -> None:
        """Connect to nothing yet."""
        super().__init__()
        self.id_generator = new_job_id
        """Gives each message its task id, the id of the job."""
        self.result_backend = LedgerResultBackend(self.find_job, self._labels)
        """Reads results from the ledger."""
        self._declared: dict[str, Task] = {}
        self._deliveries: dict[str, Delivery] = {}
        self._observer = DeliveryMiddleware(self._deliveries.get)
        self._observer.set_broker(self)
        self._runner: Receiver | None = None
        self._jobs: JobService | None = None
        self._registry: TaskRegistry | None = None
        self._own: _Own | None = None
        self._opening: _Opening | None = None
        self._locks: dict[int, threading.Lock] = {}
        """By process: the parent may hold its own at the time of a fork."""
        self._started: set[bool] = set()
        self._is_down = False
        self._starting = asyncio.Lock()
        self._module = module_of_application()

    # -- life --------------------------------------------------------------------------------

    async def startup(self) -> None:
        """Connect, and start event handlers, middlewares and result backend.

        A second call does nothing, unless the process has become a worker. Raises
        :class:`ConfigurationError` for invalid settings, and ``StartupError`` if the database does
        not answer.
        """
        await self.job_service()
        self._keep_retries_in_the_ledger()
        if self.is_worker_process in self._started:
            return
        self._started.add(self.is_worker_process)
        self._is_down = False
        try:
            await super().startup()
            if self._own is not None and self._own.in_process and not self.is_worker_process:
                await self._emit(TaskiqEvents.WORKER_STARTUP)
                self._own.run_jobs()
        except BaseException:
            self._started.discard(self.is_worker_process)
            raise

    async def shutdown(self) -> None:
        """Run the started jobs, or hand them back; then end. A second call does nothing."""
        with self._lock:
            self._leave_abandoned()
        own = self._own
        try:
            if own is not None:
                self._stop_deliveries(own)
                if own.pulled:  # taskiq has waited for its tasks as long as it wanted
                    for delivery in tuple(self._deliveries.values()):
                        delivery.give_back()
                await own.drain()
            if not self._is_down:
                self._is_down = True
                self._started.clear()
                if own is not None and own.in_process and not self.is_worker_process:
                    await self._emit(TaskiqEvents.WORKER_SHUTDOWN)
                await super().shutdown()
        finally:
            if own is not None and self._own is own:
                await self._close(own)

    async def _close(self, own: _Own) -> None:
        await own.drain()
        self._own = self._jobs = self._registry = None
        await own.close()

    def _leave_abandoned(self) -> None:
        """Forget the services of an event loop that ended without a shutdown; others are opened."""
        # Their connections cannot be closed without it, and end with the objects.
        own = self._own
        if own is None or own.loop.is_running():
            return
        self._own = self._runner = None
        if self._jobs is own.assembly.jobs.service:  # else the process has given others meanwhile
            self._jobs = self._registry = None
        self._starting = asyncio.Lock()
        self._deliveries.clear()
        self._started.clear()

    async def _emit(self, event: TaskiqEvents) -> None:
        for handler in self.event_handlers[event]:
            await maybe_awaitable(handler(self.state))

    def _keep_retries_in_the_ledger(self) -> None:
        for middleware in self.middlewares:
            if isinstance(middleware, SmartRetryMiddleware) and middleware.schedule_source:
                _logger.warning(
                    "Retries are due in the ledger: SmartRetryMiddleware needs no schedule_source"
                )
                middleware.schedule_source = None

    async def job_service(self) -> JobService:
        """Return the service of this process for jobs; connect first if there is none.

        Raises as :meth:`startup` does.
        """
        opening, pause = _Opening(), _MIN_PAUSE_SECONDS
        while (found := self._jobs_or_turn(opening)) is None and self._opening is not opening:
            await asyncio.sleep(pause)
            pause = min(2 * pause, _MAX_PAUSE_SECONDS)
        if found is not None:
            return found
        try:
            return await self._open(opening)
        finally:
            with self._lock:
                if self._opening is opening:
                    self._opening = None

    @property
    def _lock(self) -> threading.Lock:
        """Guards the choice of the services; no call waits while it holds this."""
        return self._locks.setdefault(os.getpid(), threading.Lock())

    def _jobs_or_turn(self, opening: _Opening) -> JobService | None:
        """Return the service; if there is none, let ``opening`` make it unless another one does."""
        with self._lock:
            self._leave_abandoned()
            if self._opening is not None and self._opening.is_abandoned:
                if self._jobs is self._opening.service:
                    self._jobs = self._registry = None
                self._opening = None
            if self._opening is None:
                if self._jobs is not None:
                    return self._jobs
                self._opening = opening
        return None

    async def _open(self, opening: _Opening) -> JobService:
        settings = msgspec.structs.replace(read_settings(os.environ), task_modules=())
        own = _Own(tracing_of(self._module)(assemble)(settings, tasks=[self]))
        opening.service = own.assembly.jobs.service
        own.assembly.operations.home.settle()
        try:
            for resource in own.assembly.operations.resources:
                await resource.open()
        except BaseException:
            self._jobs = self._registry = None
            await own.close()
            raise
        self._own = own
        return opening.service

    async def _with_jobs(self, call: Callable[[JobService, bool], Awaitable[T]]) -> T:
        """Return the result of ``call``, which gets the service of this process.

        Another loop may have opened it, and end meanwhile: ``call`` is then made again with true,
        since the call before may have taken effect.
        """
        again = False
        while True:
            jobs, own = await self.job_service(), self._own
            try:
                return await call(jobs, again)
            except RuntimeError:
                # Also where an ending loop closes the generators of calls that still wait.
                if own is None or not await self._has_lost(jobs, own):
                    raise
                again = True

    async def _has_lost(self, jobs: JobService, own: _Own) -> bool:
        """Return True once the loop of the services has ended; False if it is not about to."""
        if own.loop is asyncio.get_running_loop() or own.assembly.operations.home.is_forked:
            return False
        for _ in range(round(_MAX_END_SECONDS / _MAX_PAUSE_SECONDS)):
            if self._jobs is not jobs or not own.loop.is_running():
                return True
            await asyncio.sleep(_MAX_PAUSE_SECONDS)
        return False

    # -- the port TaskHost -------------------------------------------------------------------

    def declared_tasks(self) -> Iterable[Task]:
        """Return the jobs' tasks, those of taskiq's shared tasks included."""
        for name, task in self.get_all_tasks().items():
            self._declare(name, task)
        return tuple(self._declared.values())

    def attach(self, jobs: JobService, tasks: TaskRegistry) -> None:
        """Use the jobs of this process in place of own connections."""
        self._jobs, self._registry = jobs, tasks

    async def start_worker(self) -> None:
        """Start as a worker; a failure is logged, and tried again with the next job."""
        with suppress(Snooze):
            await self._ready()

    async def stop_worker(self) -> None:
        """Run the handlers of the shutdown; a failure is logged."""
        if self._own is None:
            try:
                await self.shutdown()
            except Exception:
                _logger.exception("Broker of taskiq could not shut down")

    async def _ready(self) -> None:
        if self._own is not None:
            return
        async with self._starting:
            self.is_worker_process = True
            try:
                await self.startup()
            except Exception as error:
                _logger.exception("Broker of taskiq could not start")
                raise Snooze(_START_RETRY_SECONDS) from error

    def _register_task(self, task_name: str, task: AsyncTaskiqDecoratedTask[Any, Any]) -> None:
        super()._register_task(task_name, task)
        declared = self._declare(task_name, task)
        if self._registry is not None:
            self._registry.add(declared)

    def _declare(self, name: str, task: AsyncTaskiqDecoratedTask[Any, Any]) -> Task:
        found = self._declared.get(name)
        if found is not None and declared_task(task) is found:
            return found

        async def run(message: tuple[bytes, TaskiqMessage], context: JobContext) -> msgspec.Raw:
            return await self._run(*message, context)

        def read(payload: bytes, job_id: str) -> tuple[bytes, TaskiqMessage]:
            try:
                return self._read(payload, name, job_id)
            except Exception as error:
                raise PayloadError(type_and_text(error)) from error

        run.__module__, run.__qualname__ = task.original_func.__module__, name
        options = options_of(task.labels)
        attempts_of(task.labels)  # raises for a label that is no number
        declared = self._declared[name] = Task(
            name=name,
            # The same for a task that is declared again: taskiq runs the latest one.
            function=run if found is None else found.function,
            queue=options.queue or DEFAULT_QUEUE,
            payload_type=arguments_type(name, task.original_func),
            read=read if found is None else found.read,
            wants_context=True,
            transactional=False,
            timeout=timeout_of(task.labels),
            retry=MessageRetries(lambda: attempts_of(task.labels, self.middlewares)),
            priority=options.priority,
            concurrency=task.labels.get("concurrency"),
            rate_limit=task.labels.get("rate_limit"),
            host=self,
        )
        _ = declared.limit  # raises for a limit that is none
        mark(task, declared)
        return declared

    # -- sending -----------------------------------------------------------------------------

    async def kick(self, message: BrokerMessage) -> None:
        """Accept a message as a job; it is durable when this returns.

        A running task that sends its own message again, as retry middlewares and
        ``Context.requeue`` do, runs again as the same job.
        """
        delivery = current_delivery()
        if delivery is not None and delivery.task_id == message.task_id and not delivery.is_over:
            delivery.send_again(message)
            return
        draft = self._draft(message)

        async def accept(jobs: JobService, again: bool) -> None:  # noqa: FBT001
            own = self._own
            if own is not None and own.in_process and not self.is_worker_process:
                own.run_jobs()
            accepted = await jobs.accept_draft(draft)
            if not accepted.created and draft.key is None:
                _require_own(accepted.job, draft, message.task_id, again=again)

        await self._with_jobs(accept)

    def _draft(self, message: BrokerMessage) -> JobDraft:
        now = datetime.now(UTC)
        options = options_of(message.labels)
        task = self.find_task(message.task_name)
        if not registers_tasks():
            self.declared_tasks()
        declared = self._declared.get(message.task_name)
        default = DEFAULT_QUEUE if declared is None else declared.queue
        return JobDraft(
            id=job_id_of(message.task_id),
            queue=options.queue or default,
            task=message.task_name,
            payload=payload_of(message.message, message.task_id),
            run_at=now + timedelta(seconds=options.delay) if options.delay else None,
            key=None if task is None else schedule_key(message.labels, task.labels, now),
            correlation_id=current_correlation_id(),
            user_id=current_user_id(),
            priority=options.priority,
        )

    # -- running -----------------------------------------------------------------------------

    async def listen(self) -> AsyncGenerator[AckableMessage, None]:
        """Claim jobs, and yield their messages to a receiver of taskiq.

        The worker of this process keeps their leases. At the end of the iteration a worker process
        claims no more, and hands back the jobs that no receiver has taken.
        """
        await self.job_service()
        if self._own is not None and self._own.closing:
            await self._close(self._own)  # the receiver listens again, after an error of its own
            await self.job_service()
        own = self._own
        if own is None:
            raise ConfigurationError(
                ["this process runs the jobs of the broker itself; use no receiver of taskiq here"]
            )
        if own.assembly.jobs.in_memory:
            _logger.warning(
                "Messages are in memory, so this process gets only its own; set DATABASE_URL"
            )
        own.pulled = True
        own.run_jobs()
        try:
            while True:
                delivery = await own.outbox.get()
                if not delivery.is_over:
                    delivery.taken = True
                    yield AckableMessage(data=delivery.data, ack=delivery.ack)
        finally:
            if self.is_worker_process and self._own is own:
                self._stop_deliveries(own)
                own.begin_drain()

    def _stop_deliveries(self, own: _Own) -> None:
        own.closing = True
        for delivery in tuple(self._deliveries.values()):
            if own.pulled and not delivery.taken:
                delivery.give_back()

    async def _run(self, data: bytes, message: TaskiqMessage, context: JobContext) -> msgspec.Raw:
        """Run the message of a job; return its value as JSON, or raise why there is none."""
        if self._observer not in self.middlewares:
            self.middlewares.insert(0, self._observer)
        own = self._own
        if own is None or not own.pulled:
            await self._ready()
        delivery = Delivery(data, message.task_id, context)
        self._deliveries[message.task_id] = delivery
        try:
            if own is not None and own.pulled:
                if own.closing:
                    delivery.give_back()
                own.outbox.put_nowait(delivery)
            else:
                callback = self._receiver().callback(AckableMessage(data=data, ack=delivery.ack))
                delivery.follow(asyncio.create_task(callback, name=context.id))
            return json_of(await delivery.outcome())
        finally:
            if self._deliveries.get(message.task_id) is delivery:
                del self._deliveries[message.task_id]

    def _read(self, payload: bytes, task: str, job_id: str) -> tuple[bytes, TaskiqMessage]:
        known = self.find_task(task)
        data = message_of(payload, task, job_id, {} if known is None else known.labels)
        if isinstance(data, TaskiqMessage):
            data = self.formatter.dumps(data).message
        message = self.formatter.loads(data)
        if message.task_name != task:
            raise MessageError(f"the message is for the task {message.task_name!r}")
        if job_id_of(message.task_id) != job_id:
            raise MessageError(f"the message is for the task id {message.task_id!r}")
        # The receiver does this again, and drops a message whose labels it cannot parse.
        message.parse_labels()
        return data, message

    def _receiver(self) -> Receiver:
        if self._runner is None:
            self._runner = Receiver(
                self, executor=ThreadForEachCall(), max_async_tasks=_MAX_TASKS, run_startup=False
            )
        return self._runner

    def _labels(self, job: Job) -> Mapping[str, Any]:
        try:
            _, message = self._read(job.payload, job.task, job.id)
        except Exception:  # noqa: BLE001 - a job that was submitted otherwise, and failed
            return {}
        return message.labels

    async def find_job(self, task_id: str) -> Job:
        """Return the job of a task. Raises :class:`JobNotFoundError`."""
        return await self._with_jobs(lambda jobs, _: jobs.get(job_id_of(task_id)))


def _require_own(job: Job, draft: JobDraft, task_id: str, *, again: bool) -> None:
    """Raise an error if a task id belongs to another message than that of ``draft``.

    ``again``: the draft may have been accepted before, by a call whose response was lost.
    """
    is_same = job.comes_from(replace(draft, run_at=job.asked_run_at))  # a delay began anew
    if again and is_same:
        return
    if job.state.final:
        raise JobStateError(
            f"the task id {task_id!r} belongs to a job that is {job.state}; a task id is used once",
            job.state,
        )
    if not is_same:
        raise KeyConflictError(
            f"the task id {task_id!r} belongs to a job that asks for something else"
        )
