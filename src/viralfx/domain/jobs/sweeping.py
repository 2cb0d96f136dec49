"""Taking jobs from workers that died: every worker looks for them."""

import logging
import random
from collections.abc import Callable, Sequence

from viralfx.domain.clock import Clock
from viralfx.domain.jobs.heartbeat import Heartbeat
from viralfx.domain.jobs.ledger import JobLedger, Swept
from viralfx.domain.jobs.reach import LedgerReach

_logger = logging.getLogger("viralfx.jobs")


class Sweeper:
    """Sweeps at least every ``interval`` seconds, at times that differ from worker to worker.

    After the ledger was away for longer than leases last, it looks as if everybody had died. So
    there is no sweep until it has answered for ``hold`` seconds again, in which those who live
    can say so. Nor is there one until this worker's own lease has been good for as long: who has
    just begun does not know what was before. And one that hangs while the ledger is away is told
    until when it may do anything.
    """

    def __init__(
        self,
        ledger: JobLedger,
        *,
        interval: float,
        hold: float,
        max_crashes: int,
        heartbeat: Heartbeat,
        reach: LedgerReach,
        clock: Clock,
        ring: Callable[[str, Sequence[str]], None],
        rng: random.Random | None = None,
    ) -> None:
        """``ring`` is told of the jobs that wait again."""
        self._ledger = ledger
        self._interval = interval
        self._hold = hold
        self._max_crashes = max_crashes
        self._heartbeat = heartbeat
        self._reach = reach
        self._clock = clock
        self._ring = ring
        self._rng = rng or random.Random()  # noqa: S311 - it spreads load only

    async def run(self) -> None:
        """Sweep until cancelled."""
        try:
            while True:
                await self._clock.sleep(self._interval * self._rng.uniform(0.5, 1.0))
                unbroken_for = self._heartbeat.unbroken_for(self._clock.monotonic())
                steady_for = min(self._reach.steady_for, unbroken_for)
                if steady_for >= self._hold:
                    await self._sweep()
                elif steady_for > 0:
                    self._reach.excuse("sweep")
        finally:
            self._reach.forget("sweep")

    async def _sweep(self) -> None:
        try:
            swept = await self._ledger.sweep(self._max_crashes, self._heartbeat.others_good_before)
        except Exception as error:  # noqa: BLE001 - others sweep as well, and this one again
            self._reach.failed("sweep", error)
            return
        self._reach.succeeded("sweep")
        _log(swept)
        for queue, ids in swept.returned.items():
            self._ring(queue, ids)


def _log(swept: Swept) -> None:
    returned = sum(len(ids) for ids in swept.returned.values())
    if returned:
        _logger.warning("Jobs of dead workers wait again", extra={"count": returned})
    for job_id in swept.crashed:
        _logger.error("Job failed", extra={"job": job_id, "code": "crashed"})
