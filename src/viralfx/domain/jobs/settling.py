"""Recording outcomes: those of many jobs in one step, and again until the ledger took them."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace

from viralfx.domain.clock import Clock
from viralfx.domain.jobs.coalescing import Coalescer
from viralfx.domain.jobs.job import Claim, JobError, JobState, Settlement, UnstorableError
from viralfx.domain.jobs.ledger import JobLedger
from viralfx.domain.jobs.reach import LedgerReach

_logger = logging.getLogger("viralfx.jobs")


class Settler:
    """Settles claims of one worker."""

    def __init__(self, ledger: JobLedger, reach: LedgerReach, clock: Clock) -> None:
        self._ledger = ledger
        self._reach = reach
        self._clock = clock
        # A job that was taken away and given back to the same worker may end twice at once.
        self._coalescer = Coalescer(self._record, apart=lambda settled: settled.claim.id)
        self.fenced = 0
        """Outcomes that were not taken, because their jobs had been given to somebody else."""

    async def settle(self, settlement: Settlement) -> bool:
        """Return once the ledger has the outcome: True, or passed it over: False.

        Never raises but for cancellation.
        """
        taken: bool | None = None
        refused = False
        while taken is None:
            try:
                taken = await self._coalescer(settlement)
            except Exception as error:
                # A boundary: what went wrong is not the outcome's fault, so it is kept as it is.
                # Only one that can never be recorded gives way to one that can: its job must not
                # stay active for ever.
                if not refused:
                    refused = True
                    _logger.exception("Outcome refused by the ledger", extra=_names(settlement))
                if isinstance(error, UnstorableError):
                    settlement = _storable(settlement)
                await self._clock.sleep(self._reach.failed("settle", error))
        if not taken:
            self.lost_fence(settlement.claim)
        return taken

    def lost_fence(self, claim: Claim) -> None:
        """Note an outcome that was passed over."""
        self.fenced += 1
        _logger.warning(
            "Outcome not recorded: the job was taken from this worker",
            extra={"job": claim.id, "task": claim.task},
        )

    def cancel(self) -> None:
        """Give up what is not recorded yet."""
        self._coalescer.cancel()

    async def _record(self, settlements: Sequence[Settlement]) -> Sequence[bool]:
        tries = 0

        async def settle() -> Collection[str]:
            nonlocal tries
            tries += 1
            return await self._ledger.settle(settlements)

        taken = await self._reach.until_done("settle", settle)
        # What seemed to fail may have happened, and then the next try finds nothing to take.
        return [tries > 1 or settled.claim.id in taken for settled in settlements]


def _storable(settlement: Settlement) -> Settlement:
    if settlement.state is JobState.COMPLETED:
        error = JobError(code="result", message="the ledger cannot keep the result")
        return replace(settlement, state=JobState.FAILED, result=None, error=error)
    if settlement.error is None:
        return settlement
    plain = replace(settlement.error, message="the ledger cannot keep the error's message")
    return replace(settlement, error=plain)


def _names(settlement: Settlement) -> dict[str, object]:
    claim = settlement.claim
    return {"job": claim.id, "task": claim.task, "state": str(settlement.state)}
