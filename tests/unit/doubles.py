"""Implementations of the ports whose behaviour a test sets."""

import asyncio
from enum import Enum
from typing import cast

from viralfx.core.clock import Clock
from viralfx.domain.health.model import Observation, Status

LATE = "an answer after the attempt was cancelled"


class Act(Enum):
    """Behaviour of a check or stage when it is called."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"
    RAISE = "raise"
    CANCEL_ITSELF = "cancel itself"
    RETURN_NOTHING = "return nothing"
    HANG = "hang"
    SWALLOW = "swallow cancellation"
    SLOW = "take its time"


class BrokenError(Exception):
    """The error that the doubles raise."""


class ActingCheck:
    """Health check that behaves as :attr:`act` says when an attempt starts."""

    def __init__(self, act: Act = Act.PASS, *, clock: Clock | None = None) -> None:
        self.act = act
        self.seconds = 1.0
        """Duration of a slow attempt in seconds."""
        self.attempts = 0
        self.outstanding = 0
        self.most_outstanding = 0
        self.begun_at: list[float] = []
        self._clock = clock
        self._released = asyncio.Event()

    def release(self) -> None:
        """Let attempts that hang or swallow their cancellation answer."""
        self._released.set()
        self._released = asyncio.Event()

    async def check(self) -> Observation:
        """Behave as :attr:`act` says."""
        self.attempts += 1
        self.outstanding += 1
        self.most_outstanding = max(self.most_outstanding, self.outstanding)
        if self._clock is not None:
            self.begun_at.append(self._clock.monotonic())
        try:
            return await self._act(self.act)
        finally:
            self.outstanding -= 1

    async def _act(self, act: Act) -> Observation:
        match act:
            case Act.RAISE:
                raise BrokenError("secret: hunter2")
            case Act.CANCEL_ITSELF:
                raise asyncio.CancelledError
            case Act.RETURN_NOTHING:
                return cast("Observation", None)
            case Act.HANG:
                await self._released.wait()
            case Act.SWALLOW:
                if await swallow_cancellation(self._released):
                    return Observation(status=Status.PASS, message=LATE)
            case Act.SLOW:
                assert self._clock is not None
                await self._clock.sleep(self.seconds)
        status = {Act.WARN: Status.WARN, Act.FAIL: Status.FAIL}.get(act, Status.PASS)
        return observed(status)


def observed(status: Status, code: str | None = None) -> Observation:
    """Return an observation whose message and details contain its status."""
    return Observation(
        status=status,
        message=f"it is a {status}",
        details={"is": str(status)},
        code=code or (f"code-{status}" if status is not Status.PASS else None),
    )


async def swallow_cancellation(released: asyncio.Event) -> bool:
    """Wait for the event; return whether a cancellation was suppressed."""
    swallowed = False
    while not released.is_set():
        try:
            await released.wait()
        except asyncio.CancelledError:
            swallowed = True
    return swallowed


class ActingStage:
    """Shutdown stage with a set behaviour that records its calls and budgets."""

    def __init__(
        self,
        act: Act = Act.PASS,
        *,
        clock: Clock,
        name: str = "",
        seconds: float = 1.0,
        journal: list[str] | None = None,
    ) -> None:
        self.act = act
        self.name = name
        self.seconds = seconds
        self.began_at: list[float] = []
        self.budgets: list[float] = []
        self.ended_at: list[float] = []
        self._clock = clock
        self._journal = journal
        self._released = asyncio.Event()

    def release(self) -> None:
        """Let a run that hangs or swallows its cancellation end."""
        self._released.set()

    async def run(self, budget: float) -> None:
        """Record the call, then behave as :attr:`act` says."""
        self.began_at.append(self._clock.monotonic())
        self.budgets.append(budget)
        if self._journal is not None:
            self._journal.append(self.name)
        try:
            await self._act()
        finally:
            self.ended_at.append(self._clock.monotonic())

    async def _act(self) -> None:
        match self.act:
            case Act.RAISE:
                raise BrokenError("a stage failed")
            case Act.CANCEL_ITSELF:
                raise asyncio.CancelledError
            case Act.HANG:
                await self._released.wait()
            case Act.SWALLOW:
                await swallow_cancellation(self._released)
            case Act.SLOW:
                await self._clock.sleep(self.seconds)
