"""Tests of the metrics of checks, readiness, the lifecycle and the shutdown."""

import pytest
from prometheus_client import CollectorRegistry
from tests.manual_clock import ManualClock
from tests.unit.doubles import Act, ActingCheck, ActingStage
from tests.unit.metrics.reading import value

from viralfx.bootstrap import Assembly, assemble
from viralfx.domain.shutdown import Phase
from viralfx.settings import Settings


class Running:
    """A started assembly with a check of its own."""

    def __init__(self, assembly: Assembly, check: ActingCheck, clock: ManualClock) -> None:
        self.operations = assembly.operations
        self.registry = assembly.metrics.registry
        self.check = check
        self.clock = clock

    def status(self, status: str) -> float | None:
        """Return whether the check has a status."""
        return value(self.registry, "viralfx_check_status", check="disk", status=status)


@pytest.fixture
async def running(clock: ManualClock) -> Running:
    """Return a started assembly."""
    check = ActingCheck(clock=clock)
    stages = {Phase.SAVE_STATE: {"own": ActingStage(Act.RAISE, clock=clock, name="own")}}
    assembly = assemble(Settings(), checks={"disk": check}, stages=stages, clock=clock)
    await assembly.operations.start()
    assembly.operations.application_ready()
    await clock.advance(1.0)
    return Running(assembly, check, clock)


async def test_a_check_has_one_status(running: Running) -> None:
    """It is the status of the report; attempts and changes are counted separately."""
    passing = running.status("pass")
    running.check.act = Act.FAIL
    await running.clock.advance(10.0)
    states = {status: running.status(status) for status in ("pass", "warn", "fail")}
    failed = {"check": "disk", "status": "fail"}
    attempts = value(running.registry, "viralfx_check_attempts_total", **failed)

    assert passing == 1
    assert states == {"pass": 0, "warn": 0, "fail": 1}
    assert value(running.registry, "viralfx_check_transitions_total", **failed) == 1
    assert attempts is not None
    assert attempts >= 1
    count = value(running.registry, "viralfx_check_duration_seconds_count", check="disk")
    assert count == running.check.attempts
    await running.operations.monitor.stop()


async def test_the_age_of_a_check_is_computed_at_the_scrape(running: Running) -> None:
    """A check that no longer runs has a growing age."""
    await running.operations.monitor.stop()
    before = value(running.registry, "viralfx_check_age_seconds", check="disk")
    await running.clock.advance(100.0)
    after = value(running.registry, "viralfx_check_age_seconds", check="disk")

    assert before is not None
    assert after == before + 100


def test_every_counter_exists_from_the_start(clock: ManualClock) -> None:
    """``increase`` does not see the first event of a new series."""
    registry: CollectorRegistry = assemble(Settings(), clock=clock).metrics.registry

    for check in ("database", "redis", "memory", "queues", "circuits"):
        for status in ("pass", "warn", "fail"):
            labels = {"check": check, "status": status}
            assert value(registry, "viralfx_check_transitions_total", **labels) == 0
            assert value(registry, "viralfx_check_attempts_total", **labels) == 0


async def test_a_shutdown_exposes_stages_and_remaining_time(running: Running) -> None:
    """Stages have phase, name and outcome; the remaining time exists only during a shutdown."""
    registry, operations = running.registry, running.operations
    state = {"state": "stopped"}
    before = value(registry, "viralfx_shutdown_seconds_left")
    ready = value(registry, "viralfx_ready")
    operations.shutdown.trigger("test")
    left = value(registry, "viralfx_shutdown_seconds_left")
    await operations.shutdown.run()
    labels = {"phase": "save state", "stage": "own", "outcome": "failed"}

    assert (before, ready, left) == (None, 1, 60)
    assert value(registry, "viralfx_shutdown_stage_duration_seconds", **labels) == 0
    assert value(registry, "viralfx_lifecycle_state", **state) == 1
    assert value(registry, "viralfx_lifecycle_state", state="ready") == 0
    assert value(registry, "viralfx_ready") == 0


def test_the_version_is_a_label(clock: ManualClock) -> None:
    """Graphs can show deployments."""
    assembly = assemble(Settings(environment="test"), clock=clock)
    labels = {"version": assembly.operations.version, "environment": "test"}

    assert value(assembly.metrics.registry, "viralfx_build_info", **labels) == 1
