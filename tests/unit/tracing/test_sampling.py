"""Tests of the sampler: which spans are recorded."""

import asyncio
import random
from importlib.metadata import version

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import SpanKind
from tests.unit.tracing.conftest import Finished

from viralfx.core.correlation import correlated
from viralfx.telemetry.tracing.provider import (
    OrphanDroppingSampler,
    choose_trace_id,
    make_provider,
    with_trace_id,
)
from viralfx.telemetry.tracing.spans import EMPTY_CONTEXT, remote_parent


def test_a_client_span_without_parent_is_dropped(
    provider: TracerProvider, finished: Finished
) -> None:
    """Polls and health checks are dropped; the same call within a request is recorded."""
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
def test_the_configured_sampling_ratio_is_applied(
    monkeypatch: pytest.MonkeyPatch,
    memory: InMemorySpanExporter,
    share: str,
    least: int,
    most: int,
) -> None:
    """The ratio applies to new traces; spans within a trace follow its root."""
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


def test_a_trace_id_can_be_chosen(provider: TracerProvider) -> None:
    """The choice applies only within the block."""
    tracer = provider.get_tracer("test")
    with with_trace_id(0x0AF7651916CD43DD8448EB211C80319C):
        chosen = tracer.start_span("one").get_span_context()
    other = tracer.start_span("two").get_span_context()

    assert f"{chosen.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert other.trace_id != chosen.trace_id


async def test_a_trace_id_can_be_chosen_for_one_trace(provider: TracerProvider) -> None:
    """Later traces of the same task, and of those that it creates, have ids of their own."""
    tracer, chosen = provider.get_tracer("test"), 0x0AF7651916CD43DD8448EB211C80319C

    async def begun() -> int:
        return tracer.start_span("one").get_span_context().trace_id

    choose_trace_id(chosen)
    first = await begun()
    others = {await begun(), await asyncio.create_task(begun())}
    choose_trace_id(chosen)
    choose_trace_id(None)

    assert first == chosen
    assert chosen not in {*others, await begun()}


def test_every_span_has_correlation_id_and_resource(
    monkeypatch: pytest.MonkeyPatch, memory: InMemorySpanExporter
) -> None:
    """The variables override the program's resource attributes."""
    monkeypatch.setenv("OTEL_SERVICE_NAME", "shop")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "team=ops,service.instance.id=seven")
    provider, _ = make_provider(instance="here", environment="test", exporter=memory)
    with correlated("order-17"):
        provider.get_tracer("application").start_span("work").end()
    provider.force_flush()
    (span,) = memory.get_finished_spans()
    provider.shutdown()

    assert span.attributes == {"viralfx.correlation_id": "order-17"}
    named = {
        "service.name": "shop",
        "service.version": version("viralfx"),
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
def test_the_fast_decision_agrees_with_the_sampler(
    monkeypatch: pytest.MonkeyPatch,
    memory: InMemorySpanExporter,
    name: str,
    argument: str | None,
) -> None:
    """This holds for each standard sampler, for new traces and for continued ones."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", name)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", argument or "")
    provider, _ = make_provider(instance="here", environment="test", exporter=memory)
    sampler = provider.sampler
    assert isinstance(sampler, OrphanDroppingSampler)

    for trace_id in IDS:
        slow = sampler.should_sample(EMPTY_CONTEXT, trace_id, "GET", SpanKind.SERVER)
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
def test_an_unusual_traceparent_takes_the_slow_path(
    provider: TracerProvider, traceparent: str
) -> None:
    """The library decides about everything that the fast check does not match."""
    assert isinstance(provider.sampler, OrphanDroppingSampler)
    assert provider.sampler.drops_continued(traceparent) is None


@pytest.mark.parametrize("text", ["db.statement", "db.query.text"])
def test_pool_resets_are_not_recorded(
    provider: TracerProvider, finished: Finished, text: str
) -> None:
    """This holds for the current and the former attribute name."""
    tracer = provider.get_tracer("test")
    attributes = {text: "SELECT pg_advisory_unlock_all();\nCLOSE ALL;"}
    with tracer.start_as_current_span("work"):
        tracer.start_span("SELECT", kind=SpanKind.CLIENT, attributes=attributes).end()

    assert [span.name for span in finished()] == ["work"]
