"""All breakers of a process by name: listed as one health check, saved and restored together."""

import logging
from collections.abc import Iterator, Mapping

from viralfx.domain.events import Listener
from viralfx.domain.health import Observation, Status
from viralfx.domain.resilience.breaker import CircuitBreaker
from viralfx.domain.resilience.circuit import CircuitEvent
from viralfx.domain.resilience.circuit_states import CircuitState

_logger = logging.getLogger("viralfx.resilience")


class BreakerRegistry:
    """The named breakers of one process.

    As the health check ``circuits`` it warns while one is open. A half-open circuit passes: it
    waits for a call to find out, which for an unused dependency may never come.
    """

    def __init__(self) -> None:
        self._breakers: dict[str, CircuitBreaker] = {}
        self._saved: dict[str, Mapping[str, object]] = {}
        self._listeners: tuple[Listener[CircuitEvent], ...] = ()

    def add(self, breaker: CircuitBreaker) -> CircuitBreaker:
        """Register a breaker under its name and return it, restored if it was saved before.

        Raises ``ValueError`` for a name taken already.
        """
        name = breaker.name
        if name in self._breakers:
            raise ValueError(f"a circuit breaker named {name!r} is registered already")
        self._breakers[name] = breaker
        for listener in self._listeners:
            breaker.subscribe(listener)
        if name in self._saved:
            _restore(breaker, self._saved.pop(name))
        return breaker

    def __getitem__(self, name: str) -> CircuitBreaker:
        """Return a breaker; raises ``KeyError`` for an unknown name."""
        return self._breakers[name]

    def __iter__(self) -> Iterator[CircuitBreaker]:
        """Iterate over the breakers in the order of registration."""
        return iter(tuple(self._breakers.values()))

    def __len__(self) -> int:
        """Count the breakers."""
        return len(self._breakers)

    def subscribe(self, listener: Listener[CircuitEvent]) -> None:
        """Call ``listener`` with every event of every breaker, those to come included."""
        self._listeners = (*self._listeners, listener)
        for breaker in self:
            breaker.subscribe(listener)

    def snapshot(self) -> dict[str, Mapping[str, object]]:
        """Return every breaker's state as plain data, restored ones that nobody made yet too."""
        return {**self._saved, **{breaker.name: breaker.snapshot() for breaker in self}}

    def restore(self, saved: Mapping[str, object]) -> None:
        """Continue from a :meth:`snapshot`, now or as soon as a breaker of that name is added.

        What is no snapshot is logged and left out: saved state must not keep a process down.
        """
        for name, snapshot in saved.items():
            if not isinstance(snapshot, Mapping):
                _logger.warning("Saved circuit state ignored", extra={"circuit": name})
            elif name in self._breakers:
                _restore(self._breakers[name], snapshot)
            else:
                self._saved[name] = snapshot

    async def check(self) -> Observation:
        """See :class:`viralfx.domain.health.HealthCheck`."""
        details = {breaker.name: breaker.get_state() for breaker in self}
        is_open = [name for name, state in details.items() if state["state"] == CircuitState.OPEN]
        if is_open:
            message = f"Open: {', '.join(is_open)}"
            return Observation(
                status=Status.WARN, message=message, details=details, code="circuit_open"
            )
        return Observation(status=Status.PASS, message="No circuit is open", details=details)


def _restore(breaker: CircuitBreaker, snapshot: Mapping[str, object]) -> None:
    try:
        breaker.restore(snapshot)
    except ValueError:
        _logger.warning("Saved circuit state ignored", extra={"circuit": breaker.name})
