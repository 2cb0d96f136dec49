"""Fixtures of the tracing tests: a provider that exports to memory."""

import os
from collections.abc import Callable, Iterator, Sequence

import pytest
from opentelemetry.context import Context, attach, detach
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from viralfx.telemetry.tracing.provider import make_provider

Finished = Callable[[], Sequence[ReadableSpan]]


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    token = attach(Context())
    yield
    detach(token)


@pytest.fixture
def memory() -> InMemorySpanExporter:
    """Return an exporter that keeps spans in memory."""
    return InMemorySpanExporter()


@pytest.fixture
def provider(memory: InMemorySpanExporter) -> Iterator[TracerProvider]:
    """Return a provider as the program creates it, with an in-memory exporter."""
    made, _ = make_provider(instance="here", environment="test", exporter=memory)
    yield made
    made.shutdown()


@pytest.fixture
def finished(provider: TracerProvider, memory: InMemorySpanExporter) -> Finished:
    """Return a function that returns the finished spans."""

    def spans() -> Sequence[ReadableSpan]:
        provider.force_flush()
        return memory.get_finished_spans()

    return spans
