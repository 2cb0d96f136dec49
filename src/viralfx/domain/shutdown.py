"""The words of the ordered stop: the stage port, the phases, their budgets and the report."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol


class ShutdownStage(Protocol):
    """Port: answers "how do you leave?" for one technology.

    Running it twice, or before start-up finished, is safe. It should return within ``budget``
    seconds; a little later it is cancelled and left behind. Raising marks it failed, and the next
    stage runs all the same.
    """

    async def run(self, budget: float) -> None:
        """Leave in order."""
        ...


class Phase(StrEnum):
    """The four phases, in order. What is to stop is registered as a stage of one of them."""

    STOP_ACCEPTING = "stop accepting"
    DRAIN = "drain"
    SAVE_STATE = "save state"
    CLOSE = "close connections"


class Outcome(StrEnum):
    """How a stage or phase ended."""

    OK = "ok"
    FAILED = "failed"
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShutdownBudgets:
    """Seconds for each phase, and for all of it from the trigger to the forced end."""

    readiness_delay: float = 0.0
    drain: float = 30.0
    state: float = 5.0
    connections: float = 15.0
    force: float = 60.0

    def __post_init__(self) -> None:
        """Refuse budgets that cannot be kept.

        Raises ``ValueError`` when one is negative or not finite, or when they exceed ``force``.
        """
        for name in ("readiness_delay", "drain", "state", "connections", "force"):
            seconds = getattr(self, name)
            if not 0 <= seconds < float("inf"):
                raise ValueError(f"{name} must be zero or more seconds, got {seconds!r}")
        total = self.readiness_delay + self.drain + self.state + self.connections
        if total > self.force:
            raise ValueError(
                f"the phases need {total:g} s together (readiness delay {self.readiness_delay:g},"
                f" drain {self.drain:g}, state {self.state:g}, connections {self.connections:g})"
                f" but everything is forced to end after {self.force:g} s"
            )

    def of(self, phase: Phase) -> float:
        """Return the budget of a phase in seconds."""
        return {
            Phase.STOP_ACCEPTING: self.readiness_delay,
            Phase.DRAIN: self.drain,
            Phase.SAVE_STATE: self.state,
            Phase.CLOSE: self.connections,
        }[phase]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    """How one stage ended. ``duration`` is in seconds."""

    name: str
    outcome: Outcome
    duration: float
    error: BaseException | None = None
    """For the log only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseReport:
    """How far one phase is. Durations are seconds; ``outcome`` is None until it is done."""

    phase: Phase
    budget: float
    state: str
    duration: float | None
    outcome: Outcome | None
    stages: tuple[StageReport, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShutdownReport:
    """The one shutdown of this process: why, until when, and how far it is."""

    reason: str | None
    """None while there is no shutdown."""
    deadline: datetime | None
    phases: tuple[PhaseReport, ...]

    @property
    def clean(self) -> bool:
        """Whether every phase is done and nothing failed or overran."""
        return all(phase.outcome is Outcome.OK for phase in self.phases)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShutdownTriggered:
    """Event: the shutdown began; everything ends ``force_timeout`` seconds after it."""

    reason: str
    deadline: datetime
    force_timeout: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFinished:
    """Event: a stage ended, in order or not."""

    phase: Phase
    report: StageReport


ShutdownEvent = ShutdownTriggered | StageFinished
