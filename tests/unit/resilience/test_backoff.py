"""The back-off as data."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viralfx.domain.resilience.backoff import Backoff, Jitter

RNG = random.Random(3)  # noqa: S311 - spreads load only


def test_the_guides_schedule() -> None:
    """Three attempts have two waits, of one and two seconds."""
    assert Backoff(base=1.0).delays(3) == (1.0, 2.0)
    assert Backoff().delays(8) == (1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0)
    assert Backoff().delays(1) == ()


def test_the_longest_of_a_decorrelated_schedule_grows_threefold() -> None:
    """Whatever the factor is."""
    backoff = Backoff(base=1.0, factor=2.0, cap=20.0, jitter=Jitter.DECORRELATED)
    assert backoff.delays(5) == (3.0, 9.0, 20.0, 20.0)


def test_a_schedule_survives_any_number_of_attempts() -> None:
    """Arithmetic overflow is the cap; nothing times anything stays nothing."""
    assert Backoff().longest(100_000) == 30.0
    assert Backoff(base=0.0).longest(100_000) == 0.0


def test_without_jitter_the_delay_is_the_schedule() -> None:
    """To the bit."""
    assert [Backoff(base=0.5, cap=1.5).delay(n, RNG) for n in (1, 2, 3)] == [0.5, 1.0, 1.5]


@given(
    base=st.floats(0, 100),
    factor=st.floats(1, 10),
    extra=st.floats(0, 1000),
    jitter=st.sampled_from(Jitter),
    attempt=st.integers(1, 2000),
)
def test_no_delay_is_negative_or_exceeds_the_longest(
    base: float, factor: float, extra: float, jitter: Jitter, attempt: int
) -> None:
    """Nor does the longest exceed the cap, and it never shrinks."""
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
def test_what_cannot_be_waited_for_is_refused(arguments: dict[str, object], message: str) -> None:
    """ValueError says what is allowed."""
    with pytest.raises(ValueError, match=message):
        Backoff(**arguments)  # type: ignore[arg-type]  # one argument at a time


def test_a_jitter_may_be_written_as_a_word() -> None:
    """For settings and saved data."""
    assert Backoff(jitter="full").jitter is Jitter.FULL  # type: ignore[arg-type]  # the point
