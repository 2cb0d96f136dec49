"""Decides after a failed attempt: the policy, then deadline, budget and other limits."""

import logging
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

from viralfx.core.clock import Clock
from viralfx.core.events import Listener, Relay, notify
from viralfx.resilience._callables import leaves, maybe_applied
from viralfx.resilience.breaker import CircuitOpenError
from viralfx.resilience.deadline import time_left
from viralfx.resilience.policy import RetryBudget, RetryPolicy

_logger = logging.getLogger("viralfx.resilience")

_NOTE = "gave up after "


class GiveUpReason(StrEnum):
    """Reason for giving up."""

    ATTEMPTS = "attempts"
    """The policy allows no more attempts."""
    PERMANENT = "permanent"
    """The policy does not retry this error."""
    DEADLINE = "deadline"
    """The wait would end after the deadline."""
    BUDGET = "budget"
    """The retry budget of the dependency is exhausted."""
    CIRCUIT_OPEN = "circuit_open"
    """A circuit breaker rejected the call, and ``retry_open_circuit`` is not set."""
    MAYBE_APPLIED = "maybe_applied"
    """The operation may have taken effect and is not declared idempotent."""
    WOULD_BLOCK = "would_block"
    """The wait of a plain function would block the event loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptFailed:
    """Event: an attempt failed. ``delay`` is the wait in seconds, None if there is no retry."""

    name: str
    attempt: int
    delay: float | None
    error: Exception


@dataclass(frozen=True, slots=True, kw_only=True)
class GaveUp:
    """Event: no further attempt; the error is raised.

    ``elapsed`` is in seconds from the start of the call. If the call began before there was a
    listener, its start is unknown and ``elapsed`` counts from the first failure.
    """

    name: str
    attempts: int
    elapsed: float
    reason: GiveUpReason
    error: Exception


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetExhausted:
    """Event: the retry budget does not allow a retry that the policy allows."""

    name: str


RetryEvent: TypeAlias = AttemptFailed | GaveUp | BudgetExhausted


class RetryRelay(Relay[RetryEvent]):
    """Forwards the events of several retriers."""


_global_listeners: tuple[Listener[RetryEvent], ...] = ()


def listen_to_retries(listener: Listener[RetryEvent]) -> None:
    """Call ``listener`` with the events of every retrier of the process.

    Adding the same listener twice has no effect.
    """
    global _global_listeners  # noqa: PLW0603 - retriers may exist before this call
    if listener not in _global_listeners:
        _global_listeners = (*_global_listeners, listener)
        for decider in tuple(_deciders):
            decider.needs_start.append(listener)


_REASON_TEXTS = {
    GiveUpReason.DEADLINE: ": the next would start after the deadline",
    GiveUpReason.BUDGET: ": the retry budget is spent",
    GiveUpReason.MAYBE_APPLIED: ": it may have been applied and is not declared idempotent",
    GiveUpReason.WOULD_BLOCK: ": waiting would block the event loop (call it in a thread)",
}


@dataclass(slots=True, kw_only=True, eq=False, weakref_slot=True)
class Decider:
    """Combines the policy with the limits of the caller. It keeps no state of a call."""

    policy: RetryPolicy
    clock: Clock
    budget: RetryBudget | None
    idempotent: bool
    retry_open_circuit: bool
    listeners: Sequence[Listener[RetryEvent]]
    needs_start: list[object] = field(init=False)
    """The budget and the listeners, which need the start time of a call.

    The list object never changes, so a call reads it without an attribute look-up.
    """

    def __post_init__(self) -> None:
        """Register the decider for :func:`listen_to_retries`."""
        budget = () if self.budget is None else (self.budget,)
        self.needs_start = [*budget, *self.listeners, *_global_listeners]
        _deciders.add(self)

    def subscribe(self, listener: Listener[RetryEvent]) -> None:
        """Call ``listener`` with every further event."""
        self.listeners = (*self.listeners, listener)
        self.needs_start.append(listener)

    def next_delay(
        self,
        name: str,
        attempt: int,
        error: Exception,
        *,
        started: float | None,
        failed_at: float,
        may_wait: bool = True,
    ) -> float | None:
        """Return the delay in seconds and charge the budget; None to give up.

        ``started`` is the start time of the call, None if it was not measured; ``failed_at`` is
        the time of its first failure. When giving up, a note is added to the error: the number of
        attempts, the seconds since the first failure, and the reason.
        """
        delay, reason = self._decide(attempt, error, may_wait=may_wait)
        listeners = (*self.listeners, *_global_listeners)
        if listeners:
            notify(listeners, AttemptFailed(name=name, attempt=attempt, delay=delay, error=error))
        if reason is None:
            return delay
        now = self.clock.monotonic()
        if attempt > 1 or reason in _REASON_TEXTS:
            _annotate(error, attempt, now - failed_at, reason)
        if listeners:
            if reason is GiveUpReason.BUDGET:
                notify(listeners, BudgetExhausted(name=name))
            elapsed = now - (failed_at if started is None else started)
            notify(
                listeners,
                GaveUp(name=name, attempts=attempt, elapsed=elapsed, reason=reason, error=error),
            )
        return None

    def _decide(
        self, attempt: int, error: Exception, *, may_wait: bool
    ) -> tuple[float | None, GiveUpReason | None]:
        is_open = any(isinstance(each, CircuitOpenError) for each in leaves(error))
        rejected = is_open and not self.retry_open_circuit
        delay = None if rejected else self._ask(attempt, error)
        if rejected:
            reason = GiveUpReason.CIRCUIT_OPEN
        elif delay is None:
            # None has two meanings. A policy has no state, so asking it about the first attempt
            # shows which one applies.
            permanent = self._ask(1, error) is None
            reason = GiveUpReason.PERMANENT if permanent else GiveUpReason.ATTEMPTS
        elif not self.idempotent and maybe_applied(error):
            reason = GiveUpReason.MAYBE_APPLIED
        elif delay >= time_left():
            reason = GiveUpReason.DEADLINE
        elif delay > 0 and not may_wait:
            reason = GiveUpReason.WOULD_BLOCK
        # Last, because it charges the budget: only for a retry that will be made, and before the
        # wait, so that a waiting call keeps its share.
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
            # A boundary: the caller gets the operation's error, not the policy's.
            _logger.exception("Retry policy failed", extra={"policy": policy})
            return None
        if delay is not None and not 0 <= delay < math.inf:
            _logger.error("Retry policy gave no delay", extra={"policy": policy, "delay": delay})
            return None
        return delay


_deciders: weakref.WeakSet[Decider] = weakref.WeakSet()


def _annotate(error: Exception, attempts: int, seconds: float, reason: GiveUpReason) -> None:
    times = "1 attempt"
    if attempts > 1:
        times = f"{attempts} attempts, {seconds:.1f} s after the first failure"
    notes: list[str] = getattr(error, "__notes__", [])
    # An error object that is raised repeatedly must not accumulate notes.
    notes[:] = [note for note in notes if not note.startswith(_NOTE)]
    error.add_note(f"{_NOTE}{times}{_REASON_TEXTS.get(reason, '')}")
