"""Jobs: accepting one and running it are spans of one trace, in whatever processes they happen."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import Token
from dataclasses import replace
from types import TracebackType

from opentelemetry.context import Context, attach, detach
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, get_current_span
from opentelemetry.trace.propagation import set_span_in_context

from viralfx.domain.correlation import correlated
from viralfx.domain.jobs.job import Claim, JobDraft, JobState, Settlement, conversation_of
from viralfx.domain.jobs.ledger import Accepted
from viralfx.domain.jobs.observing import Ended
from viralfx.telemetry.tracing.context import NOTHING, is_sampled, remote_parent, traceparent_of

_SYSTEM = "viralfx"


class TracedJobs:
    """Makes spans of acceptances and executions; a :class:`JobObserver`."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    @contextmanager
    def accepting(self, draft: JobDraft) -> Iterator[JobDraft]:
        """Surround an acceptance by ``send {queue}``, and have the job belong to that.

        It is a child of the current span, or of the one that the draft names.
        """
        attributes = _attributes(draft, draft.correlation_id, "send", "send")
        parent: Context | None = None
        if not get_current_span().get_span_context().is_valid:
            parent = remote_parent([draft.traceparent] if draft.traceparent else [])
        with self._tracer.start_as_current_span(
            f"send {draft.queue}", parent, SpanKind.PRODUCER, attributes
        ) as span:
            try:
                yield replace(draft, traceparent=traceparent_of(span.get_span_context()))
            except Exception as error:
                span.set_attribute("error.type", type(error).__qualname__)
                raise

    @contextmanager
    def storing(self, drafts: Sequence[JobDraft]) -> Iterator[None]:
        """Have the statements that store several jobs belong to the first that is recorded."""
        for draft in drafts:
            if draft.traceparent is not None and is_sampled(draft.traceparent):
                break
        else:
            yield
            return
        token = attach(remote_parent([draft.traceparent]))
        try:
            with correlated(conversation_of(draft)):
                yield
        finally:
            detach(token)

    def accepted(self, accepted: Accepted) -> None:
        """Do nothing: its span is complete."""

    def executing(self, claim: Claim) -> "_Execution":
        """Surround an execution by ``process {queue}``, a child of where it was accepted."""
        return _Execution(self._tracer, claim)


class _Execution:
    __slots__ = ("_claim", "_span", "_token", "_tracer")

    def __init__(self, tracer: Tracer, claim: Claim) -> None:
        self._tracer = tracer
        self._claim = claim

    def __enter__(self) -> Ended:
        claim = self._claim
        parent = remote_parent([claim.traceparent]) if claim.traceparent else NOTHING
        attributes = _attributes(claim, conversation_of(claim), "process", "process")
        attributes["viralfx.job.attempt"] = claim.attempt
        self._span: Span = self._tracer.start_span(
            f"process {claim.queue}", parent, SpanKind.CONSUMER, attributes
        )
        self._token: Token[Context] = attach(set_span_in_context(self._span, parent))
        return self._ended

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            # Only a cancellation comes here: its worker left it behind, or leaves itself.
            self._span.set_status(StatusCode.ERROR, "left behind")
            self._span.set_attribute("error.type", kind.__qualname__)
        self._span.end()
        detach(self._token)

    def _ended(self, settlement: Settlement | None) -> None:
        if settlement is None or settlement.state is JobState.COMPLETED:
            return
        span, error = self._span, settlement.error
        if not span.is_recording():
            return
        if error is None:
            span.add_event("viralfx.job.handed_back")
            return
        # Its message may quote a row; the log and the job itself have it.
        event: dict[str, str | float] = {
            "viralfx.job.attempt": self._claim.attempt,
            "error.type": error.code,
        }
        if settlement.delay is not None:
            event["viralfx.job.delay"] = settlement.delay
        if not settlement.spends_attempt:
            span.add_event("viralfx.job.postponed", event)
            return
        span.add_event("viralfx.job.attempt_failed", event)
        span.set_attribute("error.type", error.code)
        span.set_status(StatusCode.ERROR)


def _attributes(
    job: JobDraft | Claim, correlation_id: str | None, name: str, kind: str
) -> dict[str, str | int]:
    attributes: dict[str, str | int] = {
        "messaging.system": _SYSTEM,
        "messaging.destination.name": job.queue,
        "messaging.operation.name": name,
        "messaging.operation.type": kind,
        "messaging.message.id": job.id,
        "viralfx.job.task": job.task,
    }
    if correlation_id is not None:
        attributes["messaging.message.conversation_id"] = correlation_id
    return attributes
