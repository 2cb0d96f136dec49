"""After a failed attempt: what the policy says, and what forbids it all the same."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from viralfx.domain.clock import Clock
from viralfx.domain.events import Listener, Relay, notify
from viralfx.domain.resilience.budget import RetryBudget
from viralfx.domain.resilience.circuit import CircuitOpenError
from viralfx.domain.resilience.deadline import time_left
from viralfx.domain.resilience.failures import maybe_applied
from viralfx.domain.resilience.retry_policy import RetryPolicy

_logger = logging.getLogger("viralfx.resilience")

_NOTE = "gave up after "


class GiveUpReason(StrEnum):
    """Why there is no further attempt."""

    ATTEMPTS = "attempts"
    """The policy allows no more of them."""
    PERMANENT = "permanent"
    """The policy would not retry this error at all."""
    DEADLINE = "deadline"
    """The wait would end after the deadline."""
    BUDGET = "budget"
    """The dependency's retry budget is spent."""
    CIRCUIT_OPEN = "circuit_open"
    """The call was rejected by a breaker, and nobody asked to wait for it."""
    MAYBE_APPLIED = "maybe_applied"
    """It may have taken effect, and is not declared idempotent."""
    WOULD_BLOCK = "would_block"
    """A plain function would have had to block the event loop to wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptFailed:
    """Event: an attempt failed; ``delay`` seconds until the next, None when there is none."""

    name: str
    attempt: int
    delay: float | None
    error: Exception


@dataclass(frozen=True, slots=True, kw_only=True)
class GaveUp:
    """Event: the caller gets the error."""

    name: str
    attempts: int
    elapsed: float
    reason: GiveUpReason
    error: Exception


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetExhausted:
    """Event: a retry that the policy allows is not made, for the sake of the dependency."""

    name: str


RetryEvent: TypeAlias = AttemptFailed | GaveUp | BudgetExhausted


class RetryRelay(Relay[RetryEvent]):
    """Passes on what happens in several retriers, which may come and go."""


_everywhere: tuple[Listener[RetryEvent], ...] = ()


def listen_to_retries(listener: Listener[RetryEvent]) -> None:
    """Call ``listener`` with the events of every retrier of the process; doing it twice is once."""
    global _everywhere  # noqa: PLW0603 - retriers are made anywhere, also before this is called
    if listener not in _everywhere:
        _everywhere = (*_everywhere, listener)


_WHY = {
    GiveUpReason.DEADLINE: ": the next would start after the deadline",
    GiveUpReason.BUDGET: ": the retry budget is spent",
    GiveUpReason.MAYBE_APPLIED: ": it may have been applied and is not declared idempotent",
    GiveUpReason.WOULD_BLOCK: ": waiting would block the event loop (call it in a thread)",
}


@dataclass(slots=True, kw_only=True)
class Decider:
    """Joins the policy's answer with what only the caller's side knows. Keeps nothing of a call."""

    policy: RetryPolicy
    clock: Clock
    budget: RetryBudget | None
    idempotent: bool
    retry_open_circuit: bool
    listeners: Sequence[Listener[RetryEvent]]

    def next_delay(
        self, name: str, attempt: int, error: Exception, *, started: float, may_wait: bool = True
    ) -> float | None:
        """Return the seconds until the next attempt, paid for from the budget; None to give up.

        Giving up leaves a note on the error that says after how many attempts and why.
        """
        delay, reason = self._decide(attempt, error, may_wait=may_wait)
        listeners = (*self.listeners, *_everywhere)
        if listeners:
            notify(listeners, AttemptFailed(name=name, attempt=attempt, delay=delay, error=error))
        if reason is None:
            return delay
        elapsed = self.clock.monotonic() - started
        if attempt > 1 or reason in _WHY:
            _annotate(error, attempt, elapsed, reason)
        if listeners:
            if reason is GiveUpReason.BUDGET:
                notify(listeners, BudgetExhausted(name=name))
            notify(
                listeners,
                GaveUp(name=name, attempts=attempt, elapsed=elapsed, reason=reason, error=error),
            )
        return None

    def _decide(
        self, attempt: int, error: Exception, *, may_wait: bool
    ) -> tuple[float | None, GiveUpReason | None]:
        rejected = isinstance(error, CircuitOpenError) and not self.retry_open_circuit
        delay = None if rejected else self._ask(attempt, error)
        if rejected:
            reason = GiveUpReason.CIRCUIT_OPEN
        elif delay is None:
            # The port says no more than None; a pure policy can be asked about a first attempt.
            permanent = self._ask(1, error) is None
            reason = GiveUpReason.PERMANENT if permanent else GiveUpReason.ATTEMPTS
        elif not self.idempotent and maybe_applied(error):
            reason = GiveUpReason.MAYBE_APPLIED
        elif delay >= time_left():
            reason = GiveUpReason.DEADLINE
        elif delay > 0 and not may_wait:
            reason = GiveUpReason.WOULD_BLOCK
        # Last, because it charges: only a retry that will be made is paid for, and before the
        # wait, so that those who wait have their turn paid when they wake.
        elif self.budget is not None and not self.budget.withdraw(self.clock.monotonic()):
            reason = GiveUpReason.BUDGET
        else:
            return delay, None
        return None, reason

    def _ask(self, attempt: int, error: Exception) -> float | None:
        policy = type(self.policy).__name__
        try:
            delay = self.policy.next_delay(attempt, error)
        except Exception:
            # A boundary: the caller is owed the operation's error, not that of a policy.
            _logger.exception("Retry policy failed", extra={"policy": policy})
            return None
        if delay is not None and not 0 <= delay < math.inf:
            _logger.error("Retry policy gave no delay", extra={"policy": policy, "delay": delay})
            return None
        return delay


def _annotate(error: Exception, attempts: int, elapsed: float, reason: GiveUpReason) -> None:
    times = "1 attempt" if attempts == 1 else f"{attempts} attempts"
    notes: list[str] = getattr(error, "__notes__", [])
    # An error object that is raised again and again must not collect notes for ever.
    notes[:] = [note for note in notes if not note.startswith(_NOTE)]
    error.add_note(f"{_NOTE}{times} in {elapsed:.1f} s{_WHY.get(reason, '')}")
