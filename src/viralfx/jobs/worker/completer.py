"""Records the outcomes of jobs: in batches, and again until the ledger has stored them."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace

from viralfx.core.clock import default_rng
from viralfx.core.errors import LedgerLimitError, LedgerUnavailableError, UnstorableError
from viralfx.jobs.batching import Batcher
from viralfx.jobs.ledger import PartlyDoneError
from viralfx.jobs.model import Claim, JobError, JobState, Settlement
from viralfx.jobs.worker.context import WorkerContext
from viralfx.resilience.policy import Backoff, Jitter

_logger = logging.getLogger("viralfx.jobs")

_MAX_CALLS = 2
"""Calls of one queue at once, if the first one takes long."""

_MAX_ALONE = 2
"""Refused outcomes that are tried alone at the same time, and as many of locked jobs: the other
calls need connections, too."""

_BACKOFF = Backoff(base=0.1, factor=2.0, cap=5.0, jitter=Jitter.EQUAL)
"""Pauses before a refused outcome is tried again."""

_LOCK_RETRY_SECONDS = 0.5
"""The longest pause before the outcome of a locked job is tried again: it may be the stop."""

LARGE_RESULT_BYTES = 64 * 1024
"""Size from which a result may be the reason why the ledger ends calls at a limit. A smaller one
waits for a lock or for resources."""

_MAX_LIMIT_ERRORS = 3
"""Such calls after which a large result is given up."""

_MAX_LOGGED_JOBS = 20


class Completer:
    """Settles the claims of one worker.

    Outcomes of one queue share calls; those of other queues do not wait for them. If the ledger
    refuses a call, or ends it although it answers other calls, the batch is halved until the
    outcome that causes it is alone. That one is tried again without holding up any other, and
    without the task's last report. The outcome of a job that another session has locked is tried
    again alone, too; many of these do not hold up the refused ones. If it is a result that the
    ledger refuses, the job fails with code ``result``, provided that the ledger records this
    instead.
    """

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._batchers: defaultdict[str, Batcher[Settlement, bool | None]] = defaultdict(
            self._batcher
        )
        self._settling_alone: set[asyncio.Task[bool]] = set()
        self._refused_alone = asyncio.Semaphore(_MAX_ALONE)
        self._locked_alone = asyncio.Semaphore(_MAX_ALONE)
        self._rng = default_rng()
        self._pending: dict[tuple[str, int], tuple[Claim, float]] = {}
        """The outcomes that are not recorded yet, by job id and number of the claim: since when."""
        self._doubtful: set[tuple[str, int]] = set()
        """The pending outcomes of calls that failed, but may have taken effect."""
        self._reported: set[tuple[str, int]] = set()
        self.fenced = 0
        """Outcomes that the ledger skipped, because another worker had claimed their jobs."""

    def _batcher(self) -> Batcher[Settlement, bool | None]:
        return Batcher(
            self._record,
            size=_size,
            # A job that this worker lost and claimed again can have two outcomes at the same time.
            keys=lambda settlement: (settlement.claim.id,),
            max_calls=_MAX_CALLS,
        )

    async def settle(self, settlement: Settlement, *, released: bool = False) -> bool:
        """Return True once the ledger has recorded the outcome, False if it skipped it.

        ``released``: the job did not begin and may have another worker, so that is expected. Raises
        nothing but ``CancelledError``.
        """
        claim = settlement.claim
        key = claim.id, claim.number
        self._pending[key] = claim, self._context.clock.monotonic()
        try:
            recorded = await self._batchers[claim.queue](settlement)
            if recorded is None:
                recorded = await self._settle_locked(settlement)
        except Exception as error:  # noqa: BLE001 - any error of the ledger; the outcome is kept
            recorded = await self._settle_alone(settlement, error)
        finally:
            self._pending.pop(key, None)
            self._doubtful.discard(key)
            self._reported.discard(key)
        if not recorded and not released:
            self.record_fenced(claim)
        return recorded

    def record_fenced(self, claim: Claim) -> None:
        """Count and log an outcome that the ledger skipped."""
        self.fenced += 1
        _logger.warning(
            "Outcome not recorded: the job was taken from this worker",
            extra={"job": claim.id, "task": claim.task},
        )

    def unrecorded(self, longer_than: float) -> Sequence[Claim]:
        """Return the claims whose outcomes have waited for the ledger for so many seconds."""
        since = self._context.clock.monotonic() - longer_than
        return [claim for claim, settled_at in self._pending.values() if settled_at <= since]

    def report_unrecorded(self, longer_than: float) -> Sequence[Claim]:
        """Return the value of :meth:`unrecorded`, and log the ids of jobs that are new to it."""
        claims = self.unrecorded(longer_than)
        new = [claim for claim in claims if (claim.id, claim.number) not in self._reported]
        if new:
            self._reported.update((claim.id, claim.number) for claim in new)
            _logger.error(
                "Outcomes not recorded for longer than a lease",
                extra={
                    "count": len(claims),
                    "seconds": longer_than,
                    "jobs": [claim.id for claim in new[:_MAX_LOGGED_JOBS]],
                },
            )
        return claims

    def cancel(self) -> None:
        """Cancel all settlements that are not recorded yet."""
        for batcher in self._batchers.values():
            batcher.cancel()
        for task in self._settling_alone:
            task.cancel()

    # -- in batches --------------------------------------------------------------------------

    async def _record(self, settlements: Sequence[Settlement]) -> Sequence[bool | None]:
        """Record a batch; during an outage, when the ledger is available again. None: locked.

        Raises the ledger's error if the ledger answers other calls: then the batch is the reason.
        """
        availability, clock = self._context.availability, self._context.clock
        failed_at: float | None = None
        try:
            while True:
                began = clock.monotonic()
                try:
                    settled = await self._call(settlements)
                except LedgerUnavailableError as error:
                    now = clock.monotonic()
                    # An outage may have begun during this call, after an answer to another one.
                    alive_at = (began + now) / 2 if failed_at is None else failed_at
                    if availability.answered_since(alive_at):
                        raise
                    failed_at = now
                    await clock.sleep(availability.failed("settle", error))
                else:
                    availability.succeeded("settle")
                    return settled
        finally:
            availability.remove("settle")

    async def _call(self, settlements: Sequence[Settlement]) -> Sequence[bool | None]:
        keys = [(each.claim.id, each.claim.number) for each in settlements]
        locked: Collection[str] = ()
        try:
            settled = await self._context.ledger.settle(settlements)
        except PartlyDoneError as error:
            settled, locked = error.settled, error.left
            if error.doubtful:
                self._doubtful.update(key for key in keys if key[0] in locked)
        except LedgerUnavailableError:
            self._doubtful.update(keys)
            raise
        # A call that seemed to fail may have taken effect; then the next one settles nothing.
        return [
            None if key[0] in locked else key[0] in settled or key in self._doubtful for key in keys
        ]

    # -- alone -------------------------------------------------------------------------------

    async def _settle_alone(self, settlement: Settlement, error: Exception) -> bool:
        _logger.error(
            "Outcome refused by the ledger",
            exc_info=error,
            extra={**_names(settlement), "code": getattr(error, "code", None)},
        )
        return await self._begin_alone(settlement, locked=False)

    async def _settle_locked(self, settlement: Settlement) -> bool:
        _logger.warning("Outcome waits: another session locks the job", extra=_names(settlement))
        return await self._begin_alone(settlement, locked=True)

    async def _begin_alone(self, settlement: Settlement, *, locked: bool) -> bool:
        retrying = self._retry_alone(settlement, locked=locked)
        task = asyncio.create_task(retrying, name="settle-alone")
        self._settling_alone.add(task)
        task.add_done_callback(self._settling_alone.discard)
        return await task

    async def _retry_alone(self, settlement: Settlement, *, locked: bool) -> bool:
        availability, clock = self._context.availability, self._context.clock
        tries = limit_errors = 0
        failed_at = clock.monotonic()
        while True:
            async with self._locked_alone if locked else self._refused_alone:
                error: Exception | None = None
                try:
                    if (recorded := await self._call_with(settlement)) is not None:
                        return recorded
                except Exception as raised:  # noqa: BLE001 - any error of the ledger
                    error = raised
                locked = error is None
                # In an outage the result is not the reason.
                answered = availability.answered_since(failed_at)
                failed_at = clock.monotonic()
                limit_errors += answered and isinstance(error, LedgerLimitError)
                large = _size(settlement) >= LARGE_RESULT_BYTES
                too_much = large and limit_errors >= _MAX_LIMIT_ERRORS
                if isinstance(error, UnstorableError) and settlement.progress is not None:
                    # The report is the first to go: the outcome matters more.
                    settlement = settlement._replace(progress=None)
                    continue
                if error is not None and (isinstance(error, UnstorableError) or too_much):
                    # If the ledger refuses this as well, the content need not be the reason. Then
                    # both are tried again: no result is lost to an error that passes.
                    with suppress(Exception):
                        recorded = await self._call_with(_storable(settlement, error))
                        if recorded is not None:
                            return recorded
            tries += 1
            delay = _BACKOFF.delay(tries, self._rng)
            await clock.sleep(min(delay, _LOCK_RETRY_SECONDS) if locked else delay)

    async def _call_with(self, settlement: Settlement) -> bool | None:
        (recorded,) = await self._call([settlement])
        return recorded


def _size(settlement: Settlement) -> int:
    return len(settlement.result or b"")


def _storable(settlement: Settlement, error: Exception) -> Settlement:
    """Return an outcome in place of one that the ledger refuses with ``error``."""
    if settlement.state is JobState.COMPLETED:
        message = f"the result of {_size(settlement)} bytes cannot be stored: {error}"
        failure = JobError(code="result", message=message)
        return settlement._replace(
            state=JobState.FAILED, result=None, error=failure, spends_attempt=True
        )
    if settlement.error is None:
        return settlement
    message = "the ledger cannot keep the error's message"
    plain = replace(settlement.error, message=message, traceback=None)
    return settlement._replace(error=plain)


def _names(settlement: Settlement) -> dict[str, object]:
    claim = settlement.claim
    return {"job": claim.id, "task": claim.task, "state": str(settlement.state)}
