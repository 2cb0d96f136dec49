"""``notifications.webhook``: its payload, its target and its retries."""

import json
from datetime import UTC, datetime

import pytest
from tests.manual_clock import ManualClock
from tests.unit.webhooks.scripted import KEY, ScriptedSender, delivery_to

from viralfx.adapters.codec import MsgspecCodec
from viralfx.domain.webhooks.delivery import WebhookMessage, WebhookRetryPolicy
from viralfx.domain.webhooks.signature import Signer, WebhookKeys, derived_key
from viralfx.domain.webhooks.url import WebhookRefusedError, WebhookRejectedError
from viralfx.jobs.codec import PayloadError
from viralfx.jobs.tasks import JobContext, declared_task
from viralfx.jobs.worker.builtin import SendWebhook, send_webhook
from viralfx.resilience.deadline import Deadline

CREATED = datetime(2026, 1, 6, 12, tzinfo=UTC)
ALERT_URL = "https://alerts.example.com/hunter2"


def context(attempt: int = 1) -> JobContext:
    """Return the context of one attempt of one job."""
    return JobContext(
        id="job-1",
        attempt=attempt,
        deadline=Deadline(10.0),
        correlation_id="order-17",
        created_at=CREATED,
    )


def sending(
    clock: ManualClock, sender: ScriptedSender, *, alert_url: str | None = ALERT_URL
) -> SendWebhook:
    """Return the task with a delivery to hosts below example.com."""
    delivery = delivery_to("*.example.com", sender=sender, clock=clock)
    return send_webhook(delivery, alert_url=alert_url, timeout=10.0)


def message(**more: object) -> WebhookMessage:
    """Decode a message as a worker does."""
    payload = {"type": "order.shipped", "data": {"id": 7, "name": "Zoë"}, **more}
    decoded = MsgspecCodec().decode(json.dumps(payload).encode(), WebhookMessage)
    assert isinstance(decoded, WebhookMessage)
    return decoded


def test_the_webhook_task_is_declared_as_documented(clock: ManualClock) -> None:
    """Its queue, its policy, and a longer timeout than the delivery."""
    declared = declared_task(sending(clock, ScriptedSender(200)))
    assert declared is not None
    assert (declared.name, declared.queue) == ("notifications.webhook", "notifications")
    assert declared.payload_type is WebhookMessage
    assert isinstance(declared.retry, WebhookRetryPolicy)
    assert declared.timeout == 15.0
    assert not declared.transactional


async def test_a_webhook_goes_to_the_url_of_its_payload(clock: ManualClock) -> None:
    """The result has the status of the response."""
    sender = ScriptedSender(202)
    send = sending(clock, sender)

    assert await send(message(url="https://a.example.com/in"), context()) == {"status": 202}

    (posted,) = sender.posted
    assert posted.destination.host == "a.example.com"
    assert posted.headers["webhook-id"] == "job-1"
    assert json.loads(posted.body) == {
        "type": "order.shipped",
        "timestamp": "2026-01-06T12:00:00.000Z",
        "data": {"id": 7, "name": "Zoë"},
    }


async def test_every_attempt_sends_the_same_message(clock: ManualClock) -> None:
    """The same id and the same bytes."""
    sender = ScriptedSender(200)
    for attempt in (1, 2):
        send = sending(clock, sender)
        await send(message(url="https://a.example.com/in"), context(attempt))
        await clock.advance(3600)
    first, second = sender.posted
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.body == second.body
    assert first.headers["webhook-timestamp"] != second.headers["webhook-timestamp"]


async def test_alerts_go_to_the_alert_url(clock: ManualClock) -> None:
    """Without one they fail for good."""
    sender = ScriptedSender(200)
    await sending(clock, sender)(message(alert=True), context())
    assert sender.posted[0].destination.host == "alerts.example.com"
    with pytest.raises(WebhookRefusedError, match="ALERT_WEBHOOK_URL is not set"):
        await sending(clock, sender, alert_url=None)(message(alert=True), context())
    assert len(sender.posted) == 1


async def test_alerts_without_a_key_are_unsigned_and_other_webhooks_fail(
    clock: ManualClock,
) -> None:
    """The operator sets the address of alerts, and their receivers seldom verify."""
    sender = ScriptedSender(200)
    delivery = delivery_to("*.example.com", sender=sender, clock=clock, key=None)
    send = send_webhook(delivery, alert_url=ALERT_URL, timeout=10.0)
    await send(message(alert=True), context())
    assert "webhook-signature" not in sender.posted[0].headers
    with pytest.raises(WebhookRefusedError, match="WEBHOOK_SECRET is not set"):
        await send(message(url="https://a.example.com/"), context())


async def test_a_job_cannot_forge_a_signed_alert(clock: ManualClock) -> None:
    """Neither an alert without a proof, nor a webhook to the alert URL, has a signature of one."""
    keys = WebhookKeys([KEY])
    sender = ScriptedSender(200)
    delivery = delivery_to("*.example.com", sender=sender, clock=clock, keys=keys)
    send = send_webhook(delivery, alert_url=ALERT_URL, timeout=10.0)
    given = message(alert=True)
    proof = keys.prove("job-1", given.type, given.data)
    of_another = keys.prove("job-2", given.type, given.data)

    await send(message(alert=True, proof=proof), context())
    await send(message(url=ALERT_URL), context())
    await send(message(alert=True), context())
    await send(message(alert=True, proof=of_another), context())

    genuine, webhook, *forged = (posted.headers for posted in sender.posted)
    key = derived_key(KEY, "alert", "https://alerts.example.com:443")
    body = sender.posted[0].body
    seconds = int(genuine["webhook-timestamp"])
    assert genuine["webhook-signature"] == Signer([key]).sign("job-1", seconds, body)
    assert webhook["webhook-signature"] != genuine["webhook-signature"]
    assert all("webhook-signature" not in headers for headers in forged)


async def test_errors_do_not_contain_the_alert_url(clock: ManualClock) -> None:
    """Its path is a secret, and others can read the errors of jobs."""
    with pytest.raises(WebhookRejectedError) as gone:
        await sending(clock, ScriptedSender(410))(message(alert=True), context())
    assert str(gone.value) == "alerts.example.com answered 410"


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ({}, "required field"),
        ({"type": "a", "data": {}}, "either a url or alert: true"),
        ({"type": "a", "data": {}, "alert": False}, "either a url or alert: true"),
        ({"type": "a", "data": {}, "url": "https://a.example.com", "alert": True}, "either a url"),
        ({"type": "", "data": {}, "alert": True}, "type must name"),
        ({"type": "a", "data": [], "alert": True}, "Expected `object`"),
        ({"type": "a", "data": {}, "alert": "true"}, "Expected `bool`"),
        ({"type": "a", "data": {}, "url": "ftp://a.example.com/"}, "https://host/path"),
        ({"type": "a", "data": {}, "url": "https://u:hunter2@a.example.com/"}, "a user or a pass"),
        ({"type": "a", "data": {}, "url": 7}, "Expected `str | null`"),
        (None, "Expected `object`"),
    ],
)
def test_an_unsendable_webhook_is_not_accepted(payload: object, message: str) -> None:
    """The request that submits it fails."""
    with pytest.raises(PayloadError) as refused:
        MsgspecCodec().decode(json.dumps(payload).encode(), WebhookMessage)
    assert message in str(refused.value)
    assert "hunter2" not in str(refused.value)
