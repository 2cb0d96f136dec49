"""A collector that is away: one line, and bounded memory."""

import logging
import threading
from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from viralfx.telemetry.tracing.cleaning import Cleaning
from viralfx.telemetry.tracing.export import ReportingExporter, ReportingProcessor
from viralfx.telemetry.tracing.listening import complaints
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


def test_a_span_that_cannot_be_cleaned_costs_no_other(
    caplog: pytest.LogCaptureFixture, memory: InMemorySpanExporter
) -> None:
    """It is left out, which is said once."""

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
    assert [record.getMessage() for record in caplog.records] == [
        "Spans cannot be sent, and are left out"
    ]


def test_a_span_that_ends_after_the_last_were_sent_is_nobody_s_line(
    caplog: pytest.LogCaptureFixture, memory: InMemorySpanExporter
) -> None:
    """The library would tell of each."""
    provider, _ = make_provider(instance="here", environment="test", exporter=memory)
    span = provider.get_tracer("test").start_span("late")
    with caplog.at_level(logging.DEBUG):
        provider.shutdown()
        span.end()

    assert caplog.records == []


def test_spans_that_are_lost_all_the_time_are_one_outage(
    caplog: pytest.LogCaptureFixture, memory: InMemorySpanExporter
) -> None:
    """A collector that takes some, but fewer than there are: it is not back by that."""
    clock = Clock()
    exporter = ReportingExporter(memory, calm=10.0, now=clock)
    # One may wait, and there is no room for any other.
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
            assert exporter.in_trouble
        clock.now += 10
        exporter.export([span])
    processor.shutdown()

    assert [record.getMessage() for record in caplog.records] == [
        "Traces are lost",
        "Traces arrive again",
    ]


def test_what_others_send_is_theirs(caplog: pytest.LogCaptureFixture) -> None:
    """The application may send logs and metrics itself, by the same library."""
    processing = logging.getLogger("opentelemetry.sdk._shared_internal")
    metrics = logging.getLogger("opentelemetry.exporter.otlp.proto.http.metric_exporter")
    exporter, provider = ReportingExporter(Collector()), TracerProvider(shutdown_on_exit=False)
    theirs = BatchSpanProcessor(Collector(), max_queue_size=1, max_export_batch_size=1)
    span = provider.get_tracer("test").start_span("work")
    assert isinstance(span, ReadableSpan)
    with caplog.at_level(logging.WARNING):
        processing.warning("Queue full, dropping %s.", "Log")
        metrics.error("Failed to export metrics batch code: 401")
        with theirs._batch_processor._export_lock:
            for _ in range(3):
                theirs.on_end(span)
    in_trouble = exporter.in_trouble
    exporter.shutdown()
    theirs.shutdown()  # type: ignore[no-untyped-call]

    assert not in_trouble
    assert {record.getMessage() for record in caplog.records} == {
        "Queue full, dropping Log.",
        "Failed to export metrics batch code: 401",
        "Queue full, dropping Span.",
    }


def test_loggers_are_as_before_whoever_ends_first(caplog: pytest.LogCaptureFixture) -> None:
    """Two applications in one process; neither hears what the other loses."""

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
        troubles = [of_first.in_trouble, of_second.in_trouble]
        first.shutdown()
        second.get_tracer("test").start_span("work").end()
        second.force_flush()
        second.shutdown()
        _library.warning("planted")

    assert troubles == [False, True]
    assert [record.getMessage() for record in caplog.records] == ["Traces are lost", "planted"]
    assert state() == before


def test_an_attribute_that_is_cut_is_no_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Each request may have one; but whoever cuts at another length is told."""
    provider, _ = make_provider(instance="here", environment="test", exporter=Collector())
    theirs = TracerProvider(shutdown_on_exit=False, span_limits=SpanLimits(max_attribute_length=9))
    with caplog.at_level(logging.WARNING):
        provider.get_tracer("test").start_span("work", attributes={"long": "x" * 9000}).end()
        assert caplog.records == []
        theirs.get_tracer("test").start_span("work", attributes={"long": "x" * 10}).end()
    provider.shutdown()

    [record] = caplog.records
    assert record.getMessage().startswith("String attribute value exceeds max length of 9")


def test_what_another_thread_logs_is_no_complaint_of_a_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It goes where it always went, and a level that hides complaints hides none."""
    logger = logging.getLogger("opentelemetry.test")
    with caplog.at_level(logging.ERROR), complaints("opentelemetry") as heard:
        logger.warning("planted")
        thread = threading.Thread(target=logger.error, args=["elsewhere"])
        thread.start()
        thread.join()

    assert heard == ["planted"]
    assert [record.getMessage() for record in caplog.records] == ["elsewhere"]


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
