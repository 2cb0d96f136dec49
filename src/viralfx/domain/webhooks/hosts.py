"""A breaker for each host: one receiver that is down costs the others nothing."""

from collections import OrderedDict
from collections.abc import Callable

from viralfx.domain.clock import Clock
from viralfx.domain.events import Listener
from viralfx.domain.resilience.breaker import CircuitBreaker
from viralfx.domain.resilience.circuit import CircuitEvent
from viralfx.domain.resilience.circuit_states import CircuitState
from viralfx.domain.resilience.quantities import require_count
from viralfx.domain.webhooks.errors import WebhookUnavailableError


class HostCircuits:
    """Breakers by host, made when first asked for; at most ``most`` are remembered.

    They are not the process's own: a receiver that is down does not degrade this service. When
    there is no room, the one used longest ago is forgotten, a closed one before any other, since
    forgetting an open one would let calls through.
    """

    def __init__(
        self,
        *,
        failure_threshold: int = 5,
        open_for: float = 60.0,
        probe_lease: float = 60.0,
        most: int = 256,
        listeners: tuple[Listener[CircuitEvent], ...] = (),
        clock: Clock | None = None,
    ) -> None:
        """See :class:`CircuitBreaker`; raises ``ValueError`` as it does."""
        require_count("most", most)
        self._most = most
        self._breakers: OrderedDict[str, CircuitBreaker] = OrderedDict()
        self._make: Callable[[str], CircuitBreaker] = lambda host: CircuitBreaker(
            failure_threshold,
            open_for,
            name=host,
            probe_lease=probe_lease,
            failure_on=WebhookUnavailableError,
            listeners=listeners,
            clock=clock,
        )
        self._make("checked now, for the sake of whoever wrote the numbers")

    def __getitem__(self, host: str) -> CircuitBreaker:
        """Return the breaker of a host."""
        breaker = self._breakers.get(host)
        if breaker is None:
            if len(self._breakers) >= self._most:
                self._forget_one()
            breaker = self._breakers[host] = self._make(host)
        else:
            self._breakers.move_to_end(host)
        return breaker

    def __len__(self) -> int:
        """Count the hosts that are remembered."""
        return len(self._breakers)

    def _forget_one(self) -> None:
        closed = (h for h, b in self._breakers.items() if b.state is CircuitState.CLOSED)
        del self._breakers[next(closed, next(iter(self._breakers)))]
