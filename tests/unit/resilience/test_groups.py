"""Exception groups: the guards look into them."""

import pytest
from tests.unit.resilience.scripted import Scripted, SkippingClock

from viralfx.resilience.breaker import CircuitBreaker, CircuitOpenError
from viralfx.resilience.policy import Backoff, BackoffPolicy
from viralfx.resilience.retry import retry


class DoubtfulError(ConnectionError):
    """An error after which the operation may have taken effect."""

    maybe_applied = True


class BusyError(ConnectionError):
    """An error of a server that says when to return."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.retry_after = seconds


def rejected() -> CircuitOpenError:
    """Return the rejection of another guard."""
    return CircuitOpenError("other", "", 1.0)


def group(*errors: Exception) -> ExceptionGroup[Exception]:
    """Return the errors as a task group raises them, in two levels."""
    return ExceptionGroup("outer", [ExceptionGroup("inner", errors)])


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (group(ConnectionResetError(), BrokenPipeError()), 3),
        (group(ConnectionResetError(), ValueError()), 1),
        (group(ValueError()), 1),
    ],
)
async def test_a_group_is_retried_if_all_of_its_members_are(
    error: Exception, attempts: int
) -> None:
    """A member that another attempt cannot help makes the attempt useless."""
    operation = Scripted(*[error] * 3)
    with pytest.raises(ExceptionGroup):
        await retry(retry_on=ConnectionError, clock=SkippingClock()).execute(operation)

    assert operation.calls == attempts


async def test_a_listed_group_needs_no_listed_members() -> None:
    """The type of the group itself counts."""
    operation = Scripted(group(ValueError()), "done")

    assert await retry(retry_on=ExceptionGroup, clock=SkippingClock()).execute(operation) == "done"


@pytest.mark.parametrize("other", [DoubtfulError(), rejected()])
async def test_one_member_that_forbids_a_retry_is_enough(other: Exception) -> None:
    """The operation may have taken effect, or a circuit is open."""
    operation = Scripted(group(ConnectionError(), other), "done")
    with pytest.raises(ExceptionGroup):
        await retry(clock=SkippingClock()).execute(operation)

    assert operation.calls == 1


def test_a_group_waits_as_long_as_its_longest_hint() -> None:
    """The slowest of the servers decides."""
    policy = BackoffPolicy(attempts=3, backoff=Backoff(base=1.0))

    assert policy.next_delay(1, group(BusyError(2.0), BusyError(7.0), ValueError())) == 7.0


@pytest.mark.parametrize(
    ("error", "failures"),
    [
        (group(ConnectionResetError(), ValueError()), 1),
        (group(ValueError()), 0),
    ],
)
async def test_a_group_is_a_failure_if_one_of_its_members_is(
    error: Exception, failures: int
) -> None:
    """One error of the dependency shows that it fails."""
    breaker = CircuitBreaker(failure_on=ConnectionError)
    with pytest.raises(ExceptionGroup):
        await breaker.execute(Scripted(error))

    assert breaker.get_state()["failureCount"] == failures


async def test_a_group_of_rejections_is_neutral() -> None:
    """No call has reached the dependency."""
    breaker = CircuitBreaker()
    for error in (group(rejected(), rejected()), group(rejected(), ValueError())):
        with pytest.raises(ExceptionGroup):
            await breaker.execute(Scripted(error))

    assert breaker.get_state()["failureCount"] == 1
