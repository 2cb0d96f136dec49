"""Which spans are recorded."""

import random

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import SpanKind
from tests.unit.tracing.conftest import Finished

from viralfx.domain.correlation import correlated
from viralfx.telemetry.tracing.context import NOTHING, remote_parent
from viralfx.telemetry.tracing.provider import make_provider
from viralfx.telemetry.tracing.sampling import WithoutOrphans, trace_called


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
    with trace_called(0x0AF7651916CD43DD8448EB211C80319C):
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


SAMPLERS = {
    "always_on": None,
    "always_off": None,
    "traceidratio": "0.3",
    "parentbased_always_on": None,
    "parentbased_always_off": None,
    "parentbased_traceidratio": "0.3",
    "": None,
}
IDS = [random.Random(number).getrandbits(128) for number in range(500)]  # noqa: S311 - no secret


@pytest.mark.parametrize(("name", "argument"), SAMPLERS.items())
def test_the_quick_decision_is_that_of_the_sampler(
    monkeypatch: pytest.MonkeyPatch,
    memory: InMemorySpanExporter,
    name: str,
    argument: str | None,
) -> None:
    """Of each standard sampler, for traces that begin here and for those of callers."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", name)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", argument or "")
    provider, _ = make_provider(instance="here", environment="test", exporter=memory)
    sampler = provider.sampler
    assert isinstance(sampler, WithoutOrphans)

    for trace_id in IDS:
        slow = sampler.should_sample(NOTHING, trace_id, "GET", SpanKind.SERVER)
        assert sampler.drops_trace(trace_id) is (slow.decision is Decision.DROP)
        for flags in ("00", "01", "02", "03"):
            traceparent = f"00-{trace_id:032x}-b7ad6b7169203331-{flags}"
            parent = remote_parent([traceparent])
            slow = sampler.should_sample(parent, trace_id, "GET", SpanKind.SERVER)
            dropped = sampler.drops_continued(traceparent)
            assert dropped in {None, trace_id}
            assert dropped is None or slow.decision is Decision.DROP
    provider.shutdown()


@pytest.mark.parametrize(
    "traceparent",
    [
        f"00-{'0' * 32}-b7ad6b7169203331-00",
        f"00-{'a' * 32}-{'0' * 16}-00",
        f"00-{'A' * 32}-b7ad6b7169203331-00",
        f"ff-{'a' * 32}-b7ad6b7169203331-00",
        f"00-{'a' * 32}-b7ad6b7169203331-00-more",
        f"00-{'a' * 32}-b7ad6b7169203331-0",
        "",
    ],
)
def test_what_is_not_quite_a_context_is_left_to_the_library(
    provider: TracerProvider, traceparent: str
) -> None:
    """It knows all of the rules."""
    assert isinstance(provider.sampler, WithoutOrphans)
    assert provider.sampler.drops_continued(traceparent) is None


@pytest.mark.parametrize("text", ["db.statement", "db.query.text"])
def test_what_the_pool_asks_is_not_recorded(
    provider: TracerProvider, finished: Finished, text: str
) -> None:
    """By either name: a host's variables, or its instrumentation, may bring back the former."""
    tracer = provider.get_tracer("test")
    attributes = {text: "SELECT pg_advisory_unlock_all();\nCLOSE ALL;"}
    with tracer.start_as_current_span("work"):
        tracer.start_span("SELECT", kind=SpanKind.CLIENT, attributes=attributes).end()

    assert [span.name for span in finished()] == ["work"]
