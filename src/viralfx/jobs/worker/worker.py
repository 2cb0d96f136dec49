"""The worker: consumes queues until it is drained."""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from viralfx.core.clock import Clock, SystemClock
from viralfx.core.errors import LedgerUnavailableError, require_count, require_positive
from viralfx.jobs.codec import DEFAULT_MAX_BYTES, Codec
from viralfx.jobs.hooks import CombinedHooks, JobHooks
from viralfx.jobs.ledger import JobLedger, LeaseStore
from viralfx.jobs.notifier import BackgroundNotifier, JobNotifier
from viralfx.jobs.tasks import Submitter, TaskRegistry
from viralfx.jobs.worker.availability import LedgerAvailability
from viralfx.jobs.worker.calls import JobThreads, TaskCalls
from viralfx.jobs.worker.completer import Completer
from viralfx.jobs.worker.consumer import QueueConsumer
from viralfx.jobs.worker.context import WorkerContext
from viralfx.jobs.worker.drain import DrainReport, WorkerRoles, drain
from viralfx.jobs.worker.execution import Executor
from viralfx.jobs.worker.lease import Heartbeat, WorkerView, max_renewal_delay
from viralfx.jobs.worker.maintenance import Pruner, Retention, Scheduler, Sweeper
from viralfx.jobs.worker.poller import Control, Poller
from viralfx.jobs.worker.quarantine import PoisonJobQuarantine
from viralfx.jobs.worker.running import Execution
from viralfx.resilience.policy import BackoffPolicy, RetryPolicy


