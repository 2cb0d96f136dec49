"""Health checks without ``async``, which run in threads."""

import threading
from typing import cast

import pytest
from tests.servers.waiting import until

from viralfx.core.clock import SystemClock
from viralfx.core.correlation import current_correlation_id
from viralfx.domain.health.check_runner import CheckCompleted
from viralfx.domain.health.model import CheckPolicy, HealthReport, Observation, Status
from viralfx.domain.health.monitor import HealthMonitor

PASSED = Observation(status=Status.PASS, message="")


class PlainCheck:
    """A check without ``async``, which blocks its thread while it is held."""

    def __init__(self, result: object = None, error: BaseException | None = None) -> None:
        self._result = PASSED if result is None else result
        self._error = error
        self.held = threading.Event()
        self.held.set()
        self.threads: list[threading.Thread] = []
        self.correlation_ids: list[str | None] = []

    def check(self) -> Observation:
        """Block, then raise or return."""
        self.threads.append(threading.current_thread())
        self.correlation_ids.append(current_correlation_id())
        self.held.wait(30.0)
        if self._error is not None:
            raise self._error
        return cast("Observation", self._result)


async def _passed() -> Observation:
    return PASSED


async def real_attempt(check: PlainCheck) -> HealthReport:
    """Return the report after one attempt, in real time."""
    monitor = HealthMonitor(clock=SystemClock())
    monitor.register("one", check, CheckPolicy())
    monitor.start()
    await until(lambda: monitor.report().checks["one"].code != "pending")
    report = monitor.report()
    await monitor.stop()
    return report


async def test_a_plain_check_runs_in_a_thread() -> None:
    """It may block, and it has the correlation id of its attempt."""
    check = PlainCheck()
    report = (await real_attempt(check)).checks["one"]

    assert report.status is Status.PASS
    assert check.threads[0] is not threading.main_thread()
    assert check.correlation_ids == [report.correlation_id]


@pytest.mark.parametrize("error", [ValueError(), SystemExit(), GeneratorExit(), StopIteration()])
async def test_an_error_of_a_plain_check_fails_it(error: BaseException) -> None:
    """The error of a thread ends neither the monitor nor the process."""
    report = (await real_attempt(PlainCheck(error=error))).checks["one"]

    assert (report.status, report.code) == (Status.FAIL, "error")


async def test_a_plain_check_must_return_an_observation() -> None:
    """As any check."""
    report = (await real_attempt(PlainCheck(result="well"))).checks["one"]

    assert (report.status, report.code) == (Status.FAIL, "error")


async def test_a_plain_check_may_return_a_coroutine() -> None:
    """A wrapper around a coroutine function is often plain."""
    report = (await real_attempt(PlainCheck(result=_passed()))).checks["one"]

    assert report.status is Status.PASS


async def test_a_plain_check_that_hangs_holds_one_thread() -> None:
    """Its attempts time out, the loop goes on, and it passes once it returns."""
    check = PlainCheck()
    check.held.clear()
    monitor = HealthMonitor(clock=SystemClock())
    policy = CheckPolicy(interval=0.02, timeout=0.02, max_age=60.0)
    monitor.register("one", check, policy)
    timeouts = []
    monitor.subscribe(
        lambda event: timeouts.append(event) if isinstance(event, CheckCompleted) else None
    )
    monitor.start()
    await until(lambda: len(timeouts) >= 3)
    code, threads = monitor.report().checks["one"].code, len(check.threads)
    check.held.set()
    await until(lambda: monitor.report().checks["one"].status is Status.PASS)
    await monitor.stop()

    assert (code, threads) == ("timeout", 1)
