"""The operations layer of one process, and the state that it saves over a restart."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from viralfx.core.clock import Clock
from viralfx.core.loops import HomeLoop
from viralfx.domain.audit import AuditTrail
from viralfx.domain.health.circuits import BreakerRegistry
from viralfx.domain.health.model import HealthCheck, Lifecycle, ProcessUsage
from viralfx.domain.health.monitor import HealthMonitor
from viralfx.domain.shutdown import ShutdownSequence, StageFunction


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """Plain data that one process saves for the next one. Durations are seconds."""

    saved_at: datetime
    starts: int
    """Number of starts so far, including this process."""
    uptime: float
    health: str
    checks: Mapping[str, str] = field(default_factory=dict)
    """The last status of each check."""
    transitions: Mapping[str, int] = field(default_factory=dict)
    """Number of status changes of each check since the first start."""
    circuits: Mapping[str, Any] = field(default_factory=dict)
    """The state of each circuit breaker, as plain data."""
    shutdown_reason: str | None = None
    shutdown_phases: Mapping[str, str] = field(default_factory=dict)
    """Outcome of each shutdown phase that had ended when the state was saved."""


class StateStore(Protocol):
    """Port: stores one :class:`SavedState`."""

    async def load(self) -> SavedState | None:
        """Return the last saved state; None if there is none or it cannot be read."""
        ...

    async def save(self, state: SavedState) -> None:
        """Replace the stored state atomically."""
        ...


async def save_state(store: StateStore, collect: Callable[[], SavedState | None]) -> None:
    """Save the state that ``collect`` returns; None keeps the state that was saved before."""
    state = collect()
    if state is not None:
        await store.save(state)


class Resource(Protocol):
    """Port: a resource that is opened at start-up and closed by its own shutdown stage."""

    async def open(self) -> None:
        """Open the resource; this may take long. A second call does nothing.

        Raises :class:`viralfx.core.errors.StartupError` if the resource cannot be opened.
        """
        ...


CHECK_SHARE = 0.9
"""Share of HEALTH_CHECK_TIMEOUT after which a built-in check reports a timeout itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """Health check, resource to open, and shutdown stage of a technology; None: not needed."""

    check: HealthCheck
    resource: Resource | None = None
    close: StageFunction | None = None


@dataclass(slots=True, kw_only=True)
class Operations:
    """The services that controllers, the runner and application code use."""

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
    """Resources to open at start-up, in this order."""
    on_ready: Sequence[Callable[[], object]] = ()
    """Called once the application is ready. Each must tolerate a second call."""
    checks_of_state: Collection[str] = ()
    """Names of the checks that report saved state; they start once it is restored."""
    home: HomeLoop = field(default_factory=HomeLoop)
    """The event loop of the services: the one on which they start."""
    checks_of_application: Collection[str] = ()
    """Names of the application's checks. They start once the application has, since they may use
    clients that its start-up opens."""
    audit: AuditTrail = field(default_factory=AuditTrail)
    """Records the actions of callers."""
    previous: SavedState | None = None
    """State saved by the previous process; None before start-up, or if there is none."""
    instance: str = ""
    """The name of this process, unique among all that share a ledger."""
    role: str = "api"
    """``worker`` for a process that only runs jobs."""
    revision: str | None = None
    """Commit of the code; None if REVISION is not set."""
    adapters: Mapping[str, str] = field(default_factory=dict)
    """The technology behind each port, by the port's name: ``postgres``, ``redis``, ``memory``."""
    staged: bool = False
    """True if a runner runs the shutdown; False if the application's lifespan does."""
    started_at: datetime = field(init=False)
    """The time when this process started."""
    _starts: int = field(default=1, init=False)
    _started: bool = field(default=False, init=False)
    _restored: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        """Note the time."""
        self.started_at = self.clock.now()

    async def start(self) -> None:
        """Start the checks, open the resources and restore the saved state.

        A second call does nothing. Raises :class:`viralfx.core.errors.StartupError` if a
        resource cannot be opened.
        """
        if self._started:
            return
        self._started = True
        self.home.settle()
        # The monitor starts first, so that probes report a missing resource during the wait for it.
        self.monitor.start(postponed={*self.checks_of_state, *self.checks_of_application})
        for resource in self.resources:
            await resource.open()
        self.previous = await self.state_store.load()
        if self.previous is not None:
            self._starts = self.previous.starts + 1
            self.monitor.restore_transition_counts(self.previous.transitions)
            self.breakers.restore(self.previous.circuits)
        self._restored = True
        self.monitor.start(postponed=self.checks_of_application)

    def application_ready(self) -> None:
        """Record that the application has started.

        Its checks begin, checks now decide readiness, and work begins.
        """
        if self._restored and not self.lifecycle.stopping:
            self.monitor.start()
        self.lifecycle.application_ready()
        self.lifecycle.follow(self.monitor.report())
        for begin in self.on_ready:
            begin()

    def state_to_save(self) -> SavedState | None:
        """Return the state to save for the next process; None before the saved state is restored.

        Saving before that would lose the counts of earlier processes.
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
