"""Tests of spans and span events of jobs, webhooks, retries and circuits."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.trace import SpanKind, StatusCode, get_current_span
from tests.unit.tracing.conftest import Finished

from viralfx.core.correlation import bind_user_id
from viralfx.domain.webhooks.delivery import WebhookResponse
from viralfx.domain.webhooks.url import Destination, WebhookUnavailableError, parse_destination
from viralfx.jobs.hooks import CombinedHooks
from viralfx.jobs.model import (
    Claim,
    JobDraft,
    JobError,
    Settlement,
    cancelled,
    completed,
    failed,
    handed_back,
    postponed,
    retried,
)
from viralfx.resilience import retry_decision
from viralfx.resilience.breaker import CircuitBreaker, CircuitOpenError
from viralfx.resilience.retry import retry
from viralfx.telemetry.tracing.setup import TracedSender, trace_circuit, trace_retry
from viralfx.telemetry.tracing.spans import TracedJobs

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
DRAFT = JobDraft(
    id="0190b0f4-0000-7000-8000-000000000001",
    queue="default",
    task="parcels.ship",
    payload=b"{}",
    correlation_id="order-17",
)
CLAIM = Claim(
    id=DRAFT.id,
    queue="default",
    task="parcels.ship",
    payload=b"{}",
    worker="w",
    number=1,
    attempt=2,
    crashes=0,
    correlation_id="order-17",
    traceparent=None,
    user_id=None,
    created_at=datetime(2026, 11, 26, tzinfo=UTC),
    due_since=0.0,
)
MESSAGING = {
    "messaging.system": "viralfx",
    "messaging.destination.name": "default",
    "messaging.message.id": DRAFT.id,
    "messaging.message.conversation_id": "order-17",
    "viralfx.job.task": "parcels.ship",
}


def by_name(spans: object) -> Mapping[str, ReadableSpan]:
    """Return the spans by name."""
    assert isinstance(spans, tuple)
    return {span.name: span for span in spans}


async def test_spans_have_the_user(provider: TracerProvider, finished: Finished) -> None:
    """That is bound to the task, as an execution does with the user of its job."""
    tracer = provider.get_tracer("test")
    for user in ("ada", None):
        bind_user_id(user)
        with tracer.start_as_current_span(f"user {user}"):
            pass
    spans = by_name(finished())

    assert spans["user ada"].attributes == {"enduser.id": "ada"}
    assert spans["user None"].attributes == {}


def test_an_execution_is_a_child_of_the_acceptance(
    provider: TracerProvider, finished: Finished
) -> None:
    """The acceptance is a child of the request; the job carries only the traceparent."""
    tracer = provider.get_tracer("test")
    jobs = CombinedHooks(TracedJobs(tracer), CombinedHooks())
    with (
        tracer.start_as_current_span("request", kind=SpanKind.SERVER),
        jobs.accepting(replace(DRAFT, traceparent=TRACEPARENT)) as draft,
    ):
        pass
    with jobs.storing([draft]), tracer.start_as_current_span("INSERT", kind=SpanKind.CLIENT):
        pass
    with jobs.executing(CLAIM._replace(traceparent=draft.traceparent)) as ended:
        assert get_current_span().is_recording()
        ended(completed(CLAIM, b"1"))
    spans = by_name(finished())
    request, send, process = spans["request"], spans["send default"], spans["process default"]

    assert len({span.context.trace_id for span in spans.values()}) == 1
    assert send.parent is not None
    assert send.parent.span_id == request.context.span_id
    for child in (process, spans["INSERT"]):
        assert child.parent is not None
        assert child.parent.span_id == send.context.span_id
    assert (send.kind, process.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
    assert send.attributes == {
        **MESSAGING,
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
    }
    assert process.attributes == {
        **MESSAGING,
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "viralfx.job.attempt": 2,
    }
    assert process.status.status_code is StatusCode.UNSET
    assert spans["INSERT"].attributes == {"viralfx.correlation_id": "order-17"}


def test_a_drafts_trace_is_continued_outside_a_request(
    provider: TracerProvider, finished: Finished
) -> None:
    """Without a valid traceparent the job starts a new trace."""
    jobs = TracedJobs(provider.get_tracer("test"))
    for given in (TRACEPARENT, None, "nonsense"):
        with jobs.accepting(replace(DRAFT, traceparent=given)):
            pass
    first, second, third = finished()

    assert f"{first.context.trace_id:032x}" in TRACEPARENT
    assert (second.parent, third.parent) == (None, None)


ERROR = JobError(code="timeout", message="too slow")


@pytest.mark.parametrize(
    ("settlement", "event", "wrong"),
    [
        (retried(CLAIM, ERROR, 2.5), "viralfx.job.attempt_failed", True),
        (failed(CLAIM, ERROR), "viralfx.job.attempt_failed", True),
        (postponed(CLAIM, ERROR, 1.0), "viralfx.job.postponed", False),
        (handed_back(CLAIM), "viralfx.job.handed_back", False),
        (cancelled(CLAIM), "viralfx.job.cancelled", False),
    ],
)
def test_the_outcome_of_a_job_is_a_span_event(
    provider: TracerProvider, finished: Finished, settlement: Settlement, event: str, *, wrong: bool
) -> None:
    """Only a spent attempt sets the error status."""
    with TracedJobs(provider.get_tracer("test")).executing(CLAIM) as ended:
        ended(settlement)
    (span,) = finished()

    assert [each.name for each in span.events] == [event]
    assert (span.status.status_code is StatusCode.ERROR) is wrong
    assert (span.attributes or {}).get("error.type") == ("timeout" if wrong else None)


def test_failed_acceptances_and_abandoned_executions_are_errors(
    provider: TracerProvider, finished: Finished
) -> None:
    """The error propagates to the caller."""
    jobs = TracedJobs(provider.get_tracer("test"))
    with pytest.raises(OSError, match="planted"), jobs.accepting(DRAFT):
        raise OSError("planted")
    with pytest.raises(asyncio.CancelledError), jobs.executing(CLAIM):
        raise asyncio.CancelledError
    spans = finished()

    types = [(span.attributes or {}).get("error.type") for span in spans]
    assert types == ["OSError", "CancelledError"]
    assert {span.status.status_code for span in spans} == {StatusCode.ERROR}


class Sender:
    """Returns a prepared response or raises a prepared error."""

    def __init__(self, answer: WebhookResponse | Exception) -> None:
        self.answer = answer
        self.headers: dict[str, str] = {}

    async def post(
        self, _destination: Destination, headers: Mapping[str, str], _body: bytes
    ) -> WebhookResponse:
        """Record the request."""
        self.headers = dict(headers)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "status", "error"),
    [
        (WebhookResponse(status=204), 204, None),
        (WebhookResponse(status=410), 410, "410"),
        (WebhookUnavailableError("away"), None, "WebhookUnavailableError"),
    ],
)
def test_a_webhook_propagates_the_trace(
    provider: TracerProvider,
    finished: Finished,
    answer: WebhookResponse | Exception,
    status: int | None,
    error: str | None,
) -> None:
    """The span does not contain the path, which may be secret."""
    sender, tracer = Sender(answer), provider.get_tracer("test")
    there = parse_destination("https://hooks.example:8443/services/hunter2?key=hunter2")

    async def send() -> None:
        with tracer.start_as_current_span("job"):
            await TracedSender(sender, tracer).post(there, {"webhook-id": "1"}, b"{}")

    if isinstance(answer, Exception):
        with pytest.raises(type(answer)):
            asyncio.run(send())
    else:
        asyncio.run(send())
    span = by_name(finished())["POST"]
    ids = f"{span.context.trace_id:032x}-{span.context.span_id:016x}"

    assert sender.headers == {
        "webhook-id": "1",
        "traceparent": f"00-{ids}-{span.context.trace_flags:02x}",
    }
    assert span.kind is SpanKind.CLIENT
    attributes = dict(span.attributes or {})
    assert attributes.get("http.response.status_code") == status
    assert attributes.get("error.type") == error
    assert attributes["server.address"] == "hooks.example"
    assert attributes["url.full"] == "https://hooks.example:8443/"
    assert "hunter2" not in span.to_json()


def test_retries_and_circuits_are_events_of_the_callers_span(
    monkeypatch: pytest.MonkeyPatch, provider: TracerProvider, finished: Finished
) -> None:
    """Events: each attempt, the final failure, circuit changes and rejected calls."""
    # An earlier test may have enabled tracing for the whole process.
    monkeypatch.setattr(retry_decision, "_global_listeners", ())
    breaker = CircuitBreaker(2, name="parcels", listeners=(trace_circuit,))

    @retry(attempts=2, base_delay=0.001, name="ship", listeners=(trace_retry,))
    @breaker
    async def ship() -> None:
        raise OSError("planted")

    async def run() -> None:
        with provider.get_tracer("test").start_as_current_span("work"):
            with pytest.raises(OSError, match="planted"):
                await ship()
            with pytest.raises(CircuitOpenError):
                await ship()

    asyncio.run(run())
    (span,) = finished()

    assert [event.name for event in span.events] == [
        "viralfx.retry.attempt_failed",
        "viralfx.circuit.changed",
        "viralfx.retry.attempt_failed",
        "viralfx.retry.gave_up",
        "viralfx.circuit.rejected",
        "viralfx.retry.attempt_failed",
        "viralfx.retry.gave_up",
    ]
    assert span.events[1].attributes == {
        "viralfx.circuit": "parcels",
        "viralfx.circuit.old": "CLOSED",
        "viralfx.circuit.new": "OPEN",
    }
    assert (span.events[3].attributes or {})["viralfx.retry.reason"] == "attempts"
