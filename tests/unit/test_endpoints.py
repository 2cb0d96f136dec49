"""The timestamps of probe responses, with a manual clock."""

import json
from datetime import UTC, datetime, timedelta

from tests.manual_clock import ManualClock

from viralfx.bootstrap import assemble
from viralfx.domain.health.model import Observation, Status
from viralfx.settings import Settings
from viralfx.web.auth import AccessPolicy
from viralfx.web.endpoints import OperationsEndpoints

_NOON = datetime(2026, 1, 6, 12, tzinfo=UTC)


class SetClock(ManualClock):
    """A clock whose wall time may jump backwards, as after a correction by an administrator."""

    def __init__(self) -> None:
        super().__init__()
        self.shown = _NOON
        self.passed = 0.0

    def monotonic(self) -> float:
        """Return the seconds that have passed in the test."""
        return self.passed

    def now(self) -> datetime:
        """Return the wall time that was set."""
        return self.shown


def test_the_timestamp_is_of_the_current_millisecond() -> None:
    """This holds after the clock was set back; responses in one millisecond share the text."""
    clock, settings = SetClock(), Settings()
    assembly = assemble(settings, clock=clock)
    access = AccessPolicy.from_settings(settings)
    endpoints = OperationsEndpoints(assembly.operations, access, assembly.metrics)
    seen: list[str] = []
    for microseconds in (0, 999, 1000, 1999, 5_000_000, 2000, 1999, -1):
        clock.passed += 0.001
        clock.shown = _NOON + timedelta(microseconds=microseconds)
        seen.append(json.loads(endpoints.live().body)["timestamp"])

    assert seen == [
        "2026-01-06T12:00:00.000Z",
        "2026-01-06T12:00:00.000Z",
        "2026-01-06T12:00:00.001Z",
        "2026-01-06T12:00:00.001Z",
        "2026-01-06T12:00:05.000Z",
        "2026-01-06T12:00:00.002Z",
        "2026-01-06T12:00:00.001Z",
        "2026-01-06T11:59:59.999Z",
    ]


class CountingCheck:
    """A check whose details change without an attempt."""

    def __init__(self) -> None:
        self.count = 0

    async def check(self) -> Observation:
        """Pass, with one figure of the moment and one of the attempt."""
        return Observation(
            status=Status.PASS,
            message="counted",
            details={"count": 0, "at": "the attempt"},
            live_details=lambda: {"count": self.count},
        )


async def test_live_details_are_of_the_moment() -> None:
    """Every response has them, without another attempt of the check."""
    settings, check = Settings(), CountingCheck()
    assembly = assemble(settings, checks={"counter": check})
    access = AccessPolicy.from_settings(settings)
    endpoints = OperationsEndpoints(assembly.operations, access, assembly.metrics)
    assembly.operations.monitor.start()
    try:
        await assembly.operations.monitor.refresh()
        for check.count in (1, 1, 2):
            whole = json.loads(endpoints.detailed().body)["checks"]["counter"]
            alone = json.loads(endpoints.check("counter").body)
            assert whole["details"]["at"] == "the attempt"
            assert whole["details"]["count"] == alone["details"]["count"] == check.count
    finally:
        await assembly.operations.monitor.stop()