class WorkerState(StrEnum):
    """The state of a worker; it only advances."""

    NEW = "new"
    RUNNING = "running"
    DRAINING = "draining"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """The configuration of a worker; durations are in seconds.

    Raises ``ValueError`` for a number that is out of range.
    """

    name: str
    """Unique among all workers of the ledger, past ones included."""
    queues: Mapping[str, int]
    """The slots of each queue: how many of its jobs may run at once."""
    lease: float = 30.0
    sweep_interval: float = 5.0
    poll_interval: float = 5.0
    default_retry: RetryPolicy = field(default_factory=BackoffPolicy)
    default_timeout: float = 300.0
    max_crashes: int = 5
    max_result_bytes: int = DEFAULT_MAX_BYTES
    """Bytes of JSON that a result may have."""
    unknown_patience: float = 3600.0
    """How long a due job may wait for a worker that can run it; then it fails."""
    retention: Retention = field(default_factory=Retention)
    durable: bool = True
    """False for a ledger that ends with this process: the drain then runs all due jobs."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for queue, slots in self.queues.items():
            require_count(f"the concurrency of queue {queue!r}", slots)
        require_positive("lease", self.lease)
        require_positive("sweep_interval", self.sweep_interval)
        require_positive("poll_interval", self.poll_interval)
        require_positive("default_timeout", self.default_timeout)
        require_count("max_crashes", self.max_crashes)
        require_count("max_result_bytes", self.max_result_bytes)
        require_positive("unknown_patience", self.unknown_patience)


class RunningJob(NamedTuple):
    """A job whose task runs; durations are in seconds, None before it began."""

    id: str
    task: str
    queue: str
    attempt: int
    seconds: float | None
    timeout: float | None

    @classmethod
    def of(cls, execution: Execution) -> "RunningJob":
        """Return the job of an execution."""
        claim, deadline = execution.claim, execution.deadline
        timeout = None if deadline is None else deadline.seconds
        seconds = None if deadline is None else deadline.seconds - deadline.remaining()
        return cls(
            id=claim.id,
            task=claim.task,
            queue=claim.queue,
            attempt=claim.attempt,
            seconds=None if seconds is None else round(seconds, 1),
            timeout=timeout,
        )


class JobWorker:
    """Runs the jobs of its queues, in a number of slots for each queue.

    A queue that is full, or whose tasks hang, does not delay the others. During an outage of the
    ledger the worker keeps the outcomes of its jobs until it can record them.
    """

    def __init__(
        self,
        config: WorkerConfig,
        *,
        ledger: JobLedger,
        notifier: JobNotifier,
        tasks: TaskRegistry,
        codec: Codec,
        clock: Clock | None = None,
        hooks: JobHooks | None = None,
        clean: Callable[[str], str] = str,
        open_lease_store: Callable[[], LeaseStore] | None = None,
        submit: Submitter | None = None,
        calls: TaskCalls | None = None,
    ) -> None:
        """``clean`` redacts the secrets in error messages. ``calls`` calls the tasks' functions.

        ``open_lease_store`` returns the store that a thread of the worker renews its lease in.
        Without it the event loop renews the lease, so a task that blocks the loop loses its job.

        ``submit`` submits the jobs of tasks, by ``JobContext.submit``.
        """
        self.name = config.name
        self._lease = config.lease
        clock = clock or SystemClock()
        self._state = WorkerState.NEW
        self._draining: asyncio.Task[DrainReport] | None = None
        self._background_notifier = BackgroundNotifier(notifier, clock=clock)
        context = WorkerContext(
            worker=config.name,
            tasks=tasks,
            ledger=ledger,
            # After an outage of less than half a lease, every lease has enough time left to be
            # renewed: workers renew theirs every third of it.
            availability=LedgerAvailability(clock, min_outage=config.lease / 2),
            clock=clock,
            notify=self._announce,
        )
        self._completer = Completer(context)
        heartbeat = Heartbeat(
            context,
            config.queues.keys(),
            config.lease,
            view=self._view,
            wake=self._wake,
            open_store=open_lease_store,
        )
        sweeper = Sweeper(
            context,
            heartbeat,
            interval=config.sweep_interval,
            hold=max_renewal_delay(config.lease),
            max_crashes=config.max_crashes,
            unknown_patience=config.unknown_patience,
        )
        self._threads = JobThreads(sum(config.queues.values()))
        control = Control(context, self._running)

        self.executor = executor = Executor(
            ledger=ledger,
            tasks=tasks,
            codec=codec,
            default_retry=config.default_retry,
            default_timeout=config.default_timeout,
            max_result_bytes=config.max_result_bytes,
            clock=clock,
            threads=self._threads,
            on_begin=control.wake,
            on_begun=heartbeat.begin,
            on_fenced=self._completer.record_fenced,
            clean=clean,
            hooks=hooks or CombinedHooks(),
            submit=submit,
            calls=calls or TaskCalls(),
        )
        quarantine = PoisonJobQuarantine(clock)
        self._consumers = tuple(
            QueueConsumer(
                context,
                queue,
                slots,
                notifier=notifier,
                heartbeat=heartbeat,
                executor=executor,
                completer=self._completer,
                quarantine=quarantine,
                late_claim=config.lease / 3,
            )
            for queue, slots in config.queues.items()
        )
        self._poller = Poller(
            context,
            heartbeat,
            self._consumers,
            notifier=notifier,
            interval=config.poll_interval,
        )
        self._scheduler = Scheduler(context, heartbeat)
        self._roles = WorkerRoles(
            context=context,
            heartbeat=heartbeat,
            background=(
                self._poller,
                sweeper,
                self._scheduler,
                Pruner(context, heartbeat, config.retention),
            ),
            consumers=self._consumers,
            control=control,
            completer=self._completer,
            background_notifier=self._background_notifier,
            durable=config.durable,
        )

    @property
    def state(self) -> WorkerState:
        """The current state."""
        return self._state

    @property
    def concurrency(self) -> Mapping[str, int]:
        """How many jobs of each queue it runs at once."""
        return {consumer.queue: consumer.slots for consumer in self._consumers}

    @property
    def active(self) -> int:
        """How many jobs the worker has."""
        return sum(consumer.active for consumer in self._consumers)

    @property
    def unrecorded(self) -> int:
        """How many outcomes the ledger has not recorded for longer than a lease."""
        return len(self._completer.unrecorded(self._lease))

    def report_unrecorded(self) -> Mapping[str, int]:
        """Return how many outcomes wait for longer than a lease, by queue; log new ones."""
        claims = self._completer.report_unrecorded(self._lease)
        return Counter(claim.queue for claim in claims)

    @property
    def running(self) -> Sequence["RunningJob"]:
        """The jobs whose tasks run now."""
        return [RunningJob.of(each) for each in self._running()]

    @property
    def progress(self) -> Sequence[tuple[str, str, float]]:
        """Queue, task and progress from 0 to 1 of the running jobs that report a total."""
        reports = [(each.claim, each.progress) for each in self._running()]
        return [
            (claim.queue, claim.task, ratio)
            for claim, report in reports
            if report is not None and (ratio := report.ratio) is not None
        ]

    @property
    def abandoned(self) -> int:
        """How many tasks so far ignored the cancellation by their timeout."""
        return sum(consumer.abandoned for consumer in self._consumers)

    @property
    def fenced(self) -> int:
        """How many outcomes came too late: another worker had claimed the job."""
        return self._completer.fenced

    def start(self) -> None:
        """Start on the running loop. The ledger and the notifier need not be available yet.

        A second call, or a call after the drain began, does nothing.
        """
        if self._state is not WorkerState.NEW:
            return
        self._state = WorkerState.RUNNING
        self._roles.start()

    async def drain(self, budget: float) -> DrainReport:
        """Stop claiming, finish jobs within ``budget`` seconds, and hand back the rest.

        If the ledger is not durable, waiting jobs run as well. You can call it before
        :meth:`start`; all callers share one drain. Raises :class:`WorkLostError` if jobs are lost.
        """
        if self._draining is None:
            self._state = WorkerState.DRAINING
            self._draining = asyncio.create_task(drain(self._roles, budget), name="job-drain")
            self._draining.add_done_callback(self._stopped)
        await asyncio.wait({self._draining})
        return self._draining.result()

    def _stopped(self, draining: "asyncio.Task[DrainReport]") -> None:
        self._state = WorkerState.STOPPED
        self._threads.close()
        if not draining.cancelled():
            draining.exception()  # drain() raises it

    def _view(self) -> WorkerView:
        consumers = self._consumers
        late = any(each.is_claim_late() for each in consumers)
        return WorkerView(
            holding=None if late else tuple(i for each in consumers for i in each.holding),
            busy_until=max(each.busy_until for each in consumers),
        )

    def _running(self) -> Sequence[Execution]:
        return [execution for consumer in self._consumers for execution in consumer.running]

    def _wake(self) -> None:
        self._poller.wake()
        self._scheduler.wake()
        for consumer in self._consumers:
            consumer.wake()

    def _announce(self, queue: str, ids: Sequence[str]) -> None:
        self._background_notifier.notify(queue, ids)
        for consumer in self._consumers:
            if consumer.queue == queue:
                consumer.poll()


async def drain_jobs(worker: JobWorker, budget: float) -> None:
    """Drain a worker as a shutdown stage.

    Raises :class:`WorkLostError` if jobs are lost, and :class:`LedgerUnavailableError` if
    jobs could not be handed back; those run again when the worker's lease has ended.
    """
    report = await worker.drain(budget)
    if report.unrecorded:
        raise LedgerUnavailableError(
            f"{report.unrecorded} jobs could not be handed back: the ledger does not answer, or"
            " other transactions lock them; they run again when this worker's lease ends"
        )
