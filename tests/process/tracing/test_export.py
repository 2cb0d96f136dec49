"""Tests of the exporter with an unavailable collector: one log line and bounded memory."""

import logging
import threading
from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from viralfx.telemetry.tracing.cleaning import Cleaning
from viralfx.telemetry.tracing.export import (
    ReportingExporter,
    ReportingProcessor,
    collected_warnings,
)
from viralfx.telemetry.tracing.provider import make_provider

_library = logging.getLogger("opentelemetry.exporter.otlp.proto.http")


class Collector(SpanExporter):
    """Accepts spans, or fails."""

    def __init__(self) -> None:
        self.up = True

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:  # noqa: ARG002
        """Accept a batch, or log and return a failure."""
        if self.up:
            return SpanExportResult.SUCCESS
        _library.warning("Transient error, retrying in 1 s")
        _library.error("Failed to export: refused")
        return SpanExportResult.FAILURE


class Clock:
    """A clock that only advances when it is set."""

    now = 0.0

    def __call__(self) -> float:
        """Return the current time."""
        return self.now


def test_an_outage_and_its_end_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """This holds for repeated failures and for a collector that recovers only briefly."""
    collector, clock, span = Collector(), Clock(), ReadableSpan("planted")
    exporter = ReportingExporter(collector, recovery_seconds=10.0, now=clock)
    with caplog.at_level(logging.INFO):
        for up in (True, False, False, True, False, True, True):
            collector.up = up
            clock.now += 3
            exporter.export([span] * 2)
            assert exporter.is_losing or clock.now < 6
            assert (exporter.flush_timeout() < 1) is exporter.is_losing
        clock.now += 10
        exporter.export([])
    assert exporter.flush_timeout() == 5.0
    exporter.shutdown()

    messages = [r.getMessage() for r in caplog.records if r.name == "viralfx.tracing"]
    assert messages == ["Traces are lost", "Traces arrive again"]
    reason = "Transient error, retrying in 1 s; Failed to export: refused"
    assert caplog.records[0].__dict__["reason"] == reason
    assert not exporter.is_losing
    assert exporter.lost == 6


def test_an_exception_of_the_exporter_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """The library would only log it; the reported reason contains no secret."""

    class Raising(Collector):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:  # noqa: ARG002
            """Raise an error."""
            raise ValueError("x" * 278 + "by user:planted@host")

    cleaning = Cleaning(lambda text: text.replace("user:planted", "***"))
    exporter = ReportingExporter(Raising(), cleaning=cleaning)
    assert exporter.export([]) is SpanExportResult.FAILURE
    exporter.shutdown()
    assert exporter.lost == 0

    [record] = caplog.records
    assert record.__dict__["reason"] == "ValueError: " + "x" * 278 + "by ***@hos"


def test_a_span_that_cannot_be_cleaned_is_dropped_alone(
    caplog: pytest.LogCaptureFixture, memory: InMemorySpanExporter
) -> None:
    """The batch is sent without it, and one line is logged."""

    def clean(text: str) -> str:
        if text == "odd":
            raise ValueError(text)
        return text

    exporter = ReportingExporter(memory, cleaning=Cleaning(clean))
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")
    spans = [tracer.start_span(name) for name in ("one", "odd", "late", "early", "two", "odd")]
    spans[2].end(end_time=1.5e9)  # type: ignore[arg-type]
    spans[3].add_event("before there was a time", timestamp=-1)
    with caplog.at_level(logging.INFO):
        result = exporter.export([span for span in spans if isinstance(span, ReadableSpan)])

    assert result is SpanExportResult.SUCCESS
    assert [span.name for span in memory.get_finished_spans()] == ["one", "two"]
    assert exporter.lost == 4
    assert [record.getMessage() for record in caplog.records] == [
        "Spans cannot be sent, and are left out"
    ]


def test_a_span_that_ends_after_shutdown_is_not_logged(
    caplog: pytest.LogCaptureFixture, memory: InMemorySpanExporter
) -> None:
    """The library would log a line for each."""
    provider, _ = make_provider(instance="here", environment="test", exporter=memory)
    span = provider.get_tracer("test").start_span("late")
    with caplog.at_level(logging.DEBUG):
        provider.shutdown()
        span.end()

    assert caplog.records == []


def test_a_permanent_partial_loss_is_one_outage(
    caplog: pytest.LogCaptureFixture, memory: InMemorySpanExporter
) -> None:
    """A collector that accepts fewer spans than are recorded does not count as recovered."""
    clock = Clock()
    exporter = ReportingExporter(memory, recovery_seconds=10.0, now=clock)
    # The queue holds one span.
    processor = ReportingProcessor(exporter, max_queue_size=1, max_export_batch_size=1)
    span = TracerProvider(shutdown_on_exit=False).get_tracer("test").start_span("work")
    assert isinstance(span, ReadableSpan)
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            with processor._batch_processor._export_lock:
                for _ in range(4):
                    processor.on_end(span)
            clock.now += 6
            processor.force_flush()
            assert exporter.is_losing
        clock.now += 10
        exporter.export([span])
    processor.shutdown()

    messages = [r.getMessage() for r in caplog.records if r.name == "viralfx.tracing"]
    assert messages == ["Traces are lost", "Traces arrive again"]


