"""Delivery: allow list, signature, responses, and the circuit of each host."""

import asyncio

import pytest
from tests.manual_clock import ManualClock
from tests.unit.webhooks.scripted import KEY, ScriptedSender, delivery_to

from viralfx.core.correlation import correlated
from viralfx.core.events import Listener
from viralfx.domain.webhooks.delivery import HostCircuits, WebhookDelivery, WebhookResponse
from viralfx.domain.webhooks.signature import Signer, derived_key, webhook_headers
from viralfx.domain.webhooks.url import (
    WebhookError,
    WebhookRefusedError,
    WebhookRejectedError,
    WebhookUnavailableError,
)
from viralfx.resilience.breaker import CircuitEvent, CircuitOpenError, StateChanged
from viralfx.resilience.breaker_states import CircuitState

URL = "https://hooks.example.com/path?key=hunter2"
THEIRS = derived_key(KEY, "webhook", "https://hooks.example.com:443")
UNAVAILABLE = WebhookUnavailableError("hooks.example.com did not answer")


def delivery(
    clock: ManualClock,
    sender: ScriptedSender,
    *,
    key: bytes | None = KEY,
    listeners: tuple[Listener[CircuitEvent], ...] = (),
) -> WebhookDelivery:
    """Return a delivery that allows all hosts below example.com."""
    allowed = ("*.example.com", "http://*.example.com:81")
    return delivery_to(*allowed, sender=sender, clock=clock, key=key, listeners=listeners)


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
async def test_any_2xx_response_is_a_success(clock: ManualClock, status: int) -> None:
    """The status is returned; the body is unchanged and signed at the clock's time."""
    sender = ScriptedSender(status)

    assert await delivery(clock, sender).deliver(URL, message_id="id-1", body=b"{}") == status

    (posted,) = sender.posted
    assert posted.destination.target == "/path?key=hunter2"
    assert posted.body == b"{}"
    seconds = int(clock.now().timestamp())
    assert posted.headers == webhook_headers(Signer([THEIRS]), "id-1", seconds, b"{}")


async def test_the_correlation_id_is_sent_to_the_receiver(clock: ManualClock) -> None:
    """In a header that is not part of the signature."""
    sender = ScriptedSender(200)
    with correlated("order-17"):
        await delivery(clock, sender).deliver(URL, message_id="id-1", body=b"{}")

    (posted,) = sender.posted
    signed = webhook_headers(Signer([THEIRS]), "id-1", int(clock.now().timestamp()), b"{}")
    assert posted.headers == {**signed, "X-Correlation-ID": "order-17"}


async def test_each_attempt_has_a_new_signature_and_the_same_id(clock: ManualClock) -> None:
    """Receivers can reject old signatures and detect repeated messages."""
    sender = ScriptedSender(429, 200)
    delivering = delivery(clock, sender)
    with pytest.raises(WebhookUnavailableError):
        await delivering.deliver(URL, message_id="id-1", body=b"{}")
    await clock.advance(30)
    await delivering.deliver(URL, message_id="id-1", body=b"{}")

    first, second = (posted.headers for posted in sender.posted)
    assert first["webhook-id"] == second["webhook-id"] == "id-1"
    assert int(second["webhook-timestamp"]) == int(first["webhook-timestamp"]) + 30
    assert first["webhook-signature"] != second["webhook-signature"]


@pytest.mark.parametrize(
    "url", ["https://example.com/", "http://hooks.example.com/", "nonsense", "https://10.0.0.1/"]
)
async def test_a_url_that_is_not_allowed_is_not_sent(clock: ManualClock, url: str) -> None:
    """The sender is not called."""
    sender = ScriptedSender(200)
    with pytest.raises(WebhookRefusedError):
        await delivery(clock, sender).deliver(url, message_id="id-1", body=b"{}")
    assert sender.posted == []


async def test_a_missing_secret_is_an_error_for_all_but_alerts(clock: ManualClock) -> None:
    """The error names the setting."""
    sender = ScriptedSender(200)
    delivering = delivery(clock, sender, key=None)
    with pytest.raises(WebhookRefusedError, match="WEBHOOK_SECRET is not set"):
        await delivering.deliver(URL, message_id="id-1", body=b"{}")
    assert sender.posted == []
    await delivering.deliver_alert(URL, message_id="id-1", body=b"{}", proven=True)
    assert "webhook-signature" not in sender.posted[0].headers


