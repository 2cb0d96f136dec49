"""Which spans are recorded."""

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from tests.unit.tracing.conftest import Finished

from viralfx.domain.correlation import correlated
from viralfx.telemetry.tracing.provider import make_provider
from viralfx.telemetry.tracing.sampling import trace_called


def test_a_call_that_belongs_to_nothing_is_dropped(
    provider: TracerProvider, finished: Finished
) -> None:
    """Polls, heartbeats and health checks; the same call within a request is not."""
    tracer = provider.get_tracer("test")
    with tracer.start_as_current_span("poll", kind=SpanKind.CLIENT) as poll:
        assert not poll.is_recording()
        with tracer.start_as_current_span("below", kind=SpanKind.CLIENT):
            pass
    with (
        tracer.start_as_current_span("request", kind=SpanKind.SERVER),
        tracer.start_as_current_span("query", kind=SpanKind.CLIENT),
    ):
        pass
    with tracer.start_as_current_span("job", kind=SpanKind.CONSUMER):
        pass

    assert [span.name for span in finished()] == ["query", "request", "job"]


@pytest.mark.parametrize(
    ("share", "least", "most"), [("0", 0, 0), ("0.1", 50, 160), ("1", 1000, 1000)]
)
def test_the_share_of_the_variable_is_kept(
    monkeypatch: pytest.MonkeyPatch,
    memory: InMemorySpanExporter,
    share: str,
    least: int,
    most: int,
) -> None:
    """Of traces that begin here; what is in them follows them."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", share)
    provider, _ = make_provider(instance="here", environment="test", exporter=memory)
    tracer = provider.get_tracer("test")
    for _ in range(1000):
        with (
            tracer.start_as_current_span("request", kind=SpanKind.SERVER),
            tracer.start_as_current_span("query", kind=SpanKind.CLIENT),
        ):
            pass
    provider.force_flush()
    spans = memory.get_finished_spans()

    assert least <= len(spans) / 2 <= most
    assert len({span.context.trace_id for span in spans}) == len(spans) / 2
    provider.shutdown()


def test_an_id_can_be_chosen_for_a_trace(provider: TracerProvider) -> None:
    """For the next trace only."""
    tracer = provider.get_tracer("test")
    with trace_called("0af7651916cd43dd8448eb211c80319c"):
        chosen = tracer.start_span("one").get_span_context()
    other = tracer.start_span("two").get_span_context()

    assert f"{chosen.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert other.trace_id != chosen.trace_id


def test_every_span_has_the_correlation_id_and_says_whose_it_is(
    monkeypatch: pytest.MonkeyPatch, memory: InMemorySpanExporter
) -> None:
    """What the variables say of the process goes before what the program says."""
    monkeypatch.setenv("OTEL_SERVICE_NAME", "shop")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "team=ops,service.instance.id=seven")
    provider, _ = make_provider(instance="here", environment="test", exporter=memory)
    with correlated("order-17"):
        provider.get_tracer("anybody").start_span("work").end()
    provider.force_flush()
    (span,) = memory.get_finished_spans()
    provider.shutdown()

    assert span.attributes == {"viralfx.correlation_id": "order-17"}
    named = {
        "service.name": "shop",
        "service.version": "0.1.0",
        "service.instance.id": "seven",
        "deployment.environment.name": "test",
        "team": "ops",
    }
    assert named.items() <= dict(span.resource.attributes).items()
