"""A collector that is away: one line, and bounded memory."""

import logging
from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from viralfx.telemetry.tracing.cleaning import Cleaning
from viralfx.telemetry.tracing.export import ReportingExporter
from viralfx.telemetry.tracing.provider import make_provider

_library = logging.getLogger("opentelemetry.exporter.otlp.proto.http")


class Collector(SpanExporter):
    """Takes spans, or does not."""

    def __init__(self) -> None:
        self.up = True

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:  # noqa: ARG002
        """Take a batch."""
        if self.up:
            return SpanExportResult.SUCCESS
        _library.warning("Transient error, retrying in 1 s")
        _library.error("Failed to export: refused")
        return SpanExportResult.FAILURE


class Clock:
    """Stands still until it is moved."""

    now = 0.0

    def __call__(self) -> float:
        """Return what time it is."""
        return self.now


def test_an_outage_is_one_line_and_its_end_another(caplog: pytest.LogCaptureFixture) -> None:
    """However often it is tried, and although it comes and goes for a while."""
    collector, clock = Collector(), Clock()
    exporter = ReportingExporter(collector, calm=10.0, now=clock)
    with caplog.at_level(logging.INFO):
        for up in (True, False, False, True, False, True, True):
            collector.up = up
            clock.now += 3
            exporter.export([])
            assert exporter.in_trouble or clock.now < 6
            assert (exporter.patience() < 1) is exporter.in_trouble
        clock.now += 10
        exporter.export([])
    assert exporter.patience() == 5.0
    exporter.shutdown()

    assert [record.getMessage() for record in caplog.records] == [
        "Traces are lost",
        "Traces arrive again",
    ]
    reason = "Transient error, retrying in 1 s; Failed to export: refused"
    assert caplog.records[0].__dict__["reason"] == reason
    assert not exporter.in_trouble


def test_an_exporter_that_raises_loses_spans(caplog: pytest.LogCaptureFixture) -> None:
    """The library would only log it, where nobody hears it; and the reason shows no secret."""

    class Raising(Collector):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:  # noqa: ARG002
            """Take nothing."""
            raise ValueError("x" * 278 + "by user:planted@host")

    cleaning = Cleaning(lambda text: text.replace("user:planted", "***"))
    exporter = ReportingExporter(Raising(), cleaning=cleaning)
    assert exporter.export([]) is SpanExportResult.FAILURE
    exporter.shutdown()

    [record] = caplog.records
    assert record.__dict__["reason"] == "ValueError: " + "x" * 278 + "by ***@hos"


def test_spans_that_are_lost_all_the_time_are_one_outage(
    caplog: pytest.LogCaptureFixture, memory: InMemorySpanExporter
) -> None:
    """A collector that takes some, but fewer than there are: it is not back by that."""
    clock = Clock()
    exporter = ReportingExporter(memory, calm=10.0, now=clock)
    # One may wait, and there is no room for any other.
    processor = BatchSpanProcessor(exporter, max_queue_size=1, max_export_batch_size=1)
    span = TracerProvider(shutdown_on_exit=False).get_tracer("test").start_span("work")
    assert isinstance(span, ReadableSpan)
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            with processor._batch_processor._export_lock:
                for _ in range(4):
                    processor.on_end(span)
            clock.now += 6
            processor.force_flush()
            assert exporter.in_trouble
        clock.now += 10
        exporter.export([span])
    processor.shutdown()  # type: ignore[no-untyped-call]

    assert [record.getMessage() for record in caplog.records] == [
        "Traces are lost",
        "Traces arrive again",
    ]


def test_the_library_is_as_before_once_nobody_sends(caplog: pytest.LogCaptureFixture) -> None:
    """Its loggers are the application's, too."""
    processing = logging.getLogger("opentelemetry.sdk._shared_internal")
    filters = list(processing.filters)
    ReportingExporter(Collector()).shutdown()
    with caplog.at_level(logging.WARNING):
        _library.warning("planted")

    assert [record.getMessage() for record in caplog.records] == ["planted"]
    assert processing.filters == filters != []


def test_what_waits_is_bounded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, memory: InMemorySpanExporter
) -> None:
    """The oldest is dropped, and that is told once."""
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "100")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "100")
    collector = Stuck(memory)
    provider, _ = make_provider(instance="here", environment="test", exporter=collector)
    tracer = provider.get_tracer("test")
    with caplog.at_level(logging.INFO):
        for number in range(1000):
            tracer.start_span(f"{number}").end()
        collector.go()
        provider.force_flush()
    provider.shutdown()

    assert len(memory.get_finished_spans()) <= 300
    assert [record.getMessage() for record in caplog.records] == ["Traces are lost"]


class Stuck(SpanExporter):
    """Takes nothing until it is let go."""

    def __init__(self, inner: SpanExporter) -> None:
        import threading  # noqa: PLC0415

        self._inner = inner
        self._event = threading.Event()

    def go(self) -> None:
        """Take everything from now on."""
        self._event.set()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Wait, then take a batch."""
        self._event.wait(20)
        return self._inner.export(spans)


def test_a_provider_is_nobody_s_global_one(provider: TracerProvider) -> None:
    """The application's own stays what it is."""
    from opentelemetry import trace  # noqa: PLC0415

    assert trace.get_tracer_provider() is not provider
