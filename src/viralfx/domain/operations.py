"""The operations layer of one process: its services, wired together and started as one."""

from collections.abc import Callable
from dataclasses import dataclass, field

from viralfx.domain.clock import Clock
from viralfx.domain.lifecycle import Lifecycle
from viralfx.domain.monitor import HealthMonitor
from viralfx.domain.resilience.circuits import BreakerRegistry
from viralfx.domain.sequence import ShutdownSequence
from viralfx.domain.state import SavedState, StateStore
from viralfx.domain.usage import ProcessUsage


@dataclass(slots=True, kw_only=True)
class Operations:
    """What controllers, the runner and an application's own code talk to."""

    version: str
    environment: str
    clock: Clock
    lifecycle: Lifecycle
    monitor: HealthMonitor
    shutdown: ShutdownSequence
    breakers: BreakerRegistry
    state_store: StateStore
    usage: Callable[[], ProcessUsage]
    previous: SavedState | None = None
    """What the process before this one left; known once started."""
    staged: bool = False
    """Whether a runner owns the shutdown; otherwise the application's lifespan runs it."""
    _starts: int = field(default=1, init=False)
    _started: bool = field(default=False, init=False)

    async def start(self) -> None:
        """Restore what was saved and begin checking; doing it twice is harmless."""
        if self._started:
            return
        self._started = True
        self.previous = await self.state_store.load()
        if self.previous is not None:
            self._starts = self.previous.starts + 1
            self.monitor.restore_transition_counts(self.previous.transitions)
            self.breakers.restore(self.previous.circuits)
        self.monitor.start()

    def application_ready(self) -> None:
        """Note that the application's own start-up is over; the checks decide from here."""
        self.lifecycle.application_ready()
        self.lifecycle.follow(self.monitor.report())

    def state_to_save(self) -> SavedState:
        """Collect what the next process should know."""
        report, shutdown = self.monitor.report(), self.shutdown.report()
        return SavedState(
            saved_at=self.clock.now(),
            starts=self._starts,
            uptime=self.lifecycle.uptime,
            health=report.health,
            checks={name: str(check.status) for name, check in report.checks.items()},
            transitions=self.monitor.transition_counts,
            circuits=self.breakers.snapshot(),
            shutdown_reason=shutdown.reason,
            shutdown_phases={
                str(p.phase): str(p.outcome) for p in shutdown.phases if p.outcome is not None
            },
        )
