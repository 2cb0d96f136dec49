"""Fallbacks: a second-best result instead of an error."""

import asyncio

import pytest
from tests.unit.resilience.scripted import BackendError, Scripted

from viralfx.resilience.fallback import FallbackUsed, with_fallback


async def test_a_listed_error_is_replaced_by_the_fallback() -> None:
    """There is an event; a result is returned unchanged."""
    events: list[FallbackUsed] = []
    error = BackendError()
    operation = Scripted("fresh", error)
    answers = [
        await with_fallback(
            operation, "stale", on=BackendError, name="user", listeners=(events.append,)
        )
        for _ in range(2)
    ]
    assert answers == ["fresh", "stale"]
    assert events == [FallbackUsed(name="user", error=error)]


async def test_a_fallback_can_be_made_from_the_error() -> None:
    """The factory is called only when it is needed."""
    made: list[Exception] = []

    def make(error: Exception) -> int:
        made.append(error)
        return len(made)

    operation = Scripted("fresh", BackendError())
    assert await with_fallback(operation, fallback_factory=make) == "fresh"
    assert made == []
    assert await with_fallback(operation, fallback_factory=make) == 1


@pytest.mark.parametrize("error", [asyncio.CancelledError(), ValueError()])
async def test_an_unlisted_error_is_raised(error: BaseException) -> None:
    """A cancellation always is."""
    with pytest.raises(type(error)):
        await with_fallback(Scripted(error), None, on=BackendError)


async def test_a_failing_predicate_hides_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """The dependency's error is raised, the predicate's is logged."""
    with pytest.raises(BackendError):
        await with_fallback(
            Scripted(BackendError()), None, on=lambda error: len(str(error)) < 1 / 0
        )
    assert "Error predicate failed" in caplog.text


async def test_a_coroutine_object_is_rejected() -> None:
    """Like in every guard of this package."""
    with pytest.raises(TypeError, match="pass the function that makes it"):
        await with_fallback(Scripted(None)(), None)  # type: ignore[call-overload]  # the point
