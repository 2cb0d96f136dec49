"""Applications with a tracer provider of their own, which print their spans and end.

Each argument is one of them, and says what else makes spans of its requests: nothing, plugin,
middleware or around.
"""

import asyncio
import json
import sys

from litestar import Litestar, get
from litestar.plugins.opentelemetry import OpenTelemetryConfig, OpenTelemetryPlugin
from litestar.testing import AsyncTestClient
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from viralfx import OperationsConfig, OperationsPlugin, task
from viralfx.server.interface import ASGIApp, Receive, Scope, Send
from viralfx.settings import Settings


@task("pack")
async def pack(order: int) -> int:
    """Pack an order."""
    return order


def around(app: ASGIApp) -> ASGIApp:
    """Return middleware of a server or of another library, outside of the plugin."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        tracer = trace.get_tracer("around")
        with tracer.start_as_current_span("around", kind=trace.SpanKind.SERVER):
            await app(scope, receive, send)

    return serve


async def main(kind: str) -> dict[str, object]:
    """Serve one request, and return its spans."""
    plugin = OperationsPlugin(OperationsConfig(settings=Settings(), tasks=[pack]))

    @get("/orders")
    async def orders() -> str:
        """Submit a job, within the span of the request."""
        job = (await plugin.jobs.submit("pack", 1)).job
        await plugin.jobs.wait(job.id)
        return job.id

    memory.clear()
    more = [OpenTelemetryPlugin(OpenTelemetryConfig())] if kind == "plugin" else []
    middleware = [OpenTelemetryConfig().middleware] if kind == "middleware" else []
    app = Litestar([orders], plugins=[plugin, *more], middleware=middleware, logging_config=None)
    async with AsyncTestClient(app) as client:
        if kind == "around":
            app.asgi_handler = around(app.asgi_handler)  # type: ignore[arg-type, assignment]
        (await client.get("/orders")).raise_for_status()
    spans = [
        {"name": span.name, "kind": span.kind.name, "trace": f"{span.context.trace_id:032x}"}
        for span in memory.get_finished_spans()
        if span.context is not None
    ]
    tracer = trace.get_tracer("after")
    with tracer.start_as_current_span("after"):
        pass
    return {"spans": spans, "alive": len(memory.get_finished_spans()) > len(spans)}


memory = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(memory))
trace.set_tracer_provider(provider)

if __name__ == "__main__":
    found = {kind: asyncio.run(main(kind)) for kind in sys.argv[1:]}
    sys.stdout.write(json.dumps(found) + "\n")
