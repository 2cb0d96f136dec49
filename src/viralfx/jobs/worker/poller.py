"""Asks the ledger at intervals for due jobs and requests to cancel, and sends it reports."""

import asyncio
from collections.abc import Callable, Sequence

from viralfx.core.clock import default_rng
from viralfx.jobs.ledger import ProgressReport
from viralfx.jobs.notifier import JobNotifier
from viralfx.jobs.worker.consumer import QueueConsumer
from viralfx.jobs.worker.context import WorkerContext
from viralfx.jobs.worker.lease import Heartbeat
from viralfx.jobs.worker.role import Role
from viralfx.jobs.worker.running import Execution

DISCONNECTED_POLL_SECONDS = 0.2
"""The longest time between two polls of one worker while no notification would arrive."""

SECONDS_PER_WORKER = 0.1
"""The shortest mean time between two polls of all live workers together, if there are many."""
_FEW_WORKERS, _FEW_SECONDS = 10, 0.2
"""So many workers, and the same time for up to as many: they make at most ten transactions a
second, half of which are for leases, sweeps and health checks."""

_BUSY_SECONDS = 1.0
"""The shortest time between two polls of one worker, the first of which found a scheduled job."""
_AFTER_SECONDS = 0.1
"""From the time at which a scheduled job is due to the next poll, so that it is claimed by then."""
_MAX_SLEEP_SECONDS = 1.0
"""Time after which a sleeping poller notices that notifications do not arrive any more."""
CONTROL_SECONDS = 1.0
"""Time between two queries for requests to cancel, and between two writes of reports."""


class Poller(Role):
    """Asks the ledger which queues have due jobs, and lets their consumers claim them.

    Jobs that are due before the next poll are claimed when they are due.

    Usually it asks every ``interval`` seconds. The more workers share its queues, the less often
    each asks: up to ten idle workers make at most five polls a second in all, and any number at
    most ten. It does not ask for a queue whose consumer polls by then anyway, nor without a lease.
    """

    name = "job-poll"

    def __init__(
        self,
        context: WorkerContext,
        heartbeat: Heartbeat,
        consumers: Sequence[QueueConsumer],
        *,
        notifier: JobNotifier,
        interval: float,
    ) -> None:
        """``interval`` is in seconds."""
        self._context = context
        self._heartbeat = heartbeat
        self._consumers = {consumer.queue: consumer for consumer in consumers}
        self._notifier = notifier
        self._interval = interval
        self._rng = default_rng()
        self._renewed = asyncio.Event()

    def wake(self) -> None:
        """Poll at once if the worker had no lease: it was renewed."""
        self._renewed.set()

    async def run(self) -> None:
        """Poll until cancelled. The first poll is left to the consumers."""
        clock, availability = self._context.clock, self._context.availability
        pause = self._pause()
        try:
            while not self.stopping:
                await self._sleep(pause)
                while not self._heartbeat.is_secure(clock.monotonic()):
                    self._renewed.clear()
                    await self._renewed.wait()
                pause = await self._poll()
        finally:
            availability.remove("poll")

    async def _sleep(self, seconds: float) -> None:
        """Sleep, and end early if notifications stop arriving meanwhile."""
        ends = self._context.clock.monotonic() + seconds
        connected = self._is_connected()
        while (left := ends - self._context.clock.monotonic()) > 0:
            await self._context.clock.sleep(min(left, _MAX_SLEEP_SECONDS))
            if connected and not self._is_connected():
                return

    async def _poll(self) -> float:
        """Poll once; return the seconds until the next poll."""
        context, pause = self._context, self._pause()
        queues = [
            queue for queue, consumer in self._consumers.items() if not consumer.polls_within(pause)
        ]
        if queues:
            try:
                due = await context.ledger.due(queues, context.tasks.names, within=pause)
            except Exception as error:  # noqa: BLE001 - the worker must not stop polling
                return context.availability.failed("poll", error)
            context.availability.succeeded("poll")
            for queue, seconds in due.items():
                if seconds <= 0:
                    self._consumers[queue].poll()
                elif self._consumers[queue].poll_when_due(seconds):
                    # The ledger names only the first job of a queue; another may follow it soon.
                    pause = min(pause, max(_BUSY_SECONDS, self._share(), seconds + _AFTER_SECONDS))
        return pause

    def _is_connected(self) -> bool:
        return all(map(self._notifier.is_connected, self._consumers))

    def _pause(self) -> float:
        interval = self._interval
        if not self._is_connected():
            interval = min(interval, DISCONNECTED_POLL_SECONDS)
        # Random, so that workers that start together do not poll together. A pause is at most the
        # interval. If the workers' share is longer, the pause is at least the share.
        share = self._share()
        longest = interval if share <= interval else 1.1 * share
        return self._rng.uniform(max(0.9 * interval, share), longest)

    def _share(self) -> float:
        workers = self._heartbeat.workers
        return max(SECONDS_PER_WORKER * workers, _FEW_SECONDS * min(workers, _FEW_WORKERS))


class Control(Role):
    """Asks once a second which of the running jobs to cancel, and stores their reports.

    Without running jobs it sleeps. All reports of a second are one write, with the latest
    report of each job: an outage of the ledger keeps no more than that. The last report of a job
    goes with its outcome.
    """

    name = "job-control"

    def __init__(self, context: WorkerContext, running: Callable[[], Sequence[Execution]]) -> None:
        """Serve the executions that ``running`` returns."""
        self._context = context
        self._running = running
        self._begun = asyncio.Event()

    def wake(self) -> None:
        """Begin to ask: a job has been claimed."""
        self._begun.set()

    async def run(self) -> None:
        """Do it until cancelled."""
        availability = self._context.availability
        try:
            while not self.stopping:
                await self._begun.wait()
                await self._context.clock.sleep(CONTROL_SECONDS)
                # Jobs that begin from here on set it again.
                self._begun.clear()
                if running := self._running():
                    self._begun.set()
                    await self._cancel_requested(running)
                    await self._store_reports(running)
                else:
                    # No call, so no sign that the ledger answers.
                    availability.skip("cancel requests")
                    availability.skip("report")
        finally:
            availability.remove("cancel requests")
            availability.remove("report")

    async def _cancel_requested(self, running: Sequence[Execution]) -> None:
        context = self._context
        try:
            requests = await context.ledger.cancel_requests(context.worker)
        except Exception as error:  # noqa: BLE001 - the next second tries again
            context.availability.failed("cancel requests", error)
            return
        context.availability.succeeded("cancel requests")
        for execution in running:
            if requests.get(execution.claim.id) == execution.claim.number:
                execution.request_cancel()

    async def _store_reports(self, running: Sequence[Execution]) -> None:
        context = self._context
        latest = {each: each.progress for each in running}
        reports = {
            each: ProgressReport(claim=each.claim, progress=progress.encode())
            for each, progress in latest.items()
            if progress is not None and progress is not each.stored_progress
        }
        if not reports:
            context.availability.skip("report")
            return
        try:
            await context.ledger.report(tuple(reports.values()))
        except Exception as error:  # noqa: BLE001 - the next second tries again
            context.availability.failed("report", error)
            return
        context.availability.succeeded("report")
        for execution in reports:
            execution.stored_progress = latest[execution]