@pytest.mark.parametrize(
    ("response", "error", "retry_after"),
    [
        (WebhookResponse(status=429, retry_after="30"), WebhookUnavailableError, 30.0),
        (WebhookResponse(status=503, retry_after="30"), WebhookUnavailableError, 30.0),
        (WebhookResponse(status=503), WebhookUnavailableError, None),
        (WebhookResponse(status=410), WebhookRejectedError, None),
        (WebhookResponse(status=302), WebhookRejectedError, None),
    ],
)
async def test_any_other_response_is_an_error(
    clock: ManualClock,
    response: WebhookResponse,
    error: type[WebhookError],
    retry_after: float | None,
) -> None:
    """The status decides the type of the error."""
    with pytest.raises(error) as failed:
        await delivery(clock, ScriptedSender(response)).deliver(URL, message_id="i", body=b"")
    assert getattr(failed.value, "retry_after", None) == retry_after
    assert "hunter2" not in str(failed.value)


@pytest.mark.parametrize("failure", [500, 503, UNAVAILABLE])
async def test_the_circuit_of_a_failing_host_opens(
    clock: ManualClock, failure: int | WebhookUnavailableError
) -> None:
    """Calls are rejected with the time of the next one; one success closes the circuit."""
    sender = ScriptedSender(failure, failure, 200)
    events: list[CircuitEvent] = []
    delivering = delivery(clock, sender, listeners=(events.append,))
    for _ in range(2):
        with pytest.raises(WebhookUnavailableError):
            await delivering.deliver(URL, message_id="i", body=b"")
    await clock.advance(20)
    with pytest.raises(CircuitOpenError) as rejected:
        await delivering.deliver(URL, message_id="i", body=b"")
    assert rejected.value.retry_after == 40.0
    assert rejected.value.circuit == "hooks.example.com"
    assert len(sender.posted) == 2

    # Another host, or another port of the same host, has its own circuit.
    assert await delivering.deliver("https://b.example.com/", message_id="i", body=b"") == 200
    other_port = "http://hooks.example.com:81/"
    assert await delivering.deliver(other_port, message_id="i", body=b"") == 200

    await clock.advance(40)
    assert await delivering.deliver(URL, message_id="i", body=b"") == 200
    assert [e.new for e in events if isinstance(e, StateChanged)] == [
        CircuitState.OPEN,
        CircuitState.HALF_OPEN,
        CircuitState.CLOSED,
    ]


@pytest.mark.parametrize("outcome", [200, 404, 410, 429, 302])
async def test_a_rejection_by_the_host_does_not_open_its_circuit(
    clock: ManualClock, outcome: int
) -> None:
    """As a probe it closes the circuit."""
    sender = ScriptedSender(500, *[outcome] * 9, 500, outcome)
    delivering = delivery(clock, sender)
    for _ in range(12):
        try:
            await delivering.deliver(URL, message_id="i", body=b"")
        except WebhookError:
            continue
    assert len(sender.posted) == 12


@pytest.mark.parametrize(
    "neutral", [WebhookRefusedError("not public"), asyncio.CancelledError(), RuntimeError("a bug")]
)
async def test_errors_before_the_host_responds_are_neutral(
    clock: ManualClock, neutral: BaseException
) -> None:
    """An address that is not allowed, a cancelled job, and an internal error."""
    sender = ScriptedSender(*[neutral] * 5, 200)
    delivering = delivery(clock, sender)
    for _ in range(5):
        with pytest.raises(type(neutral)):
            await delivering.deliver(URL, message_id="i", body=b"")
    assert await delivering.deliver(URL, message_id="i", body=b"") == 200


def test_the_number_of_circuits_is_limited() -> None:
    """The least recently used closed one is removed first, an open one last."""
    clock = ManualClock()
    circuits = HostCircuits(max_hosts=3, clock=clock)
    a, b, c = circuits["a"], circuits["b"], circuits["c"]
    a.open()
    assert circuits["b"] is b

    circuits["d"]

    assert len(circuits) == 3
    assert circuits["a"] is a
    assert circuits["b"] is b
    assert circuits["c"] is not c
    for name in "abcdefgh":
        circuits[name].open()
    assert len(circuits) == 3
    assert circuits["h"].state is CircuitState.OPEN
    assert circuits["a"] is not a


@pytest.mark.parametrize("wrong", [{"max_hosts": 0}, {"failure_threshold": 0}, {"open_for": -1.0}])
def test_invalid_arguments_are_rejected_at_construction(wrong: dict[str, float]) -> None:
    """Not at the first webhook."""
    with pytest.raises(ValueError, match="must be"):
        HostCircuits(**wrong)  # type: ignore[arg-type]
