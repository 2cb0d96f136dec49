"""Jobs over which workers died before: one at a time, so that they take no others with them."""

import asyncio
import random
from collections.abc import Callable

from viralfx.domain.clock import Clock
from viralfx.domain.jobs.job import Claim, JobState, Settlement

SUSPECT_CRASHES = 2
"""Crashes from which a job is suspected to cause them; one may have happened beside it."""

_PAUSE = 0.5
"""Seconds, and up to twice as many, until a suspect that found no place is due again."""


def is_suspect(claim: Claim) -> bool:
    """Tell whether workers may have died because of this job."""
    return claim.crashes >= SUSPECT_CRASHES


class Suspects:
    """Lets one suspect run at a time, and only while the worker has no other.

    When a worker dies, everything it has counts a crash. The suspects it does not run must not be
    among that: they are given back first.
    """

    def __init__(self, clock: Clock, rng: random.Random | None = None) -> None:
        self._clock = clock
        self._rng = rng or random.Random()  # noqa: S311 - it spreads load only
        self._holder: object | None = None
        self._leaving = 0
        self._due: dict[str, tuple[float, Callable[[float], None]]] = {}
        """When each that was given back is due again, by its id, and who is told."""
        self._alone = asyncio.Event()
        self._alone.set()

    def enter(self, who: object) -> bool:
        """Take the place, if it is free."""
        if self._holder is not None:
            return False
        self._holder = who
        return True

    def leave(self, who: object) -> None:
        """Free the place, if it is still taken by just this one."""
        if self._holder is who:
            self._holder = None
            self._tell()

    def defer(self, claim: Claim) -> Settlement:
        """Let a suspect that found no place wait again; tell :meth:`deferred` when that is done."""
        self._leaving += 1
        self._alone.clear()
        delay = self._rng.uniform(_PAUSE, 2 * _PAUSE)
        return Settlement(claim=claim, state=JobState.WAITING, delay=delay)

    def deferred(self, deferral: Settlement, on_wait: Callable[[float], None]) -> None:
        """Note that a suspect has left.

        When the place is free, ``on_wait`` is called with the seconds after which the suspect is
        due: the next one need not wait for a look.
        """
        self._leaving -= 1
        if not self._leaving:
            self._alone.set()
        due = self._clock.monotonic() + (deferral.delay or 0.0)
        self._due[deferral.claim.id] = due, on_wait
        if self._holder is None:
            self._tell()

    def _tell(self) -> None:
        now, told = self._clock.monotonic(), self._due
        self._due = {}
        for due, on_wait in told.values():
            on_wait(max(0.0, due - now))

    async def alone(self) -> None:
        """Return once no other suspect is here."""
        # Those of the same claim begin in the same turn of the loop.
        await self._clock.sleep(0)
        await self._alone.wait()
