"""Spans of requests and jobs, at minimal cost for requests that are not sampled.

The sampling decision comes first. A request that is not sampled only gets a trace id, for logs and
outgoing calls (ADR-0026). Acceptance and execution of a job share one trace, also across processes.
"""

import random
import re
from collections.abc import (
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from contextlib import contextmanager
from contextvars import Token
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeAlias

from opentelemetry.context import Context, attach, detach
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    Tracer,
    get_current_span,
)
from opentelemetry.trace.propagation import set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from viralfx.core.correlation import correlated, current_correlation_id, is_traceparent
from viralfx.jobs.hooks import Ended
from viralfx.jobs.ledger import Accepted
from viralfx.jobs.model import Claim, JobDraft, JobState, Settlement, correlation_id_of_job
from viralfx.telemetry import CLIENT_DISCONNECTED, METHODS, OTHER, TRACE, WEBSOCKET
from viralfx.telemetry.tracing.cleaning import KEPT_CLIENT_CHARACTERS
from viralfx.telemetry.tracing.provider import OrphanDroppingSampler, with_trace_id

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"

EMPTY_CONTEXT = Context()
"""A context without span and baggage; clients' baggage is not trusted."""

_propagator = TraceContextTextMapPropagator()
_MAX_STATE_CHARACTERS = 512
_MAX_STATE_MEMBERS = 32
# A malformed member discards the whole tracestate without a log line. The library would log one
# for each, and clients control the header.
_MEMBER = re.compile(
    r"[a-z0-9][a-z0-9_\-*/@]{0,255}=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
).fullmatch


def remote_parent(traceparents: Sequence[str], tracestates: Sequence[str] = ()) -> Context:
    """Return the caller's context; the empty context if its headers are missing or malformed."""
    if len(traceparents) != 1 or not is_traceparent(traceparents[0]):
        return EMPTY_CONTEXT
    carrier = {TRACEPARENT: traceparents[0]}
    if tracestates and (state := _valid_state(",".join(tracestates))):
        carrier[TRACESTATE] = state
    return _propagator.extract(carrier, context=EMPTY_CONTEXT)


def headers_of(span_context: SpanContext) -> Mapping[str, str]:
    """Return the W3C headers that propagate a span; empty for an invalid one."""
    if not span_context.is_valid:
        return {}
    headers = {TRACEPARENT: traceparent_of(span_context)}
    if span_context.trace_state:
        headers[TRACESTATE] = span_context.trace_state.to_header()
    return headers


def traceparent_of(span_context: SpanContext) -> str:
    """Return the W3C ``traceparent`` of a span."""
    ids = f"{span_context.trace_id:032x}-{span_context.span_id:016x}"
    return f"00-{ids}-{span_context.trace_flags:02x}"


def is_sampled(traceparent: str) -> bool:
    """Return whether a ``traceparent`` of this project belongs to a recorded span."""
    return bool(int(traceparent[-2:], 16) & 1)


def current_ids() -> tuple[str, str] | None:
    """Return trace id and span id of the current span; None if it is not recorded."""
    span_context = get_current_span().get_span_context()
    if not span_context.trace_flags.sampled:
        return None
    return f"{span_context.trace_id:032x}", f"{span_context.span_id:016x}"


def _valid_state(state: str) -> str:
    if len(state) > _MAX_STATE_CHARACTERS:
        return ""
    members = [member for each in state.split(",") if (member := each.strip(" \t"))]
    keys = {member.partition("=")[0] for member in members}
    fits = len(keys) == len(members) <= _MAX_STATE_MEMBERS and all(map(_MEMBER, members))
    return ",".join(members) if fits else ""


def generated_trace_id(headers: Iterable[tuple[bytes, bytes]]) -> int | None:
    """Return the correlation id of a request as a trace id if this process generated it.

    None if the client sent the id, or a trace that goes on.
    """
    own = current_correlation_id()
    for name, value in headers:
        if name in _HEADERS:
            text = value.decode("latin-1")
            if text == own or (name == b"traceparent" and is_traceparent(text)):
                return None
    return None if own is None else int(own, 16)


_Scope: TypeAlias = MutableMapping[str, Any]
_Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_App: TypeAlias = Callable[[_Scope, _Receive, _Send], Awaitable[None]]

_HEADERS = frozenset({b"traceparent", b"tracestate", b"x-correlation-id", b"x-request-id"})
_MIN_SERVER_ERROR = 500
_MAX_PORT_DIGITS = 5
_SWITCHING = 101
_TRACED = frozenset({"http", "websocket"})


