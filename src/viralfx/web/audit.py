"""Requests as events of the audit trail: the names of their actors, and their refusals."""

from viralfx.core.clock import Clock
from viralfx.domain.access import ANONYMOUS, Principal
from viralfx.domain.audit import Action, AuditEntry, AuditOutcome, AuditTrail, RefusalLimit
from viralfx.server.interface import Scope
from viralfx.web.auth import CHANGING
from viralfx.web.responses import has_credentials, peer_of


def actor_of(caller: Principal | None) -> str:
    """Return the actor of a caller without a session; None is the anonymous one."""
    return (caller or ANONYMOUS).name


class RefusalAudit:
    """Records refused requests, of which a client may send any number.

    A request that only reads, and has no token, is no event: probes of a wrong configuration
    repeat it without an end. One of each actor, action and address is an event in a minute, so an
    attempt of a caller with a token is not hidden by those of others behind the same proxy.
    Strangers and callers with a token are limited apart: strangers use up no event of the others.
    """

    def __init__(self, trail: AuditTrail, clock: Clock) -> None:
        self._trail = trail
        self._strangers = RefusalLimit(clock.monotonic)
        self._known = RefusalLimit(clock.monotonic)

    def record(
        self,
        scope: Scope,
        status: int,
        action: Action = Action.ACCESS,
        *,
        actor: str = ANONYMOUS.name,
    ) -> None:
        """Record a refused request, unless there is such an event of the last minute."""
        anonymous = actor == ANONYMOUS.name
        if scope["method"] not in CHANGING and anonymous and not has_credentials(scope):
            return
        address = peer_of(scope)
        limit = self._strangers if anonymous else self._known
        others = limit.others((actor, action, address))
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
