"""Drains a worker: in order and within a budget, even if tasks or the ledger do not respond."""

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from viralfx.core.clock import Clock, finished_within
from viralfx.core.errors import LedgerUnavailableError, WorkLostError
from viralfx.jobs.ledger import PartlyDoneError, QueueCounts
from viralfx.jobs.notifier import BackgroundNotifier
from viralfx.jobs.worker.completer import Completer
from viralfx.jobs.worker.consumer import QueueConsumer
from viralfx.jobs.worker.context import WorkerContext
from viralfx.jobs.worker.lease import Heartbeat
from viralfx.jobs.worker.role import Role

_logger = logging.getLogger("viralfx.jobs")

_MAX_CANCEL_SECONDS = 1.0
"""Time for tasks to end after they were cancelled to hand their jobs back."""

_MAX_DEREGISTER_SECONDS = 2.0
"""Time for deregistering and for the last notifications."""

_MAX_CLAIM_SECONDS = 2.0
"""Time for running claims to end; the jobs of a later claim are handed back at the end."""

_MIN_STEP_SECONDS = 0.05
"""Time that a step gets even if the budget is used up."""

_MEMORY_POLL_SECONDS = 0.05
"""Time between two counts of the jobs that a ledger in memory still has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainReport:
    """The result of a drain."""

    finished: int
    """Jobs that were active and ended within the budget."""
    handed_back: int
    """Jobs that were active or just claimed, and are due again without a spent attempt."""
    ignoring: int
    """Tasks that ignored their cancellation and were abandoned."""
    unrecorded: int
    """Jobs whose outcome or hand-back could not be recorded: they run again after the lease."""

    def fields(self) -> dict[str, int]:
        """Return the log fields."""
        return {
            "finished": self.finished,
            "handedBack": self.handed_back,
            "ignoring": self.ignoring,
            "unrecorded": self.unrecorded,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRoles:
    """The parts of a worker; each owns its asyncio tasks."""

    context: WorkerContext
    heartbeat: Heartbeat
    background: Sequence[Role]
    """Parts that no running job depends on: they end first."""
    consumers: Sequence[QueueConsumer]
    control: Role
    completer: Completer
    background_notifier: BackgroundNotifier
    durable: bool
    """False for a ledger that ends with this process."""

    def start(self) -> None:
        """Start all of them on the running loop."""
        for role in (self.heartbeat, self.control, *self.background):
            role.start()
        for consumer in self.consumers:
            consumer.start()


def drop_scheduled(counts: Mapping[str, QueueCounts]) -> int:
    """Return how many jobs of a ledger in memory are lost although they were due or active.

    Logs how many jobs are lost that were not due yet: no drain could have run them.
    """
    scheduled = sum(queue.scheduled for queue in counts.values())
    if scheduled:
        _logger.warning(
            "Scheduled jobs in memory end with this process", extra={"scheduled": scheduled}
        )
    return sum(queue.waiting + queue.active for queue in counts.values())


async def drain(roles: WorkerRoles, budget: float) -> DrainReport:
    """End the parts of a worker within ``budget`` seconds; finish its jobs or hand them back.

    Raises :class:`WorkLostError` if due jobs of a ledger in memory are lost.
    """
    clock, consumers = roles.context.clock, roles.consumers
    began = clock.monotonic()
    ends_at = began + budget
    deregister_seconds = min(_MAX_DEREGISTER_SECONDS, budget / 5)
    cancel_at = ends_at - deregister_seconds - min(_MAX_CANCEL_SECONDS, budget / 5)
    recorded = sum(consumer.recorded for consumer in consumers)
    for role in roles.background:
        role.cancel()
    for consumer in consumers:
        consumer.stop_listening()
    if not roles.durable and roles.heartbeat.task is not None:
        await _run_waiting_jobs(roles, cancel_at)
    for consumer in consumers:
        consumer.stop()
    claiming = [each.claiming for each in consumers if each.claiming is not None]
    await _wait(claiming, min(_MAX_CLAIM_SECONDS, budget / 5), clock)
    for consumer in consumers:
        consumer.cancel_claiming()
    await _until_idle(roles, cancel_at)
    for consumer in consumers:
        consumer.hand_back_running()
    await _until_idle(roles, ends_at - deregister_seconds)
    roles.control.cancel()
    ignoring = sum(consumer.abandon_all() for consumer in consumers)
    unsettled = sum(consumer.active for consumer in consumers) + ignoring
    hand_back = await _deregister(roles, ends_at - deregister_seconds / 4)
    roles.completer.cancel()
    await roles.background_notifier.close(max(0.0, ends_at - clock.monotonic()))
    report = DrainReport(
        finished=sum(consumer.recorded for consumer in consumers) - recorded,
        handed_back=sum(consumer.handed_back for consumer in consumers) + hand_back.handed_back,
        ignoring=ignoring,
        unrecorded=unsettled if hand_back.left is None else hand_back.left,
    )
    _logger.info("Job worker drained", extra=report.fields())
    if not roles.durable and (lost := drop_scheduled(await roles.context.ledger.counts())):
        took = clock.monotonic() - began
        raise WorkLostError(
            f"{lost} in-memory jobs were due and did not finish: the drain took"
            f" {took:.3g} s of {budget:g} s"
        )
    return report


async def _run_waiting_jobs(roles: WorkerRoles, until: float) -> None:
    clock, consumers = roles.context.clock, roles.consumers
    while clock.monotonic() < until:
        counts = await roles.context.ledger.counts()
        could_start = [
            counts[consumer.queue]
            for consumer in consumers
            if consumer.queue in counts and not consumer.is_limited_until(until)
        ]
        waiting = any(each.waiting and not each.paused for each in could_start)
        if not waiting and not any(each.has_work_before(until) for each in consumers):
            return
        for consumer in consumers:
            consumer.poll()
        await clock.sleep(_MEMORY_POLL_SECONDS)


async def _until_idle(roles: WorkerRoles, until: float) -> None:
    clock = roles.context.clock
    # A late claim, or recording a timeout, starts tasks while this waits.
    while running := [task for consumer in roles.consumers for task in consumer.jobs]:
        left = until - clock.monotonic()
        if left <= 0:
            return
        await _wait(running, left, clock)


class _HandBack:
    """The answers to the calls that deregister a worker."""

    def __init__(self) -> None:
        self.returned: list[Mapping[str, Sequence[str]]] = []
        self.partly_done: PartlyDoneError | None = None
        """The last answer that left anything."""
        self.left: int | None = None
        """How many jobs of the worker are left by the last answer; None without an answer."""

    @property
    def handed_back(self) -> int:
        """How many jobs the calls handed back."""
        return sum(len(ids) for queues in self.returned for ids in queues.values())


async def _deregister(roles: WorkerRoles, until: float) -> _HandBack:
    """Deregister the worker, and announce the jobs that it handed back."""
    context, heartbeat = roles.context, roles.heartbeat
    hand_back = _HandBack()
    if heartbeat.task is None:
        hand_back.left = 0
        return hand_back
    # The heartbeat ends first, or a late renewal would register this worker again.
    heartbeat.cancel()
    left = until - context.clock.monotonic()
    await _wait([heartbeat.task], max(_MIN_STEP_SECONDS, left / 2), context.clock)
    left = max(_MIN_STEP_SECONDS, until - context.clock.monotonic())
    deregistering = asyncio.create_task(
        context.availability.retry_until_done("deregister", lambda: _leave(roles, hand_back)),
        name="job-deregister",
    )
    await _wait([deregistering], left, context.clock)
    if not deregistering.done():
        deregistering.cancel()
        reason = hand_back.partly_done or "the ledger does not answer"
        _logger.error("Job worker could not deregister: %s", reason)
    elif (error := deregistering.exception()) is not None:
        _logger.error("Job worker could not deregister", exc_info=error)
    for queues in hand_back.returned:
        for queue, ids in queues.items():
            context.notify(queue, ids)
    return hand_back


async def _leave(roles: WorkerRoles, hand_back: _HandBack) -> None:
    context = roles.context
    try:
        hand_back.returned.append(await context.ledger.deregister(context.worker))
    except PartlyDoneError as error:
        hand_back.returned.append(error.returned)
        hand_back.partly_done = error
        hand_back.left = len(error.left)
        raise
    except LedgerUnavailableError:
        hand_back.partly_done = None
        if roles.heartbeat.was_registered:
            raise
        # It never had a lease, so it has no job to hand back.
    hand_back.left = 0


async def _wait(tasks: Iterable[asyncio.Task[Any]], seconds: float, clock: Clock) -> None:
    """Wait until all tasks are done, at most ``seconds``; cancels none of them."""
    if unfinished := [task for task in tasks if not task.done()]:
        ended = asyncio.ensure_future(asyncio.wait(unfinished))
        try:
            _ = await finished_within(ended, seconds, clock)
        finally:
            ended.cancel()
