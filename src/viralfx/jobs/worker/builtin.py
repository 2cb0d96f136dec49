"""The built-in tasks: ``notifications.webhook``, ``analytics.rollup_health``, ``default.prune``."""

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta

from viralfx.core.clock import Clock, timestamp
from viralfx.domain.health.model import CheckReport, Status, Transition
from viralfx.domain.health.monitor import HealthMonitor
from viralfx.domain.webhooks.delivery import WebhookDelivery, WebhookMessage, WebhookRetryPolicy
from viralfx.domain.webhooks.url import WebhookRefusedError
from viralfx.jobs.ledger import JobLedger
from viralfx.jobs.schedule import HOURLY
from viralfx.jobs.tasks import JobContext, Task, declared_task, task
from viralfx.jobs.worker.maintenance import Retention
from viralfx.resilience.deadline import Deadline

_WEBHOOK_MARGIN_SECONDS = 5.0

SendWebhook = Callable[[WebhookMessage, JobContext], Awaitable[dict[str, int]]]


def send_webhook(
    delivery: WebhookDelivery, *, alert_url: str | None, timeout: float
) -> SendWebhook:
    """Return the task. ``timeout`` is the longest time of a delivery, in seconds."""

    @task(
        "notifications.webhook",
        queue="notifications",
        retry=WebhookRetryPolicy(),
        timeout=timeout + _WEBHOOK_MARGIN_SECONDS,
        api=False,
    )
    async def send(message: WebhookMessage, context: JobContext) -> dict[str, int]:
        """Send one webhook; its ``webhook-id`` is the job's id in every attempt."""
        body = message.body(context.created_at)
        if message.url is not None:
            status = await delivery.deliver(message.url, message_id=context.id, body=body)
            return {"status": status}
        if alert_url is None:
            raise WebhookRefusedError("ALERT_WEBHOOK_URL is not set: alerts go nowhere")
        status = await delivery.deliver_alert(
            alert_url,
            message_id=context.id,
            body=body,
            proven=delivery.is_proven(message, context.id),
        )
        return {"status": status}

    return send


ROLLUP_SECONDS = 3600.0
"""The time that a rollup covers: an hour, as it runs hourly."""
_PRUNE_TIMEOUT_SECONDS = 120.0
_PRUNE_MARGIN_SECONDS = 20.0

PruneJobs = Callable[[None, JobContext], Awaitable[dict[str, int]]]


def prune_jobs(ledger: JobLedger, *, retention: Retention, clock: Clock) -> PruneJobs:
    """Return the task. The leader among the workers prunes too, so it often finds no job."""

    @task(
        "default.prune",
        queue="default",
        timeout=_PRUNE_TIMEOUT_SECONDS,
        cron=HOURLY,
        catch_up=True,
        api=False,
    )
    async def prune(_payload: None, context: JobContext) -> dict[str, int]:
        """Delete final jobs in batches, until none is old enough or the time is up."""
        seconds = context.deadline.remaining() - _PRUNE_MARGIN_SECONDS
        if seconds <= 0:
            return {"pruned": 0}
        pruned = await retention.prune(ledger, Deadline(seconds, clock=clock), clock)
        return {"pruned": pruned}

    return prune


RollupHealth = Callable[[None], Awaitable[dict[str, object]]]


def rollup_health(
    monitor: HealthMonitor, *, clock: Clock, period: float, instance: str
) -> RollupHealth:
    """Return the task, which covers the last ``period`` seconds."""

    @task(
        "analytics.rollup_health",
        queue="analytics",
        timeout=30.0,
        cron=HOURLY,
        catch_up=True,
        api=False,
    )
    async def rollup(_payload: None) -> dict[str, object]:
        """Return how long each check of this process had each status."""
        now, report, counts = clock.now(), monitor.report(), monitor.transition_counts
        since = now - timedelta(seconds=period)
        recent = [each for each in monitor.history if each.at > since]
        return {
            "instance": instance,
            "from": timestamp(since),
            "to": timestamp(now),
            "health": str(report.health),
            "checks": {
                name: {
                    "status": str(check.status),
                    "transitions": counts.get(name, 0),
                    "seconds": seconds_in_each(
                        check, [each for each in recent if each.check == name], since, now
                    ),
                }
                for name, check in report.checks.items()
            },
        }

    return rollup


def seconds_in_each(
    check: CheckReport, recent: Sequence[Transition], since: datetime, now: datetime
) -> dict[str, float]:
    """Return how many seconds a check had each status between two moments.

    ``recent`` is its changes in between, oldest first. Time before its first result does not count.
    """
    seconds = dict.fromkeys(map(str, Status), 0.0)
    begun: datetime | None = since
    status = recent[0].old if recent else check.status
    for change in recent:
        if status is not None and begun is not None:
            seconds[str(status)] += (change.at - begun).total_seconds()
        begun, status = change.at, change.new
    if status is not None and begun is not None:
        seconds[str(status)] += (now - begun).total_seconds()
    return {name: round(total, 3) for name, total in seconds.items()}


def built_in_tasks(
    *,
    ledger: JobLedger,
    monitor: HealthMonitor,
    clock: Clock,
    delivery: WebhookDelivery,
    alert_url: str | None,
    webhook_timeout: float,
    retention: Retention,
    instance: str,
) -> Sequence[Task]:
    """Return ``notifications.webhook``, ``analytics.rollup_health`` and ``default.prune``.

    ``webhook_timeout`` is the longest time of a delivery, in seconds; ``instance`` is the name of
    this process.
    """
    functions = (
        send_webhook(delivery, alert_url=alert_url, timeout=webhook_timeout),
        rollup_health(monitor, clock=clock, period=ROLLUP_SECONDS, instance=instance),
        prune_jobs(ledger, retention=retention, clock=clock),
    )
    return [task for each in functions if (task := declared_task(each)) is not None]
