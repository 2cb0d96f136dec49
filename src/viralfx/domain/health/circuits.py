"""Breaker registry: the breakers of a process, their health check, and their saved state."""

import logging
from collections.abc import Iterator, Mapping

from viralfx.core.events import Listener
from viralfx.domain.health.model import Observation, Status
from viralfx.resilience.breaker import CircuitBreaker, CircuitEvent
from viralfx.resilience.breaker_states import CircuitState

_logger = logging.getLogger("viralfx.resilience")


class BreakerRegistry:
    """The circuit breakers of one process, by name.

    It is the health check ``circuits``, which warns while a circuit is open. A half-open circuit
    passes: it waits for a call as a probe, and an unused dependency may get none.
    """

    def __init__(self) -> None:
        self._breakers: dict[str, CircuitBreaker] = {}
        self._saved: dict[str, Mapping[str, object]] = {}
        self._listeners: tuple[Listener[CircuitEvent], ...] = ()

    def add(self, breaker: CircuitBreaker) -> CircuitBreaker:
        """Register a breaker under its name, restore its saved state if any, and return it.

        Raises ``ValueError`` if the name is taken.
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
        """Iterate over the breakers in order of registration."""
        return iter(tuple(self._breakers.values()))

    def __len__(self) -> int:
        """Return the number of breakers."""
        return len(self._breakers)

    def subscribe(self, listener: Listener[CircuitEvent]) -> None:
        """Call ``listener`` with every event of every breaker, including those added later."""
        self._listeners = (*self._listeners, listener)
        for breaker in self:
            breaker.subscribe(listener)

    def snapshot(self) -> dict[str, Mapping[str, object]]:
        """Return the state of every breaker as plain data.

        Includes saved states whose breakers have not been added yet.
        """
        return {**self._saved, **{breaker.name: breaker.snapshot() for breaker in self}}

    def restore(self, saved: Mapping[str, object]) -> None:
        """Restore states from a :meth:`snapshot`, at once or when the breaker is added.

        An invalid state is logged and ignored: saved state must not prevent a start.
        """
        for name, snapshot in saved.items():
            if not isinstance(snapshot, Mapping):
                _logger.warning("Saved circuit state ignored", extra={"circuit": name})
            elif name in self._breakers:
                _restore(self._breakers[name], snapshot)
            else:
                self._saved[name] = snapshot

    async def check(self) -> Observation:
        """Return a warning if a circuit is open; ``details`` has the state of each circuit."""
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
