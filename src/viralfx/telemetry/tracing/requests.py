"""Requests: one span for each that is recorded, and as little as possible for all others.

The decision is the first thing that happens. Most requests are not recorded: for them only the
trace's id is put where logs and outgoing calls find it (ADR-0026).
"""

import random
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, TypeAlias

from opentelemetry.context import attach
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

from viralfx.domain.correlation import current_correlation_id
from viralfx.telemetry.requests import CLIENT_LEFT, METHODS, OTHER, cause_of, mount_of
from viralfx.telemetry.trace_context import TRACE
from viralfx.telemetry.tracing.cleaning import KEPT_OF_A_CLIENT
from viralfx.telemetry.tracing.context import NOTHING, remote_parent
from viralfx.telemetry.tracing.sampling import WithoutOrphans, trace_called

_Scope: TypeAlias = MutableMapping[str, Any]
_Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_App: TypeAlias = Callable[[_Scope, _Receive, _Send], Awaitable[None]]

_HEADERS = frozenset({b"traceparent", b"tracestate", b"x-correlation-id", b"x-request-id"})
_FIRST_SERVER_ERROR = 500
_DIGITS_OF_A_PORT = 5


class TracedRequests:
    """An ASGI application around another."""

    def __init__(self, app: _App, tracer: Tracer, sampler: WithoutOrphans | None = None) -> None:
        """``sampler`` is the tracer's, if it can say quickly what it drops."""
        self._app = app
        self._tracer = tracer
        self._sampler = sampler

    def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> Awaitable[None]:
        """Serve one connection's scope; only requests are traced."""
        # No coroutine of its own: most requests are not recorded, and need none.
        if scope["type"] != "http":
            # A server may begin it in the context of the connection's last request.
            if scope["type"] == "websocket" and _is_over(get_current_span()):
                attach(NOTHING)
            return self._app(scope, receive, send)
        span = self._begin(scope)
        # For the rest of this task, as the correlation id is: who measures and logs the request
        # afterwards is to find it, too.
        attach(set_span_in_context(span, NOTHING))
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
        # Where nobody named the conversation, or by no name that can be used, its id was made here,
        # and the trace takes it as well.
        chosen = int(own, 16) if own is not None else random.getrandbits(128)
        if not parents:
            dropped = chosen if self._drops_trace(chosen) else None
        else:
            dropped = self._drops_continued(parents, states)
        if dropped is not None:
            return _Dropped(dropped)
        method = scope["method"]
        attributes = {
            "http.request.method": method if method in METHODS else OTHER,
            "url.path": scope["path"][:KEPT_OF_A_CLIENT],
            "url.scheme": scope.get("scheme", "http"),
        }
        name = method if method in METHODS else "HTTP"
        parent = remote_parent(parents, states) if parents else NOTHING
        with trace_called(chosen if parent is NOTHING else None):
            span = self._tracer.start_span(name, parent, SpanKind.SERVER, attributes)
        return span if span.is_recording() else _Dropped(chosen, span.get_span_context())

    def _drops_trace(self, trace_id: int) -> bool:
        return self._sampler is not None and self._sampler.drops_trace(trace_id)

    def _drops_continued(self, parents: Sequence[str], states: Sequence[str]) -> int | None:
        # What a caller's state says is passed on, also where nothing is recorded.
        if self._sampler is None or len(parents) > 1 or states:
            return None
        return self._sampler.drops_continued(parents[0])

    async def _record(self, span: Span, scope: _Scope, receive: _Receive, send: _Send) -> None:
        status: int | None = None

        def watch(message: MutableMapping[str, Any]) -> Awaitable[None]:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            return send(message)

        context = span.get_span_context()
        scope[TRACE] = (f"{context.trace_id:032x}", f"{context.span_id:016x}")
        span.set_attributes(_particulars(scope))
        try:
            await self._app(scope, receive, watch)
        except BaseException as error:
            cause = cause_of(error)
            span.set_attribute("error.type", type(cause).__qualname__)
            span.set_status(StatusCode.ERROR)
            if isinstance(cause, Exception):
                span.record_exception(cause)
            raise
        finally:
            # Litestar leaves the template of the route that it found in the scope; an empty one
            # where another application is mounted.
            if route := scope.get("path_template") or mount_of(scope):
                method = scope["method"]
                span.update_name(f"{method if method in METHODS else 'HTTP'} {route}")
                span.set_attribute("http.route", route)
            if status is not None and not scope.get(CLIENT_LEFT):
                span.set_attribute("http.response.status_code", status)
                if status >= _FIRST_SERVER_ERROR:
                    span.set_attribute("error.type", str(status))
                    span.set_status(StatusCode.ERROR)
            span.end()


class _Dropped(NonRecordingSpan):
    """The span of a request that is not recorded; most are asked for no more than that."""

    def __init__(self, trace_id: int, known: SpanContext | None = None) -> None:
        self._trace_id = trace_id
        self._known = known

    def get_span_context(self) -> SpanContext:
        """Return what calls to others are told of it."""
        if self._known is None:
            # Nobody refers to a span that is not recorded: any id will do.
            self._known = SpanContext(
                self._trace_id,
                random.getrandbits(64),
                is_remote=False,
                trace_flags=TraceFlags(TraceFlags.DEFAULT),
            )
        return self._known

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.get_span_context()!r})"


def _is_over(span: Span) -> bool:
    return isinstance(span, _Dropped) or getattr(span, "end_time", None) is not None


def _particulars(scope: _Scope) -> dict[str, str | int]:
    attributes: dict[str, str | int] = {"network.protocol.version": scope["http_version"]}
    if scope["method"] not in METHODS:
        attributes["http.request.method_original"] = scope["method"][:KEPT_OF_A_CLIENT]
    if scope.get("client"):
        attributes["client.address"] = scope["client"][0]
    host = ""
    for name, value in scope["headers"]:
        if name == b"host":
            host = value.decode("latin-1")[:KEPT_OF_A_CLIENT]
        elif name == b"user-agent":
            attributes["user_agent.original"] = value.decode("latin-1")[:KEPT_OF_A_CLIENT]
    address, _, port = host.rpartition(":")
    if address and port.isascii() and port.isdecimal() and len(port) <= _DIGITS_OF_A_PORT:
        attributes["server.address"] = address
        attributes["server.port"] = int(port)
    elif host:
        attributes["server.address"] = host
    elif scope.get("server"):
        attributes["server.address"] = scope["server"][0]
    return attributes
