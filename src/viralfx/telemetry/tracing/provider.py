"""The tracer provider: which spans are recorded and where they are sent."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib.metadata import PackageNotFoundError, version
from weakref import WeakSet

from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import Span, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import (
    Decision,
    Sampler,
    SamplingResult,
    TraceIdRatioBased,
)
from opentelemetry.trace import Link, SpanKind, TraceState, get_current_span
from opentelemetry.util.types import Attributes

from viralfx.core.correlation import current_correlation_id, current_user_id
from viralfx.core.errors import ConfigurationError
from viralfx.telemetry.tracing import SERVICE
from viralfx.telemetry.tracing.cleaning import (
    KEPT_EXTRA_CHARACTERS,
    KEPT_NAME_CHARACTERS,
    MAX_VALUE_CHARACTERS,
    Clean,
    Cleaning,
)
from viralfx.telemetry.tracing.export import (
    ReportingExporter,
    ReportingProcessor,
    collected_warnings,
)
from viralfx.telemetry.tracing.variables import (
    Sampling,
    sampling,
    sdk_environment,
    uses_grpc,
)

_POOL_RESET = "SELECT pg_advisory_unlock_all()"
"""The statement with which the driver's pool resets each released connection."""

_DROPPED = SamplingResult(Decision.DROP)
_UNSAMPLED = re.compile(
    r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f][02468ace]"
).fullmatch
"""Matches the traceparent of a caller that does not record."""


