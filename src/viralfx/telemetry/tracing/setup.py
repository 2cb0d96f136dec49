"""The tracing of a process with one provider: events, webhooks, databases, shutdown."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial
from inspect import signature
from types import MethodType
from typing import Any, TypeAlias

from opentelemetry import trace
from opentelemetry.trace import SpanKind, StatusCode, Tracer, get_current_span
from opentelemetry.trace.propagation import set_span_in_context

from viralfx.core.correlation import current_correlation_id
from viralfx.domain.shutdown import (
    Outcome,
    Phase,
    ShutdownEvent,
    ShutdownTriggered,
    StageFinished,
    StageFunction,
    StageReport,
)
from viralfx.domain.webhooks.delivery import WebhookResponse, WebhookSender
from viralfx.domain.webhooks.url import Destination
from viralfx.jobs.hooks import JobHooks
from viralfx.resilience.breaker import CircuitEvent, StateChanged
from viralfx.resilience.retry_decision import AttemptFailed, BudgetExhausted, RetryEvent
from viralfx.telemetry import set_trace_source
from viralfx.telemetry.tracing.export import ReportingExporter
from viralfx.telemetry.tracing.provider import (
    OrphanDroppingSampler,
    choose_trace_id,
    is_own,
    with_trace_id,
)
from viralfx.telemetry.tracing.spans import (
    EMPTY_CONTEXT,
    TracedJobs,
    TracedRequests,
    current_ids,
    generated_trace_id,
    headers_of,
)
from viralfx.telemetry.tracing.variables import sdk_environment


def trace_retry(event: RetryEvent) -> None:
    """Add an event of a retrier to the current span."""
    span = get_current_span()
    if not span.is_recording():
        return
    operation = {"viralfx.retry.operation": event.name}
    if isinstance(event, BudgetExhausted):
        span.add_event("viralfx.retry.budget_exhausted", operation)
        return
    failure = {**operation, "error.type": type(event.error).__qualname__}
    if isinstance(event, AttemptFailed):
        known: dict[str, str | int | float] = {**failure, "viralfx.retry.attempt": event.attempt}
        if event.delay is not None:
            known["viralfx.retry.delay"] = event.delay
        span.add_event("viralfx.retry.attempt_failed", known)
        return
    span.add_event(
        "viralfx.retry.gave_up",
        {
            **failure,
            "viralfx.retry.attempts": event.attempts,
            "viralfx.retry.reason": str(event.reason),
        },
    )


def trace_circuit(event: CircuitEvent) -> None:
    """Add an event of a circuit breaker to the span of the call that caused it."""
    span = get_current_span()
    if not span.is_recording():
        return
    if isinstance(event, StateChanged):
        span.add_event(
            "viralfx.circuit.changed",
            {
                "viralfx.circuit": event.name,
                "viralfx.circuit.old": str(event.old),
                "viralfx.circuit.new": str(event.new),
            },
        )
        return
    span.add_event(
        "viralfx.circuit.rejected",
        {"viralfx.circuit": event.name, "viralfx.operation": event.operation},
    )


_logger = logging.getLogger("viralfx.tracing")

_MIN_ERROR_STATUS = 400


class TracedSender:
    """A :class:`WebhookSender` that records a span around another sender's request.

    The span names only the host, because the path of a webhook is often a secret.
    """

    def __init__(self, inner: WebhookSender, tracer: Tracer) -> None:
        self._inner = inner
        self._tracer = tracer

    async def post(
        self, destination: Destination, headers: Mapping[str, str], body: bytes
    ) -> WebhookResponse:
        """Send the webhook with trace headers added; raises the errors of the inner sender."""
        attributes: dict[str, str | int] = {
            "http.request.method": "POST",
            "url.scheme": destination.scheme,
            "url.full": f"{destination.scheme}://{destination.authority}/",
            "server.address": destination.host,
            "server.port": destination.port,
            "http.request.body.size": len(body),
        }
        with self._tracer.start_as_current_span(
            "POST", kind=SpanKind.CLIENT, attributes=attributes
        ) as span:
            traced = {**headers, **headers_of(span.get_span_context())}
            try:
                response = await self._inner.post(destination, traced, body)
            except Exception as error:
                span.set_attribute("error.type", type(error).__qualname__)
                raise
            span.set_attribute("http.response.status_code", response.status)
            if response.status >= _MIN_ERROR_STATUS:
                span.set_attribute("error.type", str(response.status))
                span.set_status(StatusCode.ERROR)
            return response


_Method: TypeAlias = Callable[..., Awaitable[object]]
_Arguments: TypeAlias = tuple[Any, ...]
_Named: TypeAlias = dict[str, Any]


def trace_asyncpg(provider: trace.TracerProvider) -> None:
    """Record the statements of all asyncpg connections: the instrumentation patches the driver.

    Calling it again replaces the provider. If the library lacks the private part that a statement
    by keyword needs, nothing is recorded: the statement would fail. One warning says so.
    """
    from opentelemetry.instrumentation.asyncpg import AsyncPGInstrumentor  # noqa: PLC0415

    instrumentor = AsyncPGInstrumentor()  # type: ignore[no-untyped-call]
    if instrumentor.is_instrumented_by_opentelemetry:
        instrumentor.uninstrument()
    # The library reads ``_do_execute`` when it patches the driver's methods.
    execute: Any = getattr(AsyncPGInstrumentor, "_do_execute", None)
    try:
        signature(execute).bind(instrumentor, None, None, (), {})
    except TypeError as error:  # it is not there, or takes other arguments
        lacking = f"AsyncPGInstrumentor._do_execute: {error}"
        _logger.warning("Statements are not traced", extra={"lacking": lacking})
        return
    traced = partial(execute, instrumentor)
    wrapped: Any = partial(_statement_first, traced)
    instrumentor._do_execute = wrapped  # type: ignore[method-assign]  # noqa: SLF001
    with sdk_environment(os.environ):
        instrumentor.instrument(tracer_provider=provider)


def trace_redis(client: Any, provider: trace.TracerProvider) -> None:
    """Record the commands of a client of redis-py as spans."""
    from opentelemetry.instrumentation.redis import RedisInstrumentor  # noqa: PLC0415

    execute = client.execute_command

    def execute_command(_client: Any, *arguments: Any, **named: Any) -> Awaitable[object]:
        return _record_cancellation(execute, *arguments, **named)

    # A bound method, because the library reads its ``__self__``.
    client.execute_command = MethodType(execute_command, client)
    with sdk_environment(os.environ):
        RedisInstrumentor.instrument_client(client, tracer_provider=provider)


def _statement_first(
    traced: Callable[[_Method, object, _Arguments, _Named], Awaitable[object]],
    method: _Method,
    connection: object,
    arguments: _Arguments,
    named: _Named,
) -> Awaitable[object]:
    """Call the library's wrapper, which requires the statement as a positional argument.

    The statement's keyword is ``query``, and ``command`` in ``executemany``.
    """
    if not arguments:
        name = "query" if "query" in named else "command"
        if name not in named:
            return method(**named)  # raises for the missing argument
        arguments = (named[name],)
        named = {key: value for key, value in named.items() if key != name}
    return traced(partial(_record_cancellation, method), connection, arguments, named)


async def _record_cancellation(method: _Method, /, *arguments: Any, **named: Any) -> object:
    """Call a method and mark its span as failed if it is cancelled; the library does not."""
    try:
        return await method(*arguments, **named)
    except asyncio.CancelledError as error:
        span = get_current_span()
        span.set_attribute("error.type", type(error).__name__)
        span.set_status(StatusCode.ERROR)
        raise


_EXPORT_BUDGET_SHARE = 0.8
"""Part of the stage's budget that the export may take."""
_NANOSECONDS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class _Stage:
    phase: Phase
    report: StageReport
    ended: int
    """Nanoseconds since 1970."""

    @property
    def began(self) -> int:
        return self.ended - round(self.report.duration * _NANOSECONDS)


