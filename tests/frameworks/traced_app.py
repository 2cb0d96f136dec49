"""Applications that trace themselves within the layer; prints the spans of requests to them.

Without an argument all of them use one tracer provider of their own, which is there before the
layer. With ``lifespan`` or ``startup`` an application sets it while it starts. With ``ids`` it has
none, so that its spans go to the provider of the layer.
"""

import asyncio
import json
import logging
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import ModuleType
from typing import cast

import django
from asgiref.sync import markcoroutinefunction
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpRequest, HttpResponse
from django.urls import path
from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient
from litestar import Litestar, get
from litestar.plugins.opentelemetry import OpenTelemetryPlugin
from opentelemetry import trace
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from quart import Quart
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from viralfx import OperationsConfig, OperationsPlugin
from viralfx.asgi import AnyApp, OperationsMiddleware
from viralfx.server.interface import ASGIApp, Receive, Scope, Send
from viralfx.settings import Settings
from viralfx.web.layer import OperationsLayer


async def plain(scope: Scope, _receive: Receive, send: Send) -> None:
    """Answer each request."""
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"here"})


async def here(_request: Request) -> PlainTextResponse:
    """Answer."""
    return PlainTextResponse("here")


def bare() -> AnyApp:
    """Return an application without an instrumentation."""
    return FastAPI(routes=[Route("/", here)], telemetry={"tracing": False})


def native() -> AnyApp:
    """Return an application of a FastAPI that makes spans by itself."""
    return FastAPI(routes=[Route("/", here)])


def fastapi() -> AnyApp:
    """Return an application with the middleware of OpenTelemetry."""
    app = FastAPI(routes=[Route("/", here)])
    app.add_middleware(OpenTelemetryMiddleware)
    return app


def instrumented() -> AnyApp:
    """Return an application in the state in which OpenTelemetry's FastAPIInstrumentor leaves it."""
    app = FastAPI(routes=[Route("/", here)])
    build = app.build_middleware_stack
    app.build_middleware_stack = lambda: OpenTelemetryMiddleware(build())  # type: ignore[method-assign]
    vars(app)["_is_instrumented_by_opentelemetry"] = True
    return app


def starlette() -> AnyApp:
    """Return an application with the middleware of OpenTelemetry."""
    app = Starlette(routes=[Route("/", here)])
    app.add_middleware(OpenTelemetryMiddleware)
    return app


