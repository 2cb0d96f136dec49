"""Isolates poison jobs: each runs alone, so that a crash takes no other poison job with it."""

import asyncio
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from viralfx.core.clock import Clock, default_rng
from viralfx.jobs.model import Claim, JobState, Settlement, handed_back
from viralfx.jobs.worker.execution import Executor
from viralfx.jobs.worker.running import Execution

QUARANTINE_CRASHES = 2
"""Crashes from which a job counts as poison; a single one may have been caused by another job."""

_DEFER_SECONDS = 0.5
"""Time, and up to twice as much, after which a deferred poison job is due again."""

ISOLATION_SECONDS = 0.25
"""Time from the start of a poison job in which its worker claims no other job. Most crash at once,
and until a job that is claimed meanwhile has been given back, a crash counts for it, too."""


def may_be_poison(claim: Claim) -> bool:
    """Return True if this job may have crashed its workers."""
    return claim.crashes >= QUARANTINE_CRASHES


class PoisonJobQuarantine:
    """Lets a worker run one poison job at a time, and hold no other one meanwhile.

    A crash of the worker counts for every job that it holds. Therefore the other poison jobs are
    given back to the ledger before one of them starts, those of claims that run included.
    """

    def __init__(self, clock: Clock, rng: random.Random | None = None) -> None:
        self._clock = clock
        self._rng = rng or default_rng()
        self._holder: object | None = None
        self._deferring = 0
        self._deferred: dict[str, tuple[float, Callable[[float], None]]] = {}
        """Due time and callback of each deferred job, by its id."""
        self._alone = asyncio.Event()
        self._alone.set()
        self._claims = 0
        self._no_claim = asyncio.Event()
        self._no_claim.set()
        self._isolated_until = -math.inf
        self._listeners: list[Callable[[], None]] = []

    def subscribe(self, on_change: Callable[[], None]) -> None:
        """Call ``on_change`` whenever :meth:`isolated_for` changes otherwise than by the time."""
        self._listeners.append(on_change)

    def isolated_for(self) -> float:
        """Return the seconds in which this worker may claim no job; infinite: until a change."""
        return max(0.0, self._isolated_until - self._clock.monotonic())

    @contextmanager
    def claiming(self) -> Iterator[None]:
        """Let no poison job start before the jobs of the claim in the block are known."""
        self._claims += 1
        self._no_claim.clear()
        try:
            yield
        finally:
            self._claims -= 1
            if not self._claims:
                self._no_claim.set()

    def _isolate(self, seconds: float) -> None:
        self._isolated_until = self._clock.monotonic() + seconds
        for on_change in self._listeners:
            on_change()

    def try_acquire(self, holder: object) -> bool:
        """Reserve the quarantine for ``holder``; return False if it is taken."""
        if self._holder is not None:
            return False
        self._holder = holder
        self._isolate(math.inf)
        return True

    def release(self, holder: object) -> None:
        """End the reservation, if ``holder`` has it."""
        if self._holder is holder:
            self._holder = None
            self._isolate(-math.inf)
            self._announce_deferred()

    def defer(self, claim: Claim) -> Settlement:
        """Return the settlement that gives a job back; call :meth:`deferred` after recording it."""
        self._deferring += 1
        self._alone.clear()
        delay = self._rng.uniform(_DEFER_SECONDS, 2 * _DEFER_SECONDS)
        return Settlement(claim=claim, state=JobState.WAITING, delay=delay)

    def deferred(self, deferral: Settlement, on_due: Callable[[float], None]) -> None:
        """Record that a job was given back.

        Once the quarantine is free, ``on_due`` is called with the seconds until the job is due, so
        that the worker can claim it without waiting for the next poll.
        """
        self._deferring -= 1
        if not self._deferring:
            self._alone.set()
        due = self._clock.monotonic() + (deferral.delay or 0.0)
        self._deferred[deferral.claim.id] = due, on_due
        if self._holder is None:
            self._announce_deferred()

    def _announce_deferred(self) -> None:
        now, deferred = self._clock.monotonic(), self._deferred
        self._deferred = {}
        for due, on_due in deferred.values():
            on_due(max(0.0, due - now))

    async def execute_alone(self, execution: Execution, executor: Executor) -> Settlement | None:
        """Execute a job once the worker has given back all other poison jobs."""
        try:
            await self._no_claim.wait()
            # Jobs of a claim call defer() in the same turn of the loop.
            await self._clock.sleep(0)
            await self._alone.wait()
            self._isolate(ISOLATION_SECONDS)
            return await executor.execute(execution)
        except asyncio.CancelledError:
            if execution.cancelling:
                return executor.cancelled(execution)
            if execution.handing_back:
                return handed_back(execution.claim)
            raise
