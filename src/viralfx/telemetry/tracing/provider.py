"""Makes what records and sends spans, all by the standard variables."""

import os
from collections.abc import Mapping
from importlib.metadata import version

from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import Span, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter

from viralfx.domain.correlation import current_correlation_id
from viralfx.domain.errors import ConfigurationError
from viralfx.telemetry.tracing.cleaning import (
    KEPT_BEYOND,
    KEPT_OF_A_NAME,
    LONGEST_VALUE,
    Clean,
    Cleaning,
)
from viralfx.telemetry.tracing.export import ReportingExporter, ReportingProcessor
from viralfx.telemetry.tracing.listening import complaints
from viralfx.telemetry.tracing.sampling import ChosenIds, WithoutOrphans
from viralfx.telemetry.tracing.variables import (
    as_the_library_reads,
    sampling,
    uses_grpc,
)

SERVICE = "viralfx-backend"
"""The service's name, where OTEL_SERVICE_NAME says no other."""


class CorrelationIds(SpanProcessor):
    """Puts the correlation id on every span, those of drivers included; and bounds its name."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:  # noqa: ARG002
        """Take in a span that begins."""
        if (correlation_id := current_correlation_id()) is not None:
            span.set_attribute("viralfx.correlation_id", correlation_id)
        # That of a pipeline has all of its commands; that of an application may be no text.
        name: object = span.name
        if isinstance(name, str) and len(name) > KEPT_OF_A_NAME:
            span.update_name(name[:KEPT_OF_A_NAME])


def make_provider(
    *,
    instance: str,
    environment: str,
    exporter: SpanExporter | None = None,
    clean: Clean | None = None,
    clean_sql: Clean | None = None,
) -> tuple[TracerProvider, ReportingExporter]:
    """Make a provider, which sends already; it is nobody's global one.

    ``instance`` and ``environment`` name this process, where the variables do not. ``exporter``
    takes the place of that of the variables. Raises :class:`ConfigurationError` where the library
    finds something wrong with them, beside the problems of which others have told already.
    """
    attributes = {
        "service.name": SERVICE,
        "service.version": version("viralfx"),
        "service.instance.id": instance,
        "deployment.environment.name": environment,
    }
    text = clean or str
    with as_the_library_reads(os.environ), complaints("opentelemetry") as heard:
        try:
            limits = SpanLimits()
            longest, of_span = _bound(limits)
            cleaning = Cleaning(clean, clean_sql, longest=longest, longest_of_span=of_span)
            reporting, provider = _make(attributes, limits, exporter, cleaning)
        except Exception as error:
            # Whatever it is, it comes of the variables: nothing else has a say in it.
            what = text(f"OTEL_*: {type(error).__name__}: {error}")
            raise ConfigurationError([_on_one_line(what)]) from error
    if heard:
        provider.shutdown()
        raise ConfigurationError([_on_one_line(text(f"OTEL_*: {each}")) for each in heard])
    return provider, reporting


def _make(
    attributes: Mapping[str, str],
    limits: SpanLimits,
    exporter: SpanExporter | None,
    cleaning: Cleaning,
) -> tuple[ReportingExporter, TracerProvider]:
    named = {**attributes, **OTELResourceDetector().detect().attributes}
    # Its own hook at the interpreter's end would wait for a collector that is away.
    provider = TracerProvider(
        resource=Resource.create(named),
        id_generator=ChosenIds(),
        span_limits=limits,
        shutdown_on_exit=False,
    )
    provider.sampler = WithoutOrphans(provider.sampler, sampling(os.environ))
    reporting = ReportingExporter(
        exporter or _exporter(),
        cleaning=cleaning,
        cuts={limits.max_attribute_length or 0, limits.max_span_attribute_length or 0},
    )
    provider.add_span_processor(CorrelationIds())
    provider.add_span_processor(ReportingProcessor(reporting))
    return reporting, provider


def _bound(limits: SpanLimits) -> tuple[int, int]:
    """Have attributes bounded where no variable does it.

    Returns how much of one may leave: of those of events and links, and of those of spans.
    """
    longest = limits.max_attribute_length
    if longest is None:
        longest = LONGEST_VALUE
    of_span = limits.max_span_attribute_length
    if of_span is None:
        of_span = longest
    limits.max_attribute_length = longest + KEPT_BEYOND
    limits.max_span_attribute_length = of_span + KEPT_BEYOND
    return longest, of_span


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