class ShutdownTrace:
    """Collects the stages of a shutdown as a listener; :meth:`finish` records them as spans."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._began: int | None = None
        self._reason = ""
        self._stages: list[_Stage] = []

    def __call__(self, event: ShutdownEvent) -> None:
        """Handle one event of the shutdown."""
        if isinstance(event, ShutdownTriggered):
            self._began, self._reason = time.time_ns(), event.reason
        elif isinstance(event, StageFinished):
            self._stages.append(_Stage(event.phase, event.report, time.time_ns()))

    def finish(self) -> None:
        """Record the trace, without the stage that calls this."""
        if self._began is None:
            return
        # The shutdown's correlation id is a valid trace id, so that log lines lead to this trace.
        own = current_correlation_id()
        with with_trace_id(None if own is None else int(own, 16)):
            root = self._tracer.start_span(
                "shutdown",
                EMPTY_CONTEXT,
                SpanKind.INTERNAL,
                {"viralfx.shutdown.reason": self._reason},
                start_time=min([self._began, *(stage.began for stage in self._stages)]),
            )
        inside = set_span_in_context(root, EMPTY_CONTEXT)
        for stage in self._stages:
            report = stage.report
            span = self._tracer.start_span(
                f"stage {report.name}",
                inside,
                SpanKind.INTERNAL,
                {
                    "viralfx.shutdown.phase": str(stage.phase),
                    "viralfx.shutdown.outcome": str(report.outcome),
                },
                start_time=stage.began,
            )
            if report.outcome is not Outcome.OK:
                span.set_status(StatusCode.ERROR, str(report.outcome))
                root.set_status(StatusCode.ERROR)
            if report.error is not None:
                span.set_attribute("error.type", type(report.error).__qualname__)
            span.end(stage.ended)
        root.end()


async def flush_traces(
    trace: ShutdownTrace, end: Callable[[], object], max_wait: Callable[[], float], budget: float
) -> None:
    """Export the spans that are left; return without an error if the collector does not answer.

    ``end`` exports them and blocks for at most ``max_wait`` seconds. Spans that are not exported
    within the budget are lost.
    """
    trace.finish()
    limit = min(budget * _EXPORT_BUDGET_SHARE, max_wait())
    loop, sent = asyncio.get_running_loop(), asyncio.Event()

    def send() -> None:
        try:
            end()
        finally:
            _call_soon(loop, sent.set)

    # A daemon thread: the end of the process does not wait for it.
    threading.Thread(target=send, name="telemetry", daemon=True).start()
    try:
        async with asyncio.timeout(limit):
            await sent.wait()
    except TimeoutError:
        return


def _call_soon(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> None:
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:
        return  # the loop is closed: it was not waited for


_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]


_JOINED_FLUSH_SECONDS = 2.0


def _is_served() -> bool:
    span = get_current_span()
    return span.is_recording() and getattr(span, "kind", None) is SpanKind.SERVER


def provider_of_application() -> trace.TracerProvider | None:
    """Return the global provider if the application has set one; None if this package has."""
    with sdk_environment(os.environ):
        found = trace.get_tracer_provider()
    if isinstance(found, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
        return None
    return None if is_own(found) else found


class Tracing:
    """The tracing of one assembly; creating it makes :func:`current_trace` work."""

    def __init__(
        self, provider: trace.TracerProvider, exporter: ReportingExporter | None = None
    ) -> None:
        """Without ``exporter`` the provider is the application's own, which is never shut down.

        Its sampler may keep everything, so statements and commands are then not recorded: each
        poll of a worker would be a trace.
        """
        self.provider: Any = provider
        self._exporter = exporter
        self._tracer = provider.get_tracer("viralfx")
        sampler = getattr(provider, "sampler", None)
        self._sampler = sampler if isinstance(sampler, OrphanDroppingSampler) else None
        self._shutdown = ShutdownTrace(self._tracer)
        self.jobs: JobHooks = TracedJobs(self._tracer)
        self.on_retry = trace_retry
        self.on_circuit = trace_circuit
        self.on_shutdown = self._shutdown
        self.flush: StageFunction = partial(
            flush_traces, self._shutdown, self._end, self._flush_timeout
        )
        set_trace_source(current_ids)

    def _flush_timeout(self) -> float:
        return _JOINED_FLUSH_SECONDS if self._exporter is None else self._exporter.flush_timeout()

    def _end(self) -> None:
        if self._exporter is None:
            flush: Callable[[int], object] | None = getattr(self.provider, "force_flush", None)
            if flush is not None:
                flush(round(_JOINED_FLUSH_SECONDS * 1000))
            return
        if self._sampler is not None:
            self._sampler.closed = True
        self.provider.shutdown()

    @property
    def joined(self) -> bool:
        """Whether the provider is the application's own."""
        return self._exporter is None

    @property
    def is_shared(self) -> bool:
        """Whether spans of other parts of the process are recorded, by a global provider."""
        with sdk_environment(os.environ):
            found = trace.get_tracer_provider()
        return not isinstance(found, trace.ProxyTracerProvider | trace.NoOpTracerProvider)

    @property
    def lost_spans(self) -> int:
        """Number of spans that were recorded and not exported; 0 with a provider of others."""
        return 0 if self._exporter is None else self._exporter.lost

    def requests(
        self,
        app: _App,
        route_of: Callable[[MutableMapping[str, Any]], str | None],
        cause_of: Callable[[BaseException], BaseException],
    ) -> _App:
        """Return middleware that makes a span of each recorded request to ``app``.

        The functions are those of :class:`TracedRequests`.
        """
        traced = TracedRequests(
            app, self._tracer, self._sampler, route_of=route_of, cause_of=cause_of
        )
        if not self.joined:
            return traced

        def serve(scope: _Scope, receive: _Receive, send: _Send) -> Awaitable[None]:
            # Middleware around this one may have made the span of the request.
            return (app if _is_served() else traced)(scope, receive, send)

        return serve

    def correlated(self, app: _App) -> _App:
        """Return ``app``, which makes spans itself, with the correlation ids as trace ids.

        Only for ids that this process generates, and in the provider of this package.
        """

        def serve(scope: _Scope, receive: _Receive, send: _Send) -> Awaitable[None]:
            choose_trace_id(generated_trace_id(scope["headers"]))
            return app(scope, receive, send)

        return app if self.joined else serve

    def webhooks(self, sender: WebhookSender) -> WebhookSender:
        """Return a sender that records each webhook as a span."""
        return TracedSender(sender, self._tracer)

    def asyncpg(self) -> None:
        """Record each statement as a span, unless the provider is the application's own."""
        if not self.joined:
            trace_asyncpg(self.provider)

    def redis(self, client: Any) -> None:
        """Record each command of a client as a span, unless the provider is the application's."""
        if not self.joined:
            trace_redis(client, self.provider)

    def make_global(self) -> None:
        """Set this provider as the global one, unless the application has set another."""
        with sdk_environment(os.environ):
            other = trace.get_tracer_provider()
        if isinstance(other, trace.ProxyTracerProvider):
            trace.set_tracer_provider(self.provider)