class TracedRequests:
    """ASGI middleware that makes a span of each request and WebSocket that is recorded."""

    def __init__(
        self,
        app: _App,
        tracer: Tracer,
        sampler: OrphanDroppingSampler | None = None,
        *,
        route_of: Callable[[_Scope], str | None] = lambda _: None,
        cause_of: Callable[[BaseException], BaseException] = lambda error: error,
    ) -> None:
        """``sampler`` is the tracer's, if it can decide quickly which requests to drop.

        The web framework defines the other two. ``route_of`` returns the route template of a scope
        after the request. ``cause_of`` returns the application's error without wrappers.
        """
        self._app = app
        self._tracer = tracer
        self._sampler = sampler
        self._route_of = route_of
        self._cause_of = cause_of

    def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> Awaitable[None]:
        """Serve one ASGI scope; requests and WebSockets are traced."""
        # Not a coroutine: requests that are not recorded need none.
        if scope["type"] not in _TRACED:
            return self._app(scope, receive, send)
        span = self._begin(scope)
        # Attached for the rest of the task, like the correlation id, so that the access log and
        # the metrics find the span after the application has returned.
        attach(set_span_in_context(span, EMPTY_CONTEXT))
        if not span.is_recording():
            return self._app(scope, receive, send)
        return self._record(span, scope, receive, send)

    def _begin(self, scope: _Scope) -> Span:
        parents: list[str] = []
        states: list[str] = []
        own = current_correlation_id()
        for name, value in scope["headers"]:
            if name not in _HEADERS:
                continue
            text = value.decode("latin-1")
            if name == b"traceparent":
                parents.append(text)
            elif name == b"tracestate":
                states.append(text)
            elif text == own:
                own = None
        # If the client sent no usable correlation id, this process generated one, and the trace
        # gets the same id.
        chosen = int(own, 16) if own is not None else random.getrandbits(128)
        if not parents:
            dropped = chosen if self._drops_trace(chosen) else None
        else:
            dropped = self._drops_continued(parents, states)
        if dropped is not None:
            return _Dropped(dropped)
        method = scope.get("method", "GET")  # a handshake is always a GET
        attributes = {
            "http.request.method": method if method in METHODS else OTHER,
            "url.path": scope["path"][:KEPT_CLIENT_CHARACTERS],
            "url.scheme": scope.get("scheme", "http"),
        }
        name = _name_of(scope)
        parent = remote_parent(parents, states) if parents else EMPTY_CONTEXT
        with with_trace_id(chosen if parent is EMPTY_CONTEXT else None):
            span = self._tracer.start_span(name, parent, SpanKind.SERVER, attributes)
        return span if span.is_recording() else _Dropped(chosen, span.get_span_context())

    def _drops_trace(self, trace_id: int) -> bool:
        return self._sampler is not None and self._sampler.drops_trace(trace_id)

    def _drops_continued(self, parents: Sequence[str], states: Sequence[str]) -> int | None:
        # A tracestate is passed on even if nothing is recorded, so it takes the slow path.
        if self._sampler is None or len(parents) > 1 or states:
            return None
        return self._sampler.drops_continued(parents[0])

    async def _record(self, span: Span, scope: _Scope, receive: _Receive, send: _Send) -> None:
        end = _End()

        def send_and_note(message: MutableMapping[str, Any]) -> Awaitable[None]:
            end.note_sent(message)
            return send(message)

        async def receive_and_note() -> MutableMapping[str, Any]:
            message = await receive()
            end.note_received(message)
            return message

        context = span.get_span_context()
        scope[TRACE] = (f"{context.trace_id:032x}", f"{context.span_id:016x}")
        span.set_attributes(_request_attributes(scope))
        try:
            websocket = scope["type"] == "websocket"
            await self._app(scope, receive_and_note if websocket else receive, send_and_note)
        except BaseException as error:
            cause = self._cause_of(error)
            span.set_attribute("error.type", type(cause).__qualname__)
            span.set_status(StatusCode.ERROR)
            if isinstance(cause, Exception):
                span.record_exception(cause)
            raise
        finally:
            if route := self._route_of(scope):
                span.update_name(f"{_name_of(scope)} {route}")
                span.set_attribute("http.route", route)
            if end.close_code is not None:
                span.set_attribute("viralfx.websocket.close_code", end.close_code)
            if (status := end.status) is not None and not scope.get(CLIENT_DISCONNECTED):
                span.set_attribute("http.response.status_code", status)
                if status >= _MIN_SERVER_ERROR:
                    span.set_attribute("error.type", str(status))
                    span.set_status(StatusCode.ERROR)
            span.end()


