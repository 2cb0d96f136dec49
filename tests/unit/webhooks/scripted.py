"""A scripted webhook sender, and a delivery that uses it."""

from collections.abc import Mapping
from dataclasses import dataclass

from viralfx.core.clock import Clock
from viralfx.core.events import Listener
from viralfx.domain.webhooks.delivery import HostCircuits, WebhookDelivery, WebhookResponse
from viralfx.domain.webhooks.signature import WebhookKeys
from viralfx.domain.webhooks.url import AllowList, Destination
from viralfx.resilience.breaker import CircuitEvent

KEY = b"k" * 32


@dataclass(frozen=True)
class Posted:
    """One call of the sender."""

    destination: Destination
    headers: Mapping[str, str]
    body: bytes


class ScriptedSender:
    """Implements the port: returns statuses and responses or raises; the last one repeats."""

    def __init__(self, *script: int | WebhookResponse | BaseException) -> None:
        self.script = list(script)
        self.posted: list[Posted] = []

    async def post(
        self, destination: Destination, headers: Mapping[str, str], body: bytes
    ) -> WebhookResponse:
        """Return or raise the next item of the script."""
        self.posted.append(Posted(destination, headers, body))
        act = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(act, BaseException):
            raise act
        return WebhookResponse(status=act) if isinstance(act, int) else act


def delivery_to(
    *allowed: str,
    sender: ScriptedSender,
    clock: Clock,
    key: bytes | None = KEY,
    keys: WebhookKeys | None = None,
    listeners: tuple[Listener[CircuitEvent], ...] = (),
) -> WebhookDelivery:
    """Return a delivery whose circuits open for a minute after two failures."""
    return WebhookDelivery(
        allowed=AllowList(allowed),
        keys=keys or WebhookKeys(() if key is None else [key]),
        sender=sender,
        circuits=HostCircuits(failure_threshold=2, open_for=60.0, listeners=listeners, clock=clock),
        clock=clock,
    )
