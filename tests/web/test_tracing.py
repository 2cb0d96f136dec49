"""Traces in another Litestar application, under another server."""

import asyncio

import pytest
from litestar import Litestar, get
from litestar.params import FromPath
from litestar.testing import AsyncTestClient
from opentelemetry import trace
from tests.servers.collector import Collector, http_collector

from viralfx import OperationsConfig, OperationsPlugin
from viralfx.settings import Settings
from viralfx.telemetry import current_trace, set_trace_source

SECONDS = 20


@get("/items/{item_id:int}")
async def item(item_id: FromPath[int]) -> dict[str, object]:
    """Return the current trace id."""
    found = current_trace()
    return {"id": item_id, "trace": None if found is None else found[0]}


async def seen(collector: Collector, *names: str) -> None:
    """Wait until the collector has spans with these names."""
    await asyncio.to_thread(collector.wait_for, *names, seconds=SECONDS)


async def test_the_plugin_traces_and_flushes_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """This works for each lifespan; the global tracer provider is not changed."""
    before = trace.get_tracer_provider()
    with http_collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
        app = Litestar([item], plugins=[OperationsPlugin(OperationsConfig(settings=Settings()))])
        shown = []
        for number in range(2):
            async with AsyncTestClient(app) as client:
                shown.append((await client.get(f"/items/{number}")).json()["trace"])
                assert (await client.get("/health/live")).status_code == 200
            await seen(collector, "GET /items/{item_id}", "shutdown")
            assert len(collector.named("shutdown")) == number + 1
    set_trace_source(None)

    assert [span.trace for span in collector.named("GET /items/{item_id}")] == shown
    assert {span.name for span in collector.spans if span.kind == "SERVER"} == {
        "GET /items/{item_id}"
    }
    assert trace.get_tracer_provider() is before


async def test_without_an_endpoint_there_is_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shutdown has no telemetry stage either."""
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    plugin = OperationsPlugin(OperationsConfig(settings=Settings()))
    app = Litestar([item], plugins=[plugin])
    async with AsyncTestClient(app) as client:
        response = await client.get(
            "/items/1", headers={"traceparent": f"00-{'1' * 32}-{'2' * 16}-01"}
        )

    assert response.json()["trace"] is None
    stages = [
        stage.name for phase in plugin.operations.shutdown.report().phases for stage in phase.stages
    ]
    assert "telemetry" not in stages