class OrphanDroppingSampler(Sampler):
    """Applies the configured sampler, and drops client spans that have no parent.

    Polling workers, heartbeats and health checks query Postgres and Redis all the time. Each query
    would be a trace of one span, and together they would outnumber all other traces.
    """

    def __init__(self, inner: Sampler, sampling: Sampling) -> None:
        """``inner`` is the configured sampler, ``sampling`` its settings."""
        self._inner = inner
        self._dropped_from = TraceIdRatioBased.get_bound_for_rate(sampling.share)
        self._follows_parents = sampling.follows_parents
        self.closed = False
        """Drops all spans if True: the exporter has stopped."""

    def drops_trace(self, trace_id: int) -> bool:
        """Return whether a trace that begins here is dropped.

        Agrees with :meth:`should_sample` at a twentieth of its cost. Most requests need only this.
        """
        return self.closed or trace_id & TraceIdRatioBased.TRACE_ID_LIMIT >= self._dropped_from

    def drops_continued(self, traceparent: str) -> int | None:
        """Return the id of a caller's trace if it is certainly not recorded here.

        Returns None if :meth:`should_sample` has to decide.
        """
        if not self._follows_parents or (found := _UNSAMPLED(traceparent)) is None:
            return None
        return int(found[1], 16)

    def should_sample(  # noqa: PLR0917 - the library's
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """Drop parentless client spans and pool resets; ask the inner sampler about all others."""
        if self.closed:
            return _DROPPED
        if kind is SpanKind.CLIENT:
            if not get_current_span(parent_context).get_span_context().is_valid:
                return _DROPPED
            if attributes:
                text = attributes.get("db.query.text") or attributes.get("db.statement")
                if text is not None and str(text).startswith(_POOL_RESET):
                    return _DROPPED
        return self._inner.should_sample(
            parent_context, trace_id, name, kind, attributes, links, trace_state
        )

    def get_description(self) -> str:
        """Return the sampler's name for logs."""
        return f"OrphanDroppingSampler({self._inner.get_description()})"


_chosen: ContextVar[int | None] = ContextVar("viralfx_trace_id", default=None)


class ChosenIds(RandomIdGenerator):
    """Generates random ids, or the trace id that has been chosen."""

    def generate_trace_id(self) -> int:
        """Return the chosen id once, or a random one."""
        if (chosen := _chosen.get()) is None:
            return super().generate_trace_id()
        _chosen.set(None)
        return chosen


def choose_trace_id(trace_id: int | None) -> None:
    """Use this id for the next trace that begins in this task; None for a random id."""
    _chosen.set(trace_id)


@contextmanager
def with_trace_id(trace_id: int | None) -> Iterator[None]:
    """Use this id for a trace that begins within the block; None for a random id."""
    token = _chosen.set(trace_id)
    try:
        yield
    finally:
        _chosen.reset(token)


class CorrelationIdProcessor(SpanProcessor):
    """Adds correlation id and user to every span, including drivers' spans, and limits its name."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:  # noqa: ARG002
        """Add correlation id and user to a span that starts, and truncate a long name."""
        if (correlation_id := current_correlation_id()) is not None:
            span.set_attribute("viralfx.correlation_id", correlation_id)
        if (user_id := current_user_id()) is not None:
            span.set_attribute("enduser.id", user_id)
        # The name of a pipeline lists all its commands; an application's name may not be a string.
        name: object = span.name
        if isinstance(name, str) and len(name) > KEPT_NAME_CHARACTERS:
            span.update_name(name[:KEPT_NAME_CHARACTERS])


_own: "WeakSet[object]" = WeakSet()


def is_own(provider: object) -> bool:
    """Return whether :func:`make_provider` made a provider."""
    return provider in _own


def make_provider(
    *,
    instance: str,
    environment: str,
    service: str = SERVICE,
    exporter: SpanExporter | None = None,
    clean: Clean | None = None,
    clean_sql: Clean | None = None,
) -> tuple[TracerProvider, ReportingExporter]:
    """Create a provider that exports its spans; it is not set as the global provider.

    ``service``, ``instance`` and ``environment`` identify this process unless the variables do. The
    version is that of the distribution with the name of the service, if there is one. ``exporter``
    replaces the one that the variables configure. Raises :class:`ConfigurationError` if the
    library rejects the variables; ``variables.problems`` finds most mistakes before.
    """
    attributes = {
        "service.name": service,
        "service.instance.id": instance,
        "deployment.environment.name": environment,
    }
    with suppress(PackageNotFoundError):
        attributes["service.version"] = version("viralfx" if service == SERVICE else service)
    text = clean or str
    with sdk_environment(os.environ), collected_warnings("opentelemetry") as warnings:
        try:
            limits = SpanLimits()
            max_characters, max_span_characters = _limit_attributes(limits)
            cleaning = Cleaning(
                clean,
                clean_sql,
                max_characters=max_characters,
                max_span_characters=max_span_characters,
            )
            reporting, provider = _make(attributes, limits, exporter, cleaning)
        except Exception as error:
            # The variables are the only input here, so any error is a problem of theirs.
            what = text(f"OTEL_*: {type(error).__name__}: {error}")
            raise ConfigurationError([_on_one_line(what)]) from error
    if warnings:
        provider.shutdown()
        raise ConfigurationError([_on_one_line(text(f"OTEL_*: {each}")) for each in warnings])
    return provider, reporting


def _make(
    attributes: Mapping[str, str],
    limits: SpanLimits,
    exporter: SpanExporter | None,
    cleaning: Cleaning,
) -> tuple[ReportingExporter, TracerProvider]:
    named = {**attributes, **OTELResourceDetector().detect().attributes}
    # The SDK's exit hook would wait for an unreachable collector.
    provider = TracerProvider(
        resource=Resource.create(named),
        id_generator=ChosenIds(),
        span_limits=limits,
        shutdown_on_exit=False,
    )
    _own.add(provider)
    provider.sampler = OrphanDroppingSampler(provider.sampler, sampling(os.environ))
    reporting = ReportingExporter(
        exporter or _exporter(),
        cleaning=cleaning,
        own_limits={limits.max_attribute_length or 0, limits.max_span_attribute_length or 0},
    )
    provider.add_span_processor(CorrelationIdProcessor())
    provider.add_span_processor(ReportingProcessor(reporting))
    return reporting, provider


def _limit_attributes(limits: SpanLimits) -> tuple[int, int]:
    """Limit the length of attributes if no variable does.

    Returns the exported lengths: for attributes of events and links, and for those of spans.
    """
    max_characters = limits.max_attribute_length
    if max_characters is None:
        max_characters = MAX_VALUE_CHARACTERS
    max_span_characters = limits.max_span_attribute_length
    if max_span_characters is None:
        max_span_characters = max_characters
    limits.max_attribute_length = max_characters + KEPT_EXTRA_CHARACTERS
    limits.max_span_attribute_length = max_span_characters + KEPT_EXTRA_CHARACTERS
    return max_characters, max_span_characters


def _exporter() -> SpanExporter:
    if uses_grpc(os.environ):
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # noqa: PLC0415
            OTLPSpanExporter as GrpcExporter,
        )

        return GrpcExporter()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
        OTLPSpanExporter as HttpExporter,
    )

    return HttpExporter()


def _on_one_line(text: str) -> str:
    return " ".join(text.split())
