"""The lease of a worker: renewed in time, and known to be over when it is."""

import asyncio
import logging
from collections.abc import Callable, Collection
from datetime import datetime, timedelta

from viralfx.domain.clock import Clock, finished_within
from viralfx.domain.jobs.job import LedgerUnavailableError
from viralfx.domain.jobs.ledger import JobLedger
from viralfx.domain.jobs.reach import LONGEST_PAUSE, LedgerReach

_logger = logging.getLogger("viralfx.jobs")


def longest_delay(lease: float) -> float:
    """Return the seconds in which a worker of such a lease renews it after an outage, at most.

    A renewal that hangs is cut after half a lease, and tried again after a pause.
    """
    return lease / 2 + _longest_pause(lease)


def _longest_pause(lease: float) -> float:
    return min(LONGEST_PAUSE, lease / 6)


class Heartbeat:
    """Registers a worker and renews its lease every third of it.

    When the lease runs out the worker's jobs may be given to others. What it runs goes on, and
    the ledger takes no outcome of a job that has another owner by then.
    """

    def __init__(
        self,
        ledger: JobLedger,
        worker: str,
        queues: Collection[str],
        lease: float,
        *,
        reach: LedgerReach,
        clock: Clock,
        holding: Callable[[], Collection[str]],
        on_renewed: Callable[[], None],
    ) -> None:
        """``lease`` is in seconds; ``holding`` returns the ids of the jobs that the worker has."""
        self._ledger = ledger
        self._worker = worker
        self._queues = tuple(queues)
        self._lease = lease
        self._reach = reach
        self._clock = clock
        self._holding = holding
        self._on_renewed = on_renewed
        self._good_until: float | None = None
        self._ends: datetime | None = None
        self._unbroken_since = 0.0
        self._told = False

    def good(self, now: float) -> bool:
        """Tell whether the lease is good at a monotonic time."""
        return self._good_until is not None and now < self._good_until

    def secure(self, now: float) -> bool:
        """Tell whether it is good for long enough to claim jobs under it."""
        return self.good(now + self._lease / 5)

    def unbroken_for(self, now: float) -> float:
        """Return the seconds for which it has been good at all times; zero while it is not."""
        return now - self._unbroken_since if self.good(now) else 0.0

    @property
    def others_good_before(self) -> datetime | None:
        """Until when others that live have good leases, by the ledger's time; None: unknown.

        That is two thirds of a lease from this worker's own last renewal, whatever has happened
        since: all who renew theirs in time had as much left at that moment.
        """
        return None if self._ends is None else self._ends - timedelta(seconds=self._lease / 3)

    async def run(self) -> None:
        """Renew until cancelled."""
        try:
            while True:
                await self._clock.sleep(await self._renew())
        finally:
            self._reach.forget("register")
            self._good_until = self._ends = None

    async def _register(self) -> datetime:
        registering = asyncio.create_task(
            self._ledger.register(self._worker, self._queues, self._lease, self._holding()),
            name="job-register",
        )
        try:
            # There must be time for another try before the lease is over.
            if not await finished_within(registering, self._lease / 2, self._clock):
                raise LedgerUnavailableError("the ledger does not answer")
        finally:
            registering.cancel()
        return registering.result()

    async def _renew(self) -> float:
        # Reckoned from before the call: the ledger begins to count no earlier.
        began = self._clock.monotonic()
        try:
            ends = await self._register()
        except Exception as error:  # noqa: BLE001 - without this loop all jobs would be lost to it
            delay = min(self._reach.failed("register", error), _longest_pause(self._lease))
            now = self._clock.monotonic()
            if self._good_until is not None and not self._told and not self.good(now + delay):
                self._told = True
                _logger.error(  # noqa: TRY400 - why was logged when the ledger was lost
                    "Job lease lost: others may be given this worker's jobs"
                )
            return delay
        if self._ends is None or ends - timedelta(seconds=self._lease) >= self._ends:
            self._unbroken_since = self._clock.monotonic()
        self._good_until, self._ends = began + self._lease, ends
        self._reach.succeeded("register")
        if self._told:
            self._told = False
            _logger.info("Job lease regained")
        self._on_renewed()
        return self._lease / 3
