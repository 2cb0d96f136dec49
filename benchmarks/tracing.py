"""Measures the cost of tracing a request: our wrapper and OpenTelemetry's contrib middleware.

One no-op ASGI application is called in this process, in turns bare and wrapped, so that other
activity of the machine affects all alike. The figures are the median of the rounds, in microseconds
of processor time per request. Contrib's middleware is in the dependency group ``bench-tracing``.
"""

import asyncio
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from viralfx.core.correlation import bind_correlation_id, new_correlation_id
from viralfx.telemetry.tracing.provider import make_provider
from viralfx.telemetry.tracing.spans import TracedRequests

ROUNDS = 31
REQUESTS = 1000

App = Callable[[Any, Any, Any], Awaitable[None]]

HEADERS = [
    (b"host", b"127.0.0.1:3000"),
    (b"user-agent", b"benchmark"),
    (b"accept", b"*/*"),
    (b"connection", b"keep-alive"),
]


class Nowhere(SpanExporter):
    """Discards every span."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:  # noqa: ARG002
        """Discard the spans."""
        return SpanExportResult.SUCCESS


async def noop(scope: MutableMapping[str, Any], _receive: object, send: Any) -> None:
    """Send an empty response."""
    scope["path_template"] = "/work"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


async def _receive() -> MutableMapping[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


async def _send(_message: object) -> None:
    pass


async def call(app: App, parent: bytes | None) -> float:
    """Return the microseconds per request in one round."""
    headers = [*HEADERS, *([(b"traceparent", parent)] if parent else [])]
    began = time.process_time()
    for _ in range(REQUESTS):
        bind_correlation_id(new_correlation_id())
        await app(
            {
                "type": "http",
                "method": "GET",
                "path": "/work",
                "raw_path": b"/work",
                "query_string": b"",
                "root_path": "",
                "scheme": "http",
                "http_version": "1.1",
                "client": ("127.0.0.1", 4711),
                "server": ("127.0.0.1", 3000),
                "headers": headers,
            },
            _receive,
            _send,
        )
    return (time.process_time() - began) / REQUESTS * 1e6


def subjects() -> dict[str, tuple[App, bytes | None]]:
    """Return each compared application with the parent that its requests name."""
    never, always = _provider("0"), _provider("1")
    ours = TracedRequests(noop, never.get_tracer("bench"), never.sampler)
    parent = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
    found: dict[str, tuple[App, bytes | None]] = {
        "bare": (noop, None),
        "ours, not sampled": (ours, None),
        "ours, the caller did not sample": (ours, parent),
        "ours, sampled": (TracedRequests(noop, always.get_tracer("bench"), always.sampler), None),
    }
    try:
        from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware  # noqa: PLC0415
    except ImportError:
        return found
    for name, provider in (("not sampled", never), ("sampled", always)):
        found[f"contrib, {name}"] = (
            OpenTelemetryMiddleware(
                noop, tracer_provider=provider, exclude_spans=["receive", "send"]
            ),
            None,
        )
    return found


def _provider(share: str) -> Any:
    os.environ["OTEL_TRACES_SAMPLER"] = "parentbased_traceidratio"
    os.environ["OTEL_TRACES_SAMPLER_ARG"] = share
    return make_provider(instance="bench", environment="bench", exporter=Nowhere())[0]


async def main() -> None:
    """Measure, and print a table."""
    compared = subjects()
    taken: dict[str, list[float]] = {name: [] for name in compared}
    for _ in range(ROUNDS):
        for name, (app, parent) in compared.items():
            taken[name].append(await asyncio.create_task(call(app, parent)))
    bare = statistics.median(taken["bare"])
    print("| application | microseconds | more than bare |\n|---|---|---|")
    for name, figures in taken.items():
        middle = statistics.median(figures)
        print(f"| {name} | {middle:.1f} | {middle - bare:.1f} |")


if __name__ == "__main__":
    asyncio.run(main())
