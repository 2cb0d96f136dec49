"""Tests of the trace of a shutdown and of the stage that exports it."""

import asyncio
import threading
from datetime import UTC, datetime
from functools import partial

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import StatusCode
from tests.unit.tracing.conftest import Finished

from viralfx.core.clock import SystemClock
from viralfx.core.correlation import correlated, new_correlation_id
from viralfx.domain.health.model import Lifecycle
from viralfx.domain.shutdown import (
    Outcome,
    Phase,
    ShutdownBudgets,
    ShutdownSequence,
    ShutdownTriggered,
    StageFinished,
    StageReport,
)
from viralfx.telemetry.tracing.setup import ShutdownTrace, flush_traces


def test_each_stage_is_a_span_of_one_trace(provider: TracerProvider, finished: Finished) -> None:
    """Spans have the stages' durations; a failed stage marks itself and the root as failed."""
    trace = ShutdownTrace(provider.get_tracer("test"))
    trace(ShutdownTriggered(reason="SIGTERM", deadline=datetime.now(UTC), force_timeout=60.0))
    for name, outcome, error in (
        ("requests", Outcome.OK, None),
        ("jobs", Outcome.FAILED, OSError("planted")),
    ):
        report = StageReport(name=name, outcome=outcome, duration=1.5, error=error)
        trace(StageFinished(phase=Phase.DRAIN, report=report, at=datetime.now(UTC)))
    correlation_id = new_correlation_id()
    with correlated(correlation_id):
        trace.finish()
    requests, jobs, root = finished()

    assert (requests.name, jobs.name, root.name) == ("stage requests", "stage jobs", "shutdown")
    assert f"{root.context.trace_id:032x}" == correlation_id
    for stage in (requests, jobs):
        assert stage.parent is not None
        assert stage.parent.span_id == root.context.span_id
        assert stage.end_time is not None
        assert stage.start_time is not None
        assert stage.end_time - stage.start_time == 1_500_000_000
    assert requests.status.status_code is StatusCode.UNSET
    assert jobs.status.status_code is root.status.status_code is StatusCode.ERROR
    assert (jobs.attributes or {})["error.type"] == "OSError"
    assert (root.attributes or {})["viralfx.shutdown.reason"] == "SIGTERM"


def test_without_a_shutdown_there_is_no_trace(provider: TracerProvider, finished: Finished) -> None:
    """Nothing is recorded without a trigger."""
    ShutdownTrace(provider.get_tracer("test")).finish()

    assert finished() == ()


@pytest.mark.parametrize(("flush_timeout", "budget"), [(30.0, 0.3), (0.25, 30.0)])
def test_the_export_is_limited_by_the_budget(
    provider: TracerProvider, flush_timeout: float, budget: float
) -> None:
    """A collector that hangs neither delays the process nor fails the stage."""
    hang, trace = threading.Event(), ShutdownTrace(provider.get_tracer("test"))

    async def run() -> float:
        began = asyncio.get_running_loop().time()
        await flush_traces(trace, hang.wait, lambda: flush_timeout, budget)
        return asyncio.get_running_loop().time() - began

    took = asyncio.run(run())
    hang.set()

    assert 0.2 < took < 20.0  # the larger of the two limits is 30 s


async def test_the_stage_comes_last(provider: TracerProvider) -> None:
    """It runs after stages that are registered later."""
    clock = SystemClock()
    budgets = ShutdownBudgets(readiness_delay=0, drain=1, state=1, connections=1, force=5)
    sequence = ShutdownSequence(budgets=budgets, lifecycle=Lifecycle(clock), clock=clock)
    ran: list[str] = []

    class Stage:
        def __init__(self, name: str) -> None:
            self.name = name

        async def run(self, budget: float) -> None:  # noqa: ARG002
            ran.append(self.name)

    trace = ShutdownTrace(provider.get_tracer("test"))
    flush = partial(flush_traces, trace, lambda: ran.append("telemetry"), lambda: 1.0)
    sequence.register(Phase.CLOSE, "telemetry", flush, last=True)
    sequence.register(Phase.CLOSE, "server", Stage("server"))
    sequence.register(Phase.CLOSE, "application", Stage("application"), first=True)
    with pytest.raises(ValueError, match="telemetry"):
        sequence.register(Phase.CLOSE, "telemetry", flush)

    report = await sequence.run()

    assert report.clean
    assert ran == ["application", "server", "telemetry"]
