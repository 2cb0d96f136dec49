"""All built-in tasks, and which of them are run once per period."""

from collections.abc import Sequence

from viralfx.domain.clock import Clock
from viralfx.domain.jobs.ledger import JobLedger
from viralfx.domain.jobs.periodic import Periodic
from viralfx.domain.jobs.tasks import Task, declared_task
from viralfx.domain.monitor import HealthMonitor
from viralfx.domain.webhooks.delivery import WebhookDelivery
from viralfx.worker.analytics import rollup_health
from viralfx.worker.notifications import send_webhook
from viralfx.worker.retention import prune_jobs

ROLLUP_PERIOD = 3600.0
PRUNE_PERIOD = 3600.0
"""Seconds."""


def built_in_tasks(
    *,
    ledger: JobLedger,
    monitor: HealthMonitor,
    clock: Clock,
    delivery: WebhookDelivery,
    alert_url: str | None,
    webhook_timeout: float,
    retention: float,
    instance: str,
) -> Sequence[Task]:
    """Return ``notifications.webhook``, ``analytics.rollup_health`` and ``default.prune``.

    ``webhook_timeout`` is the delivery's, ``retention`` the seconds for which finished jobs are
    kept (0: for ever), ``instance`` the name of this process.
    """
    functions = (
        send_webhook(delivery, alert_url=alert_url, timeout=webhook_timeout),
        rollup_health(monitor, clock=clock, period=ROLLUP_PERIOD, instance=instance),
        prune_jobs(ledger, retention=retention),
    )
    return [task for each in functions if (task := declared_task(each)) is not None]


def built_in_periodic() -> Sequence[Periodic]:
    """Return those that are run once per period by all workers together."""
    return [
        Periodic(task="analytics.rollup_health", every=ROLLUP_PERIOD),
        Periodic(task="default.prune", every=PRUNE_PERIOD),
    ]
