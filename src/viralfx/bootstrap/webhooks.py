"""Wires webhooks, and the alerts that leave as such."""

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from viralfx.domain.clock import Clock
from viralfx.domain.events import Listener
from viralfx.domain.jobs.alerts import HealthAlerts
from viralfx.domain.jobs.service import JobService
from viralfx.domain.monitor import HealthMonitor
from viralfx.domain.resilience.circuit import CircuitEvent
from viralfx.domain.single_flight import SingleFlight
from viralfx.domain.webhooks.allowed import AllowList
from viralfx.domain.webhooks.delivery import Answer, WebhookDelivery, WebhookSender
from viralfx.domain.webhooks.destinations import Destination
from viralfx.domain.webhooks.hosts import HostCircuits
from viralfx.domain.webhooks.signature import Signer, parse_secrets
from viralfx.settings import Settings
from viralfx.telemetry.observed import log_circuit

if TYPE_CHECKING:
    from viralfx.telemetry.tracing.wiring import Tracing


def wire_webhooks(
    settings: Settings,
    clock: Clock,
    *,
    listeners: tuple[Listener[CircuitEvent], ...] = (),
    tracing: "Tracing | None" = None,
) -> WebhookDelivery:
    """Wire the delivery of webhooks; the settings must be free of contradictions.

    What sends them is loaded with the first one. ``listeners`` are told of the circuits of those
    who receive them.
    """
    secret = settings.webhook.secret
    if tracing is not None:
        listeners = (*listeners, tracing.on_circuit)
    allowed = AllowList(settings.webhook.allowed_hosts, also=alert_url(settings))
    return WebhookDelivery(
        allowed=allowed,
        signer=None if secret is None else Signer(parse_secrets(secret.value)),
        sender=_LateSender(lambda: _sender(settings, allowed, tracing)),
        circuits=HostCircuits(listeners=(log_circuit, *listeners), clock=clock),
        clock=clock,
    )


def alert_url(settings: Settings) -> str | None:
    """Return where alerts go, None for nowhere."""
    return None if settings.alert_webhook_url is None else settings.alert_webhook_url.value.strip()


def wire_alerts(
    settings: Settings, clock: Clock, service: JobService, monitor: HealthMonitor, instance: str
) -> HealthAlerts | None:
    """Subscribe alerts to the monitor, None where they would go nowhere.

    ``instance`` is this process's name. Their ``run()`` is to be kept going, and left by
    :class:`viralfx.domain.jobs.alerts.StopAlerts`.
    """
    if settings.alert_webhook_url is None:
        return None
    alerts = HealthAlerts(
        service,
        clock=clock,
        instance=instance,
        environment=settings.environment,
        shared=lambda check: monitor.policy(check).shared,
    )
    monitor.subscribe(alerts)
    return alerts


def _sender(settings: Settings, allowed: AllowList, tracing: "Tracing | None") -> WebhookSender:
    # Not at the top: most processes send no webhook, and it costs as much as the rest of a start.
    from viralfx.adapters.http import HttpWebhookSender  # noqa: PLC0415

    sender = HttpWebhookSender(allowed.check_addresses, timeout=settings.webhook.timeout / 1000)
    return sender if tracing is None else tracing.webhooks(sender)


class _LateSender:
    """Makes the sender, in a thread, when something is to be sent."""

    def __init__(self, make: Callable[[], WebhookSender]) -> None:
        self._make = make
        self._making = SingleFlight[WebhookSender]()
        self._sender: WebhookSender | None = None

    async def post(
        self, destination: Destination, headers: Mapping[str, str], body: bytes
    ) -> Answer:
        """See the port."""
        if self._sender is None:
            self._sender = await self._making.run("", lambda: asyncio.to_thread(self._make))
        return await self._sender.post(destination, headers, body)
