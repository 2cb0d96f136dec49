"""``notifications.webhook``: sends what happened to whoever wants to know."""

from collections.abc import Awaitable, Callable

from viralfx.domain.jobs.tasks import JobContext, task
from viralfx.domain.webhooks.delivery import WebhookDelivery
from viralfx.domain.webhooks.errors import WebhookRefusedError
from viralfx.domain.webhooks.message import WebhookMessage
from viralfx.domain.webhooks.retries import WebhookRetryPolicy

_MARGIN = 5.0

SendWebhook = Callable[[WebhookMessage, JobContext], Awaitable[dict[str, int]]]


def send_webhook(
    delivery: WebhookDelivery, *, alert_url: str | None, timeout: float
) -> SendWebhook:
    """Return the task. ``timeout`` is the seconds that the delivery takes at most."""

    @task(
        "notifications.webhook",
        queue="notifications",
        retry=WebhookRetryPolicy(),
        timeout=timeout + _MARGIN,
    )
    async def send(message: WebhookMessage, context: JobContext) -> dict[str, int]:
        """Send one webhook; however often it is run, ``webhook-id`` is the job's id."""
        url = alert_url if message.alert else message.url
        if url is None:
            raise WebhookRefusedError("ALERT_WEBHOOK_URL is not set: alerts go nowhere")
        status = await delivery.deliver(
            url,
            message_id=context.id,
            body=message.body(context.created_at),
            unsigned=message.alert,
        )
        return {"status": status}

    return send
