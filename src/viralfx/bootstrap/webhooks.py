"""Wires webhooks, and the alerts that leave as such."""

from collections.abc import Mapping

from viralfx.domain.clock import Clock
from viralfx.domain.jobs.alerts import HealthAlerts
from viralfx.domain.jobs.service import JobService
from viralfx.domain.monitor import HealthMonitor
from viralfx.domain.webhooks.allowed import AllowList
from viralfx.domain.webhooks.delivery import Answer, WebhookDelivery, WebhookSender
from viralfx.domain.webhooks.destinations import Destination
from viralfx.domain.webhooks.errors import WebhookRefusedError
from viralfx.domain.webhooks.hosts import HostCircuits
from viralfx.domain.webhooks.signature import Signer, parse_secrets
from viralfx.settings import Settings
from viralfx.telemetry.observed import log_circuit


def wire_webhooks(settings: Settings, clock: Clock, *, runs_jobs: bool) -> WebhookDelivery:
    """Wire the delivery of webhooks. A process that runs no jobs gets one that sends none.

    The settings must be free of contradictions.
    """
    secret = settings.webhook.secret
    allowed = AllowList(settings.webhook.allowed_hosts, also=alert_url(settings))
    return WebhookDelivery(
        allowed=allowed,
        signer=None if secret is None else Signer(parse_secrets(secret.value)),
        sender=_sender(settings, allowed) if runs_jobs and not allowed.empty else _NoSender(),
        circuits=HostCircuits(listeners=(log_circuit,), clock=clock),
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


def _sender(settings: Settings, allowed: AllowList) -> WebhookSender:
    # Not at the top: most processes send no webhook, and it costs as much as the rest of a start.
    from viralfx.adapters.http import HttpWebhookSender  # noqa: PLC0415

    return HttpWebhookSender(allowed.check_addresses, timeout=settings.webhook.timeout / 1000)


class _NoSender:
    """Stands where nothing is to be sent: the allow list is empty, or jobs are run elsewhere."""

    async def post(
        self,
        destination: Destination,  # noqa: ARG002 - the port's
        headers: Mapping[str, str],  # noqa: ARG002
        body: bytes,  # noqa: ARG002
    ) -> Answer:
        """See the port."""
        raise WebhookRefusedError("this process sends no webhooks")