class _End:
    """The status of a response, and the close code of a WebSocket."""

    __slots__ = ("close_code", "status")

    def __init__(self) -> None:
        self.status: int | None = None
        self.close_code: int | None = None

    def note_sent(self, message: MutableMapping[str, Any]) -> None:
        kind = message["type"]
        if kind in {"http.response.start", "websocket.http.response.start"}:
            self.status = message["status"]
        elif kind == "websocket.accept":
            self.status = _SWITCHING
        elif kind == "websocket.close":
            if self.status is None:
                self.status = 403  # the server's response
            elif self.close_code is None:
                self.close_code = message.get("code") or 1000

    def note_received(self, message: MutableMapping[str, Any]) -> None:
        opened = self.status == _SWITCHING
        if opened and message["type"] == "websocket.disconnect" and self.close_code is None:
            self.close_code = message.get("code") or 1005


class _Dropped(NonRecordingSpan):
    """The span of a request that is not recorded; its context is created on demand."""

    def __init__(self, trace_id: int, known: SpanContext | None = None) -> None:
        self._trace_id = trace_id
        self._known = known

    def get_span_context(self) -> SpanContext:
        """Return the context for outgoing calls."""
        if self._known is None:
            # No recorded span refers to this one, so a random id suffices.
            self._known = SpanContext(
                self._trace_id,
                random.getrandbits(64),
                is_remote=False,
                trace_flags=TraceFlags(TraceFlags.DEFAULT),
            )
        return self._known

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.get_span_context()!r})"


def _name_of(scope: _Scope) -> str:
    if scope["type"] == "websocket":
        return WEBSOCKET
    method: str = scope["method"]
    return method if method in METHODS else "HTTP"


def _request_attributes(scope: _Scope) -> dict[str, str | int]:
    attributes: dict[str, str | int] = {
        "network.protocol.version": scope.get("http_version", "1.1")
    }
    if scope["type"] == "websocket":
        attributes["network.protocol.name"] = "websocket"
    elif scope["method"] not in METHODS:
        attributes["http.request.method_original"] = scope["method"][:KEPT_CLIENT_CHARACTERS]
    if scope.get("client"):
        attributes["client.address"] = scope["client"][0]
    host = ""
    for name, value in scope["headers"]:
        if name == b"host":
            host = value.decode("latin-1")[:KEPT_CLIENT_CHARACTERS]
        elif name == b"user-agent":
            attributes["user_agent.original"] = value.decode("latin-1")[:KEPT_CLIENT_CHARACTERS]
    address, _, port = host.rpartition(":")
    if address and port.isascii() and port.isdecimal() and len(port) <= _MAX_PORT_DIGITS:
        attributes["server.address"] = address
        attributes["server.port"] = int(port)
    elif host:
        attributes["server.address"] = host
    elif scope.get("server"):
        attributes["server.address"] = scope["server"][0]
    return attributes


_SYSTEM = "viralfx"


class TracedJobs:
    """Records acceptances and executions as spans; a :class:`JobHooks`."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    @contextmanager
    def accepting(self, draft: JobDraft) -> Iterator[JobDraft]:
        """Record an acceptance as ``send {queue}`` and make it the parent of the job's spans.

        Its own parent is the current span, or else the one in the draft's ``traceparent``.
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
        """Make the first sampled draft the parent of the statements that store a batch."""
        for draft in drafts:
            if draft.traceparent is not None and is_sampled(draft.traceparent):
                break
        else:
            yield
            return
        token = attach(remote_parent([draft.traceparent]))
        try:
            with correlated(correlation_id_of_job(draft)):
                yield
        finally:
            detach(token)

    def accepted(self, accepted: Accepted) -> None:
        """Do nothing: the span ends with :meth:`accepting`."""

    def executing(self, claim: Claim) -> "_TracedExecution":
        """Record an execution as ``process {queue}``, a child of the job's ``send`` span."""
        return _TracedExecution(self._tracer, claim)


class _TracedExecution:
    __slots__ = ("_claim", "_span", "_token", "_tracer")

    def __init__(self, tracer: Tracer, claim: Claim) -> None:
        self._tracer = tracer
        self._claim = claim

    def __enter__(self) -> Ended:
        claim = self._claim
        parent = remote_parent([claim.traceparent]) if claim.traceparent else EMPTY_CONTEXT
        attributes = _attributes(claim, correlation_id_of_job(claim), "process", "process")
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
            # Only a cancellation gets here: the worker abandons the execution or shuts down.
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
        if settlement.state is JobState.CANCELLED:
            span.add_event("viralfx.job.cancelled")
            return
        if error is None:
            span.add_event("viralfx.job.handed_back")
            return
        # The message may quote a row, so it is only in the log and in the job.
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