class Outer:
    """Middleware around an application, as many libraries have it."""

    def __init__(self, app: AnyApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a scope on."""
        await self.app(scope, receive, send)


def asgi() -> AnyApp:
    """Return an application in two layers of middleware."""
    return Outer(OpenTelemetryMiddleware(plain))


def quart() -> AnyApp:
    """Return an application of Quart, as its documents add middleware."""
    app = Quart(__name__)
    app.add_url_rule("/", "here", lambda: "here")
    app.asgi_app = OpenTelemetryMiddleware(app.asgi_app)  # type: ignore[method-assign]
    return app


class DjangoMiddleware:
    """Makes spans as the middleware of OpenTelemetry, which is no package of the tests."""

    sync_capable, async_capable = False, True

    def __init__(self, get_response: Callable[[HttpRequest], Awaitable[HttpResponse]]) -> None:
        self.get_response = get_response
        markcoroutinefunction(self)

    async def __call__(self, request: HttpRequest) -> HttpResponse:
        """Handle a request within a span."""
        with trace.get_tracer("django").start_as_current_span("GET", kind=trace.SpanKind.SERVER):
            return await self.get_response(request)


async def here_in_django(_request: HttpRequest) -> HttpResponse:
    """Answer."""
    return HttpResponse("here")


urlpatterns = [path("", here_in_django)]


def of_django() -> AnyApp:
    """Return an application of Django with the middleware that its instrumentation adds."""
    module = ModuleType("opentelemetry.instrumentation.django.middleware.otel_middleware")
    vars(module)["_DjangoMiddleware"] = DjangoMiddleware
    sys.modules[module.__name__] = module
    settings.configure(
        SECRET_KEY="of a test",
        ROOT_URLCONF=__name__,
        ALLOWED_HOSTS=["*"],
        MIDDLEWARE=[f"{module.__name__}._DjangoMiddleware"],
        LOGGING_CONFIG=None,
    )
    django.setup()
    app: AnyApp = get_asgi_application()
    return app


def wrapped(app: AnyApp) -> OperationsMiddleware:
    """Return an application in the layer."""
    return OperationsMiddleware(app, OperationsConfig(settings=Settings(), jobs_api=True))


class Lines(logging.Handler):
    """Keeps the trace ids of access lines."""

    def __init__(self) -> None:
        super().__init__()
        self.traces: list[str | None] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.traces.append(vars(record).get("traceId"))


async def spans_of(
    app: OperationsMiddleware, path: str = "/", beginning: str = "here"
) -> tuple[int, bool]:
    """Return the number of server spans of one request, and whether its line has their trace."""
    memory.clear()
    lines.traces.clear()
    transport = ASGITransport(app=app)
    async with AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.get(path)
    assert response.status_code == 200, response.text
    assert response.text.startswith(beginning)
    spans = [s for s in memory.get_finished_spans() if s.kind is trace.SpanKind.SERVER]
    ids = [f"{s.context.trace_id:032x}" for s in spans if s.context is not None]
    return len(spans), lines.traces == ids


def late_fastapi() -> tuple[ASGIApp, OperationsLayer]:
    """Return an application that sets the provider in its lifespan."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        trace.set_tracer_provider(provider)
        yield

    app = wrapped(FastAPI(routes=[Route("/", here)], lifespan=lifespan))
    return app, app


def late_litestar() -> tuple[ASGIApp, OperationsLayer]:
    """Return an application that sets the provider after the lifespans of its plugins began."""

    @get("/", sync_to_thread=False)
    def here_in_litestar() -> str:
        return "here"

    plugin = OperationsPlugin(OperationsConfig(settings=Settings(), jobs_api=True))
    app = Litestar(
        [here_in_litestar],
        plugins=[plugin, OpenTelemetryPlugin()],
        on_startup=[lambda: trace.set_tracer_provider(provider)],
        logging_config=None,
    )
    return cast("ASGIApp", app), plugin


def server_spans(exporter: InMemorySpanExporter) -> list[ReadableSpan]:
    """Return the spans of requests."""
    return [s for s in exporter.get_finished_spans() if s.kind is trace.SpanKind.SERVER]


def keep_spans_of(layer: OperationsLayer) -> InMemorySpanExporter:
    """Keep the spans that go to the provider of the layer."""
    tracing = layer.assembly.tracing
    assert tracing is not None
    kept = InMemorySpanExporter()
    tracing.provider.add_span_processor(SimpleSpanProcessor(kept))
    return kept


def late(app: ASGIApp, layer: OperationsLayer) -> dict[str, tuple[int, int]]:
    """Return the numbers of spans in the provider of the application and in that of the layer."""
    own = keep_spans_of(layer)
    found: dict[str, tuple[int, int]] = {}
    with TestClient(app) as client:
        for path in ("/", "/api/v1/jobs", "/"):
            memory.clear()
            own.clear()
            assert client.get(path).status_code == 200
            found[path] = (len(server_spans(memory)), len(server_spans(own)))
    return found


def ids(app: OperationsMiddleware) -> list[tuple[str | None, str]]:
    """Return the correlation id of each response, and the trace id of its span."""
    tracing = app.assembly.tracing
    assert tracing is not None
    tracing.make_global()
    own = keep_spans_of(app)
    found: list[tuple[str | None, str]] = []
    sent: list[dict[str, str]] = [
        {},
        {},
        {"X-Correlation-ID": "order-17"},
        {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"},
        {"traceparent": "malformed"},
    ]
    with TestClient(app) as client:
        for headers in sent:
            own.clear()
            response = client.get("/", headers=headers)
            (span,) = server_spans(own)
            assert span.context is not None
            trace_id = f"{span.context.trace_id:032x}"
            found.append((response.headers.get("X-Correlation-ID"), trace_id))
    return found


async def main() -> dict[str, object]:
    """Ask each application once."""
    alone = wrapped(native())
    own = keep_spans_of(alone)
    await asyncio.create_task(spans_of(alone))
    result: dict[str, object] = {"without a provider": len(server_spans(own))}
    trace.set_tracer_provider(provider)
    for make in (bare, native, fastapi, instrumented, starlette, asgi, quart, of_django):
        # A server has a task for each request, and the span is current in it.
        result[make.__name__] = await asyncio.create_task(spans_of(wrapped(make())))
    for make in (bare, native):
        asked = spans_of(wrapped(make()), "/api/v1/jobs", '{"items":')
        result[f"jobs beside {make.__name__}"] = await asyncio.create_task(asked)
    return result


lines = Lines()
logging.getLogger("viralfx.access").addHandler(lines)
logging.getLogger("viralfx.access").setLevel(logging.INFO)
memory = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(memory))

if __name__ == "__main__":
    os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:9"
    shown: object
    match sys.argv[1:]:
        case ["lifespan"]:
            shown = late(*late_fastapi())
        case ["startup"]:
            shown = late(*late_litestar())
        case ["ids"]:
            shown = ids(wrapped(native()))
        case _:
            shown = asyncio.run(main())
    sys.stdout.write(json.dumps(shown) + "\n")
