"""The worker: consumes queues until it is told to leave."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

from viralfx.domain.clock import Clock, SystemClock
from viralfx.domain.jobs.codec import Codec
from viralfx.domain.jobs.consumer import QueueConsumer
from viralfx.domain.jobs.execution import PATIENCE, Executor
from viralfx.domain.jobs.heartbeat import Heartbeat, longest_delay
from viralfx.domain.jobs.job import LedgerUnavailableError
from viralfx.domain.jobs.leaving import Departure, Left
from viralfx.domain.jobs.ledger import JobLedger
from viralfx.domain.jobs.observing import JobObserver, Unobserved
from viralfx.domain.jobs.periodic import Periodic, Schedule
from viralfx.domain.jobs.reach import LedgerReach
from viralfx.domain.jobs.ringing import Ringer
from viralfx.domain.jobs.settling import Settler
from viralfx.domain.jobs.slots import Slots
from viralfx.domain.jobs.suspects import Suspects
from viralfx.domain.jobs.sweeping import Sweeper
from viralfx.domain.jobs.tasks import TaskRegistry
from viralfx.domain.jobs.transport import JobTransport
from viralfx.domain.resilience.quantities import require_count, require_positive
from viralfx.domain.resilience.retry_policy import BackoffPolicy, RetryPolicy


class WorkerState(StrEnum):
    """How far a worker is; it goes forward only."""

    NEW = "new"
    RUNNING = "running"
    DRAINING = "draining"
    STOPPED = "stopped"


class JobWorker:
    """Runs the jobs of its queues, so many of each at once.

    A queue that is full, or whose tasks hang, holds up no other. While the ledger is away it
    waits, and outcomes that cannot be recorded are kept until they can be.
    """

    def __init__(
        self,
        *,
        ledger: JobLedger,
        transport: JobTransport,
        tasks: TaskRegistry,
        codec: Codec,
        queues: Mapping[str, int],
        worker: str,
        lease: float = 30.0,
        sweep_interval: float = 5.0,
        look_interval: float = 1.0,
        default_retry: RetryPolicy | None = None,
        default_timeout: float = 300.0,
        max_crashes: int = 5,
        clock: Clock | None = None,
        periodic: Iterable[Periodic] = (),
        durable: bool = True,
        observer: JobObserver | None = None,
        clean: Callable[[str], str] = str,
    ) -> None:
        """``queues`` gives how many jobs of each may run at once; durations are seconds.

        ``worker`` is a name that no other worker has or had. ``durable`` is False for a ledger
        that ends with this process. ``clean`` takes the secrets out of what tasks raise. Raises
        ``ValueError`` for a number that cannot be meant and :class:`UnknownTaskError` for a
        periodic task that is not declared.
        """
        for queue, slots in queues.items():
            require_count(f"the concurrency of queue {queue!r}", slots)
        require_positive("lease", lease)
        require_positive("sweep_interval", sweep_interval)
        require_positive("look_interval", look_interval)
        require_positive("default_timeout", default_timeout)
        require_count("max_crashes", max_crashes)
        self._clock = clock = clock or SystemClock()
        self._transport = transport
        self._state = WorkerState.NEW
        self._departing: asyncio.Task[Left] | None = None
        self.name = worker
        # A lease is renewed every third of it, so that after a shorter absence all have enough
        # left to be renewed.
        reach = LedgerReach(clock, absence=lease / 2)
        self._ringer = Ringer(transport, clock=clock)
        self._settler = Settler(ledger, reach, clock)
        self._heartbeat = Heartbeat(
            ledger,
            worker,
            queues.keys(),
            lease,
            reach=reach,
            clock=clock,
            holding=self._holding,
            on_renewed=self._wake,
        )
        self._sweeper = Sweeper(
            ledger,
            interval=sweep_interval,
            hold=longest_delay(lease),
            max_crashes=max_crashes,
            heartbeat=self._heartbeat,
            reach=reach,
            clock=clock,
            ring=self._wait_again,
        )
        self._schedule = Schedule(
            periodic, ledger=ledger, tasks=tasks, reach=reach, clock=clock, ring=self._wait_again
        )
        executor = Executor(
            ledger=ledger,
            tasks=tasks,
            codec=codec,
            default_retry=default_retry or BackoffPolicy(),
            default_timeout=default_timeout,
            clock=clock,
            on_fenced=self._settler.lost_fence,
            clean=clean,
            observer=observer or Unobserved(),
        )
        suspects = Suspects(clock)

        self._consumers = tuple(
            QueueConsumer(
                Slots(
                    queue,
                    count,
                    executor=executor,
                    settler=self._settler,
                    suspects=suspects,
                    ring=self._ringer.ring,
                ),
                ledger=ledger,
                worker=worker,
                heartbeat=self._heartbeat,
                reach=reach,
                clock=clock,
                look_interval=look_interval,
                hears=transport.hears,
                ring=self._ringer.ring,
            )
            for queue, count in queues.items()
        )
        self._departure = Departure(
            ledger=ledger,
            worker=worker,
            consumers=self._consumers,
            settler=self._settler,
            reach=reach,
            ringer=self._ringer,
            clock=clock,
            durable=durable,
        )

    @property
    def state(self) -> WorkerState:
        """How far it is."""
        return self._state

    @property
    def active(self) -> int:
        """How many jobs it has."""
        return sum(consumer.slots.active for consumer in self._consumers)

    @property
    def abandoned(self) -> int:
        """How many tasks ran on after their timeout cancelled them."""
        return sum(consumer.slots.abandoned for consumer in self._consumers)

    @property
    def fenced(self) -> int:
        """How many outcomes came too late: the job had been given to another worker."""
        return self._settler.fenced

    def start(self) -> None:
        """Begin, on the running loop. The ledger and the transport need not answer yet.

        Doing it twice, or after the drain began, does nothing.
        """
        if self._state is not WorkerState.NEW:
            return
        self._state = WorkerState.RUNNING
        departure = self._departure
        departure.keeping.append(_supervised(self._heartbeat.run(), "job-heartbeat"))
        departure.keeping.append(_supervised(self._watch(), "job-watch"))
        departure.background.append(_supervised(self._sweeper.run(), "job-sweep"))
        departure.background.append(_supervised(self._schedule.run(), "job-periodic"))
        for consumer in self._consumers:
            queue, slots = consumer.queue, consumer.slots.count
            listening = self._transport.listen(queue, consumer.hear, slots)
            departure.listeners.append(_supervised(listening, f"job-bells-{queue}"))
            departure.claiming.append(_supervised(consumer.run(), f"job-queue-{queue}"))

    async def drain(self, budget: float) -> Left:
        """Stop claiming at once, finish what can be within ``budget`` seconds, hand back the rest.

        With a ledger that is not durable what waits is run, too. Doing it twice, or before the
        start, is harmless: who calls again gets what the first one got. Raises
        :class:`WorkLostError` when jobs are lost.
        """
        if self._departing is None:
            self._state = WorkerState.DRAINING
            self._departing = asyncio.create_task(self._departure.run(budget), name="job-drain")
            self._departing.add_done_callback(self._stopped)
        await asyncio.wait({self._departing})
        return self._departing.result()

    def _stopped(self, departing: "asyncio.Task[Left]") -> None:
        self._state = WorkerState.STOPPED
        if not departing.cancelled():
            departing.exception()  # who waits for it is told

    async def _watch(self) -> None:
        while True:
            await self._clock.sleep(PATIENCE)
            for consumer in self._consumers:
                consumer.slots.abandon_late()

    def _holding(self) -> Sequence[str]:
        return [job_id for consumer in self._consumers for job_id in consumer.slots.holding]

    def _wake(self) -> None:
        for consumer in self._consumers:
            consumer.wake()

    def _wait_again(self, queue: str, ids: Sequence[str]) -> None:
        """Tell of jobs that are due."""
        self._ringer.ring(queue, ids)
        for consumer in self._consumers:
            if consumer.queue == queue:
                consumer.look()


class DrainJobs:
    """Shutdown stage: lets a worker leave."""

    def __init__(self, worker: JobWorker) -> None:
        self._worker = worker

    async def run(self, budget: float) -> None:
        """Drain.

        Raises :class:`WorkLostError` when jobs are lost, and :class:`LedgerUnavailableError` when
        some are not but could not be handed back, so that they wait for the end of the lease.
        """
        left = await self._worker.drain(budget)
        if left.unrecorded:
            raise LedgerUnavailableError(
                f"{left.unrecorded} jobs could not be handed back: the ledger does not answer;"
                " they run again when the lease of this worker is over"
            )


def _supervised(run: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    task = asyncio.create_task(run, name=name)
    task.add_done_callback(_report_crash)
    return task


def _report_crash(task: asyncio.Task[None]) -> None:
    if task.cancelled() or (error := task.exception()) is None:
        return
    task.get_loop().call_exception_handler(
        {"message": "Job worker task failed", "exception": error, "future": task}
    )
