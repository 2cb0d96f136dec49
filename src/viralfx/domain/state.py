"""What survives a restart, the port that keeps it, and the stage that saves it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """Plain data that one process leaves for the next. Durations are seconds."""

    saved_at: datetime
    starts: int
    """How many processes there have been, this one included."""
    uptime: float
    health: str
    checks: Mapping[str, str] = field(default_factory=dict)
    """The last status of each check."""
    transitions: Mapping[str, int] = field(default_factory=dict)
    """Status changes of each check, over all processes."""
    circuits: Mapping[str, Any] = field(default_factory=dict)
    """The state of each circuit breaker, as plain data."""
    shutdown_reason: str | None = None
    shutdown_phases: Mapping[str, str] = field(default_factory=dict)
    """The outcome of each phase that was done when this was saved."""


class StateStore(Protocol):
    """Port: keeps one :class:`SavedState`."""

    async def load(self) -> SavedState | None:
        """Return what was saved last; None when there is nothing, or nothing readable."""
        ...

    async def save(self, state: SavedState) -> None:
        """Replace what is kept, entirely or not at all."""
        ...


class SaveState:
    """Shutdown stage: collects the state at that moment and hands it to the store."""

    def __init__(self, store: StateStore, collect: Callable[[], SavedState | None]) -> None:
        """``collect`` returns None while there is nothing worth replacing what was saved before."""
        self._store = store
        self._collect = collect

    async def run(self, budget: float) -> None:  # noqa: ARG002 - one write; the sequence cuts it
        """Save once."""
        state = self._collect()
        if state is not None:
            await self._store.save(state)
