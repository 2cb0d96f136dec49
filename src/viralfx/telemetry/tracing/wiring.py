"""Everything that traces, made of one provider, and how it is left."""

import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from viralfx.domain.jobs.observing import JobObserver
from viralfx.domain.shutdown import ShutdownStage
from viralfx.domain.webhooks.delivery import WebhookSender
from viralfx.telemetry.trace_context import answer_with
from viralfx.telemetry.tracing.context import current_ids
from viralfx.telemetry.tracing.databases import trace_asyncpg, trace_redis
from viralfx.telemetry.tracing.events import trace_circuit, trace_retry
from viralfx.telemetry.tracing.export import ReportingExporter
from viralfx.telemetry.tracing.jobs import TracedJobs
from viralfx.telemetry.tracing.requests import TracedRequests
from viralfx.telemetry.tracing.sampling import WithoutOrphans
from viralfx.telemetry.tracing.shutdown import FlushTraces, ShutdownTrace
from viralfx.telemetry.tracing.variables import as_the_library_reads
from viralfx.telemetry.tracing.webhooks import TracedSender

_Scope = MutableMapping[str, Any]
_App = Callable[
    [
        _Scope,
        Callable[[], Awaitable[MutableMapping[str, Any]]],
        Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ],
    Awaitable[None],
]


class Tracing:
    """The traces of one assembly. The current trace can be asked for from here on."""

    def __init__(self, provider: TracerProvider, exporter: ReportingExporter) -> None:
        self.provider = provider
        self._tracer = provider.get_tracer("viralfx")
        sampler = provider.sampler
        self._sampler = sampler if isinstance(sampler, WithoutOrphans) else None
        self._shutdown = ShutdownTrace(self._tracer)
        self.jobs: JobObserver = TracedJobs(self._tracer)
        self.on_retry = trace_retry
        self.on_circuit = trace_circuit
        self.on_shutdown = self._shutdown
        self.stage: ShutdownStage = FlushTraces(self._shutdown, self._end, exporter.patience)
        answer_with(current_ids)

    def _end(self) -> None:
        if self._sampler is not None:
            self._sampler.closed = True
        self.provider.shutdown()

    def requests(self, app: _App) -> _App:
        """Return an application that makes a span of each request to ``app``."""
        return TracedRequests(app, self._tracer, self._sampler)

    def webhooks(self, sender: WebhookSender) -> WebhookSender:
        """Return a sender that makes a span of each webhook."""
        return TracedSender(sender, self._tracer)

    def asyncpg(self) -> None:
        """Make a span of each statement."""
        trace_asyncpg(self.provider)

    def redis(self, client: Any) -> None:
        """Make a span of each command of a client of redis-py."""
        trace_redis(client, self.provider)

    def make_global(self) -> None:
        """Have the application's own code trace with this, where nobody else provides."""
        with as_the_library_reads(os.environ):
            other = trace.get_tracer_provider()
        if isinstance(other, trace.ProxyTracerProvider):
            trace.set_tracer_provider(self.provider)
