"""The breaker against a model of its rules, under every interleaving that can be found.

Callers are coroutines stepped by hand, so that any of them can be left hanging, end late or be
cancelled at any moment, without an event loop. ``FUZZ_EXAMPLES`` sets how many runs are made.
"""

import asyncio
import os
from collections.abc import Coroutine, Generator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.manual_clock import ManualClock
from tests.unit.resilience.scripted import BackendError

from viralfx.resilience.breaker import CircuitBreaker, CircuitOpenError

OPEN_FOR, LEASE = 60.0, 10.0


class UnlistedError(Exception):
    """A neutral error."""


class Backend:
    """Suspends each caller until the machine resumes it."""

    def __init__(self) -> None:
        self.calls = 0

    async def __call__(self) -> object:
        """Reach the backend and wait there."""
        self.calls += 1
        return await self

    def __await__(self) -> Generator[None, object, object]:
        """Wait for what the machine sends or throws."""
        return (yield)


@dataclass
class Caller:
    """A call in progress and its state in the model."""

    coroutine: Coroutine[Any, Any, object]
    generation: int
    started: float
    probing: bool
    revoked: bool = False


class BreakerMachine(RuleBasedStateMachine):
    """Drives a breaker and a model of it through the same steps."""

    @initialize(threshold=st.integers(1, 3), permits=st.integers(1, 3))
    def create(self, threshold: int, permits: int) -> None:
        """Start in the closed state."""
        self.clock = ManualClock(monotonic=0.0)
        self.breaker = CircuitBreaker(
            threshold,
            OPEN_FOR,
            probe_lease=LEASE,
            half_open_max_calls=permits,
            failure_on=BackendError,
            clock=self.clock,
        )
        self.backend = Backend()
        self.decorated = self.breaker(self.backend.__call__)
        self.threshold, self.permits = threshold, permits
        self.state, self.failures, self.successes = "CLOSED", 0, 0
        self.until = self.generation = 0.0
        self.callers: list[Caller] = []

    # -- the model ---------------------------------------------------------------------------

    def enter(self, state: str) -> None:
        """Begin a new state, so that calls in progress no longer count."""
        self.state, self.successes = state, 0
        self.generation += 1
        if state == "OPEN":
            self.until = self.clock.monotonic() + OPEN_FOR
        elif state == "CLOSED":
            self.failures = 0

    def probes(self) -> list[Caller]:
        """Return the callers that have a permit of the current state."""
        return [c for c in self.callers if c.probing and not c.revoked and self.counts(c)]

    def counts(self, caller: Caller) -> bool:
        """Return whether the outcome of a caller counts."""
        return caller.generation == self.generation and not caller.revoked

    def expect_admission(self) -> bool:
        """Return whether the rules admit the next call."""
        now = self.clock.monotonic()
        if self.state == "OPEN" and now >= self.until:
            self.enter("HALF_OPEN")
        if self.state == "HALF_OPEN":
            for probe in self.probes():
                probe.revoked = now >= probe.started + LEASE
            return len(self.probes()) + self.successes < self.permits
        return self.state == "CLOSED"

    # -- the steps ---------------------------------------------------------------------------

    @rule(form=st.sampled_from(["execute", "decorator", "guard"]))
    def call(self, form: str) -> None:
        """Start a call: it hangs in the backend or is rejected."""
        admitted, before = self.expect_admission(), self.backend.calls
        coroutine = {
            "execute": lambda: self.breaker.execute(self.backend),
            "decorator": self.decorated,
            "guard": self.guarded,
        }[form]()
        if admitted:
            coroutine.send(None)
            now, probing = self.clock.monotonic(), self.state == "HALF_OPEN"
            self.callers.append(Caller(coroutine, int(self.generation), now, probing))
        else:
            with pytest.raises(CircuitOpenError) as rejected:
                coroutine.send(None)
            assert rejected.value.retry_after > 0
        assert self.backend.calls == before + admitted

    async def guarded(self) -> object:
        """Call the backend in a ``with`` block."""
        with self.breaker.guard():
            return await self.backend()

    @precondition(lambda self: self.callers)
    @rule(data=st.data(), outcome=st.sampled_from(["ok", "fail", "neutral", "cancel", "close"]))
    def end(self, data: st.DataObject, outcome: str) -> None:
        """End a call in progress, in time or late."""
        caller = data.draw(st.sampled_from(self.callers))
        counts = self.counts(caller)
        self.callers.remove(caller)
        if outcome == "ok":
            with pytest.raises(StopIteration) as returned:
                caller.coroutine.send("result")
            assert returned.value.value == "result"
        elif outcome == "close":
            caller.coroutine.close()
        else:
            error = {
                "fail": BackendError(),
                "neutral": UnlistedError(),
                "cancel": asyncio.CancelledError(),
            }[outcome]
            with pytest.raises(type(error)) as raised:
                caller.coroutine.throw(error)
            assert raised.value is error
        if counts and outcome == "ok":
            self.succeed()
        elif counts and outcome == "fail":
            self.fail()

    def succeed(self) -> None:
        """Apply a success to the model."""
        if self.state == "CLOSED":
            self.failures = 0
            return
        self.successes += 1
        if self.successes == self.permits:
            self.enter("CLOSED")

    def fail(self) -> None:
        """Apply a failure to the model."""
        if self.state == "CLOSED":
            self.failures += 1
        if self.state == "HALF_OPEN" or self.failures >= self.threshold:
            self.enter("OPEN")

    @rule(seconds=st.sampled_from([0.5, 5.0, 9.5, 10.0, 59.5, 60.0, 61.0]))
    def wait(self, seconds: float) -> None:
        """Advance time; half seconds make leases and periods end at the same moment."""
        self.clock._monotonic += seconds

    @rule(command=st.sampled_from(["open", "close"]))
    def command(self, command: str) -> None:
        """Open, close or reset the circuit manually."""
        getattr(self.breaker, command)()
        self.enter("OPEN" if command == "open" else "CLOSED")
        if command == "open":
            self.until = float("inf")

    @rule()
    def restart(self) -> None:
        """Save and restore the state; calls in progress are dropped."""
        saved = self.breaker.snapshot()
        shown = self.breaker.get_state()
        self.breaker.restore(saved)
        assert self.breaker.get_state() == shown
        assert self.breaker.snapshot() == saved
        # A half-open circuit is restored as an open one whose period has ended.
        state, failures, until = self.state, self.failures, self.until
        self.enter("OPEN" if state == "HALF_OPEN" else state)
        self.failures = failures
        self.until = self.clock.monotonic() if state == "HALF_OPEN" else until

    # -- what always holds -------------------------------------------------------------------

    @invariant()
    def agrees(self) -> None:
        """Compare the breaker with the model."""
        over = self.state == "OPEN" and self.clock.monotonic() >= self.until
        state = "HALF_OPEN" if over else self.state
        assert self.breaker.get_state() == {"state": state, "failureCount": self.failures}

    def teardown(self) -> None:
        """After the longest wait, a call passes and successes close the circuit."""
        if not hasattr(self, "breaker"):
            return
        if self.state == "OPEN" and self.until == float("inf"):
            self.command("close")
        self.wait(OPEN_FOR + LEASE)
        for _ in range(self.permits):
            before = len(self.callers)
            self.call("execute")
            assert len(self.callers) == before + 1
            caller = self.callers.pop()
            with pytest.raises(StopIteration):
                caller.coroutine.send(None)
            self.succeed()
        assert self.breaker.get_state() == {"state": "CLOSED", "failureCount": 0}
        for caller in self.callers:
            caller.coroutine.close()


BreakerMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "60")),
    stateful_step_count=40,
    deadline=None,
)
TestBreakerMachine = BreakerMachine.TestCase
