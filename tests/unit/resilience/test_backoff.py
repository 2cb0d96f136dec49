"""The back-off schedule."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viralfx.resilience.policy import Backoff, Jitter

RNG = random.Random(3)  # noqa: S311 - spreads load only


def test_the_documented_schedule() -> None:
    """Three attempts have two waits, of one and two seconds."""
    assert Backoff(base=1.0).delays(3) == (1.0, 2.0)
    assert Backoff().delays(8) == (1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0)
    assert Backoff().delays(1) == ()


def test_the_maximum_of_decorrelated_jitter_triples() -> None:
    """The factor is not used."""
    backoff = Backoff(base=1.0, factor=2.0, cap=20.0, jitter=Jitter.DECORRELATED)
    assert backoff.delays(5) == (3.0, 9.0, 20.0, 20.0)


def test_any_number_of_attempts_has_a_delay() -> None:
    """An overflow gives the cap; a base of zero gives zero."""
    assert Backoff().longest(100_000) == 30.0
    assert Backoff(base=0.0).longest(100_000) == 0.0


def test_a_late_attempt_costs_no_more_than_an_early_one() -> None:
    """A retry without limit draws no more numbers with each attempt."""

    class Counting(random.Random):
        draws = 0

        def uniform(self, a: float, b: float) -> float:
            self.draws += 1
            return super().uniform(a, b)

    backoff = Backoff(base=1.0, cap=30.0, jitter=Jitter.DECORRELATED)
    early, late = Counting(1), Counting(1)
    assert 1.0 <= backoff.delay(1_000, early) <= 30.0
    assert 1.0 <= backoff.delay(100_000, late) <= 30.0
    assert late.draws == early.draws


def test_without_jitter_the_delay_is_the_schedule() -> None:
    """Exactly."""
    assert [Backoff(base=0.5, cap=1.5).delay(n, RNG) for n in (1, 2, 3)] == [0.5, 1.0, 1.5]


@given(
    base=st.floats(0, 100),
    factor=st.floats(1, 10),
    extra=st.floats(0, 1000),
    jitter=st.sampled_from(Jitter),
    attempt=st.integers(1, 2000),
)
def test_delays_are_between_zero_and_the_maximum(
    base: float, factor: float, extra: float, jitter: Jitter, attempt: int
) -> None:
    """The maximum does not exceed the cap and never decreases."""
    backoff = Backoff(base=base, factor=factor, cap=base + extra, jitter=jitter)
    longest = backoff.longest(attempt)
    assert 0 <= backoff.delay(attempt, RNG) <= longest * (1 + 1e-12)
    assert longest <= backoff.cap
    assert longest <= backoff.longest(attempt + 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base": -1.0}, "base must be zero or more and finite"),
        ({"base": math.nan}, "base must be zero or more and finite"),
        ({"base": math.inf, "cap": math.inf}, "base must be zero or more and finite"),
        ({"cap": math.inf}, "cap must be zero or more and finite"),
        ({"base": 31.0}, r"cap must be at least base \(31.0\), got 30.0"),
        ({"factor": 0.5}, "factor must be one or more and finite"),
        ({"factor": math.inf}, "factor must be one or more and finite"),
        ({"jitter": "some"}, "'some' is not a valid Jitter"),
    ],
)
def test_an_invalid_schedule_is_rejected(arguments: dict[str, object], message: str) -> None:
    """The ValueError names the allowed values."""
    with pytest.raises(ValueError, match=message):
        Backoff(**arguments)  # type: ignore[arg-type]  # one argument at a time


def test_a_jitter_can_be_a_string() -> None:
    """For settings and saved data."""
    assert Backoff(jitter="full").jitter is Jitter.FULL  # type: ignore[arg-type]  # the point