def test_log_records_of_other_exporters_pass(caplog: pytest.LogCaptureFixture) -> None:
    """The application may send logs and metrics with the same library."""
    processing = logging.getLogger("opentelemetry.sdk._shared_internal")
    metrics = logging.getLogger("opentelemetry.exporter.otlp.proto.http.metric_exporter")
    exporter, provider = ReportingExporter(Collector()), TracerProvider(shutdown_on_exit=False)
    foreign = BatchSpanProcessor(Collector(), max_queue_size=1, max_export_batch_size=1)
    span = provider.get_tracer("test").start_span("work")
    assert isinstance(span, ReadableSpan)
    with caplog.at_level(logging.WARNING):
        processing.warning("Queue full, dropping %s.", "Log")
        metrics.error("Failed to export metrics batch code: 401")
        with foreign._batch_processor._export_lock:
            for _ in range(3):
                foreign.on_end(span)
    is_losing = exporter.is_losing
    exporter.shutdown()
    foreign.shutdown()  # type: ignore[no-untyped-call]

    assert not is_losing
    assert {record.getMessage() for record in caplog.records} == {
        "Queue full, dropping Log.",
        "Failed to export metrics batch code: 401",
        "Queue full, dropping Span.",
    }


def test_loggers_are_restored_in_any_order_of_shutdown(caplog: pytest.LogCaptureFixture) -> None:
    """Two applications in one process capture only their own records."""

    def state() -> list[tuple[bool, int, list[object], list[object]]]:
        names = ("opentelemetry", "opentelemetry.exporter", "opentelemetry.attributes")
        processing = "opentelemetry.sdk._shared_internal"
        loggers = [*map(logging.getLogger, [*names, processing]), _library]
        return [(each.propagate, each.level, [*each.filters], [*each.handlers]) for each in loggers]

    before = state()
    collectors = Collector(), Collector()
    providers = [
        make_provider(instance="here", environment="test", exporter=each) for each in collectors
    ]
    (first, of_first), (second, of_second) = providers
    collectors[1].up = False
    with caplog.at_level(logging.WARNING):
        for provider in (first, second):
            provider.get_tracer("test").start_span("work").end()
            provider.force_flush()
        troubles = [of_first.is_losing, of_second.is_losing]
        first.shutdown()
        second.get_tracer("test").start_span("work").end()
        second.force_flush()
        second.shutdown()
        _library.warning("planted")

    assert troubles == [False, True]
    assert [record.getMessage() for record in caplog.records] == ["Traces are lost", "planted"]
    assert state() == before


def test_truncated_attributes_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Only warnings about this project's own limits are dropped."""
    provider, _ = make_provider(instance="here", environment="test", exporter=Collector())
    foreign = TracerProvider(shutdown_on_exit=False, span_limits=SpanLimits(max_attribute_length=9))
    with caplog.at_level(logging.WARNING):
        provider.get_tracer("test").start_span("work", attributes={"long": "x" * 9000}).end()
        assert caplog.records == []
        foreign.get_tracer("test").start_span("work", attributes={"long": "x" * 10}).end()
    provider.shutdown()

    [record] = caplog.records
    assert record.getMessage().startswith("String attribute value exceeds max length of 9")


def test_collected_warnings_exclude_other_threads(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Records of other threads reach their handlers; a disabled level hides no warning."""
    logger = logging.getLogger("opentelemetry.test")
    with caplog.at_level(logging.ERROR), collected_warnings("opentelemetry") as warnings:
        logger.warning("planted")
        thread = threading.Thread(target=logger.error, args=["elsewhere"])
        thread.start()
        thread.join()

    assert warnings == ["planted"]
    assert [record.getMessage() for record in caplog.records] == ["elsewhere"]


def test_the_queue_of_spans_is_bounded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, memory: InMemorySpanExporter
) -> None:
    """The oldest span is dropped, and one line is logged."""
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
    """Blocks until it is released."""

    def __init__(self, inner: SpanExporter) -> None:
        self._inner = inner
        self._event = threading.Event()

    def go(self) -> None:
        """Accept all spans from now on."""
        self._event.set()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Wait for the release, then accept a batch."""
        self._event.wait(20)
        return self._inner.export(spans)


def test_the_provider_is_not_set_globally(provider: TracerProvider) -> None:
    """The application's own provider stays in place."""
    from opentelemetry import trace  # noqa: PLC0415

    assert trace.get_tracer_provider() is not provider
