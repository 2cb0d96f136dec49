"""What answers say of the time, by a clock that is moved by hand."""

import json
from datetime import UTC, datetime, timedelta

from tests.manual_clock import ManualClock

from viralfx.bootstrap import assemble
from viralfx.settings import Settings
from viralfx.web.access import AccessPolicy
from viralfx.web.answers import OperationsAnswers

_NOON = datetime(2026, 1, 6, 12, tzinfo=UTC)


class SetClock(ManualClock):
    """A clock whose wall time is set, backwards too, as an administrator may do."""

    def __init__(self) -> None:
        super().__init__()
        self.shown = _NOON

    def now(self) -> datetime:
        """Return what was set."""
        return self.shown


def test_each_answer_has_its_own_millisecond() -> None:
    """Also when the clock is set back; what is within a millisecond shares a text."""
    clock, settings = SetClock(), Settings()
    assembly = assemble(settings, clock=clock)
    access = AccessPolicy.from_settings(settings)
    answers = OperationsAnswers(assembly.operations, access, assembly.metrics)
    seen: list[str] = []
    for microseconds in (0, 999, 1000, 1999, 5_000_000, 2000, 1999, -1):
        clock.shown = _NOON + timedelta(microseconds=microseconds)
        seen.append(json.loads(answers.live().body)["timestamp"])

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
