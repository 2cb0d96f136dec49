"""Requests as events of the audit trail: the names of their actors, and their refusals."""

from viralfx.domain.access import ANONYMOUS, Principal
from viralfx.domain.audit import Action, AuditEntry, AuditOutcome, AuditTrail, RefusalLimit
from viralfx.domain.clock import Clock
from viralfx.web.auth import CHANGING
from viralfx.web.responses import Scope, has_credentials, peer_of


def actor_of(caller: Principal | None) -> str:
    """Return the actor of a caller without a session; None is the anonymous one."""
    return (caller or ANONYMOUS).name


class RefusalAudit:
    """Records refused requests, of which a client may send any number.

    A request that only reads, and has no token, is no event: probes of a wrong configuration
    repeat it without an end.
    """

    def __init__(self, trail: AuditTrail, clock: Clock) -> None:
        self._trail = trail
        self._limit = RefusalLimit(clock.monotonic)

    def record(
        self,
        scope: Scope,
        status: int,
        action: Action = Action.ACCESS,
        *,
        actor: str = ANONYMOUS.name,
    ) -> None:
        """Record a refused request, unless its address has an event of the last minute."""
        if scope["method"] not in CHANGING and not has_credentials(scope):
            return
        address = peer_of(scope)
        others = self._limit.others(address)
        if others is None:
            return
        self._trail.record(
            AuditEntry(
                action=action,
                actor=actor,
                address=address,
                target=f"{scope['method']} {scope['path']}",
                outcome=AuditOutcome.REFUSED,
                detail=f"{status}, and {others} others before" if others else str(status),
            )
        )
