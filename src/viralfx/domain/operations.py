"""The operations layer of one process: its services, wired together and started as one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from viralfx.domain.clock import Clock
from viralfx.domain.lifecycle import Lifecycle
from viralfx.domain.monitor import HealthMonitor
from viralfx.domain.resilience.circuits import BreakerRegistry
from viralfx.domain.resources import Resource
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
    resources: Sequence[Resource] = ()
    """What is opened at start-up, in this order."""
    on_ready: Sequence[Callable[[], object]] = ()
    """What begins to work once the application is ready; doing it twice must be harmless."""
    previous: SavedState | None = None
    """What the process before this one left; known once started."""
    staged: bool = False
    """Whether a runner owns the shutdown; otherwise the application's lifespan runs it."""
    _starts: int = field(default=1, init=False)
    _started: bool = field(default=False, init=False)
    _restored: bool = field(default=False, init=False)

    async def start(self) -> None:
        """Begin checking, open what is to be opened and restore what was saved.

        Doing it twice is harmless. Raises :class:`viralfx.domain.errors.StartupError` when a
        resource cannot be had.
        """
        if self._started:
            return
        self._started = True
        # First: probes tell what is missing while it is waited for.
        self.monitor.start()
        for resource in self.resources:
            await resource.open()
        self.previous = await self.state_store.load()
        if self.previous is not None:
            self._starts = self.previous.starts + 1
            self.monitor.restore_transition_counts(self.previous.transitions)
            self.breakers.restore(self.previous.circuits)
        self._restored = True

    def application_ready(self) -> None:
        """Note that the application's own start-up is over: the checks decide, and work begins."""
        self.lifecycle.application_ready()
        self.lifecycle.follow(self.monitor.report())
        for begin in self.on_ready:
            begin()

    def state_to_save(self) -> SavedState | None:
        """Collect what the next process should know; None before start-up took in what was saved.

        Saving earlier would lose the counts of the processes before.
        """
        if not self._restored:
            return None
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
