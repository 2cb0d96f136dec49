"""Tests of request spans: attributes, parents, and limits on client data."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import pytest
from opentelemetry import baggage
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext, SpanKind, StatusCode, get_current_span
from tests.unit.tracing.conftest import Finished

from viralfx.core.correlation import bind_correlation_id, correlation_id_of, new_correlation_id
from viralfx.telemetry.tracing.provider import make_provider
from viralfx.telemetry.tracing.spans import TracedRequests

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


class App:
    """An application with one route."""

    def __init__(self, status: int | None = 200, error: BaseException | None = None) -> None:
        self.status = status
        self.error = error
        self.inside: list[Any] = []

    async def __call__(self, scope: Any, _receive: Any, send: Any) -> None:
        """Respond, or raise the error."""
        self.inside.append((get_current_span().get_span_context(), baggage.get_all()))
        if scope["type"] == "http" and scope["path"].startswith("/items/"):
            scope["path_template"] = "/items/{item_id}"
        if self.status is not None:
            await send({"type": "http.response.start", "status": self.status, "headers": []})
        if self.error is not None:
            raise self.error


def ask(
    provider: TracerProvider,
    app: App,
    *headers: tuple[str, str],
    method: str = "GET",
    path: str = "/items/4",
    correlation_id: str | None = None,
    kind: str = "http",
) -> None:
    """Send one request in a task of its own."""

    async def send(_message: Any) -> None:
        """Discard the message."""

    async def run() -> None:
        bind_correlation_id(correlation_id or new_correlation_id())
        scope = {
            "type": kind,
            "method": method,
            "path": path,
            "scheme": "http",
            "http_version": "1.1",
            "client": ("192.0.2.7", 4711),
            "server": ("127.0.0.1", 3000),
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers],
        }
        tracer, sampler = provider.get_tracer("test"), provider.sampler
        traced = TracedRequests(
            app,
            tracer,
            sampler,  # type: ignore[arg-type]
            route_of=lambda scope: scope.get("path_template"),
        )
        await traced(scope, None, send)  # type: ignore[arg-type]

    asyncio.run(run())


def only(spans: Sequence[ReadableSpan]) -> ReadableSpan:
    """Return the only finished span."""
    (span,) = spans
    return span


def test_a_request_is_named_by_its_route(provider: TracerProvider, finished: Finished) -> None:
    """The attributes follow the current semantic conventions."""
    ask(
        provider,
        App(201),
        ("Host", "shop.example:8443"),
        ("User-Agent", "curl/8"),
        ("X-Correlation-ID", "order-17"),
        method="POST",
        correlation_id="order-17",
    )
    span = only(finished())

    assert (span.name, span.kind, span.parent) == ("POST /items/{item_id}", SpanKind.SERVER, None)
    assert span.status.status_code is StatusCode.UNSET
    assert span.attributes == {
        "http.request.method": "POST",
        "http.route": "/items/{item_id}",
        "http.response.status_code": 201,
        "url.path": "/items/4",
        "url.scheme": "http",
        "server.address": "shop.example",
        "server.port": 8443,
        "client.address": "192.0.2.7",
        "network.protocol.version": "1.1",
        "user_agent.original": "curl/8",
        "viralfx.correlation_id": "order-17",
    }


def test_a_request_without_a_route_is_named_by_its_method(
    provider: TracerProvider, finished: Finished
) -> None:
    """Clients cannot create new span names with paths or methods."""
    for number in range(100):
        ask(provider, App(404), path=f"/nothing/{number}", method=f"M{number}")
        ask(provider, App(404), path=f"/nothing/{number}")
    spans = finished()

    assert {span.name for span in spans} == {"HTTP", "GET"}
    assert spans[0].attributes is not None
    assert spans[0].attributes["http.request.method"] == "_OTHER"
    assert spans[0].attributes["http.request.method_original"] == "M0"
    assert "http.route" not in spans[0].attributes


def test_an_unrecorded_request_has_one_span_context(
    monkeypatch: pytest.MonkeyPatch, memory: InMemorySpanExporter
) -> None:
    """Repeated reads return the same context, and outgoing calls carry the unsampled flag."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    provider, _ = make_provider(instance="here", environment="test", exporter=memory)
    seen: list[SpanContext] = []

    async def app(_scope: Any, _receive: Any, _send: Any) -> None:
        seen.extend(get_current_span().get_span_context() for _ in range(2))
        assert repr(seen[0]) in repr(get_current_span())

    ask(provider, app)  # type: ignore[arg-type]
    provider.shutdown()
    first, second = seen

    assert first is second
    assert first.is_valid
    assert not first.is_remote
    assert not first.trace_flags.sampled


def test_failures_are_on_the_span(provider: TracerProvider, finished: Finished) -> None:
    """A 5xx response, an error without a response and a cut request set the error status."""
    ask(provider, App(503))
    with pytest.raises(RuntimeError):
        ask(provider, App(None, RuntimeError("planted")))
    with pytest.raises(asyncio.CancelledError):
        ask(provider, App(None, asyncio.CancelledError()))
    ask(provider, App(404))
    spans = finished()

    types = [(span.attributes or {}).get("error.type") for span in spans]
    assert types == ["503", "RuntimeError", "CancelledError", None]
    assert [span.status.status_code is StatusCode.ERROR for span in spans] == [True] * 3 + [False]
    assert [event.name for event in spans[1].events] == ["exception"]


def test_a_callers_trace_is_continued(provider: TracerProvider, finished: Finished) -> None:
    """The service continues ``traceparent`` and ``tracestate`` and ignores ``baggage``."""
    app = App()
    ask(
        provider,
        app,
        ("traceparent", TRACEPARENT),
        ("tracestate", "a=1, b=2"),
        ("tracestate", "c=3"),
        ("baggage", "userId=admin"),
    )
    span = only(finished())
    ((inside, carried),) = app.inside

    assert span.parent is not None
    assert (f"{span.parent.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert inside == span.context
    assert inside.trace_state.to_header() == "a=1,b=2,c=3"
    assert carried == {}


@pytest.mark.parametrize(
    "headers",
    [
        [("traceparent", "")],
        [("traceparent", "00-xyz-b7ad6b7169203331-01")],
        [("traceparent", f"00-{'0' * 32}-{PARENT}-01")],
        [("traceparent", f"00-{TRACE}-{'0' * 16}-01")],
        [("traceparent", f"ff-{TRACE}-{PARENT}-01")],
        [("traceparent", f"00-{TRACE.upper()}-{PARENT}-01")],
        [("traceparent", f"00-{TRACE}-{PARENT}-01-more")],
        [("traceparent", "x" * 60_000)],
        [("traceparent", f" {TRACEPARENT}")],
        [("traceparent", TRACEPARENT), ("traceparent", TRACEPARENT)],
        [("traceparent", TRACEPARENT), ("traceparent", ""), ("traceparent", TRACEPARENT)],
        [("tracestate", "a=1")],
    ],
)
def test_a_malformed_parent_is_ignored(
    provider: TracerProvider,
    finished: Finished,
    caplog: pytest.LogCaptureFixture,
    headers: list[tuple[str, str]],
) -> None:
    """The request starts a trace with its correlation id, and no line is logged."""
    with caplog.at_level(logging.DEBUG):
        asked = [(name.encode(), value.encode()) for name, value in headers]
        correlation_id = correlation_id_of(asked)
        ask(provider, App(), *headers, correlation_id=correlation_id)

    span = only(finished())
    assert span.parent is None
    assert span.context is not None
    assert f"{span.context.trace_id:032x}" == correlation_id != TRACE
    assert [record for record in caplog.records if record.name != "asyncio"] == []


def test_a_future_version_of_traceparent_is_accepted(
    provider: TracerProvider, finished: Finished
) -> None:
    """Its additional fields are ignored."""
    ask(provider, App(), ("traceparent", f"01-{TRACE}-{PARENT}-01-more"))

    parent = only(finished()).parent
    assert parent is not None
    assert f"{parent.trace_id:032x}" == TRACE


@pytest.mark.parametrize(
    "state", ["", "=", "a", "a=1,a=2", "A=1", "a=\x7f", ",".join(["a=1"] * 40), "a=" + "1" * 60_000]
)
def test_a_malformed_tracestate_is_ignored(
    provider: TracerProvider, finished: Finished, caplog: pytest.LogCaptureFixture, state: str
) -> None:
    """The trace continues without it."""
    app = App()
    with caplog.at_level(logging.DEBUG):
        ask(provider, app, ("traceparent", TRACEPARENT), ("tracestate", state))

    assert only(finished()).parent is not None
    assert not app.inside[0][0].trace_state
    assert [record for record in caplog.records if record.name != "asyncio"] == []


def test_a_new_trace_has_the_generated_correlation_id(
    provider: TracerProvider, finished: Finished
) -> None:
    """A correlation id that the client chose is not used as a trace id."""
    own = new_correlation_id()
    ask(provider, App(), correlation_id=own)
    ask(provider, App(), ("X-Correlation-ID", TRACE), correlation_id=TRACE)
    first, second = finished()

    assert f"{first.context.trace_id:032x}" == own
    assert f"{second.context.trace_id:032x}" != TRACE


def test_an_invalid_correlation_id_is_replaced_in_the_trace(
    provider: TracerProvider, finished: Finished
) -> None:
    """The generated correlation id becomes the trace id."""
    own = new_correlation_id()
    ask(provider, App(), ("X-Correlation-ID", "not valid"), correlation_id=own)

    assert f"{only(finished()).context.trace_id:032x}" == own


def test_client_attributes_are_truncated(provider: TracerProvider, finished: Finished) -> None:
    """Queued spans stay in memory, so client data is limited."""
    long = "x" * 60_000
    ask(provider, App(), ("User-Agent", long), ("Host", long), path=f"/items/{long}", method=long)

    for value in (only(finished()).attributes or {}).values():
        assert len(str(value)) <= 256


def test_an_unsampled_request_only_has_a_trace_id(
    monkeypatch: pytest.MonkeyPatch, memory: InMemorySpanExporter
) -> None:
    """Outgoing calls carry the unsampled flag, so that called services do not record either."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    provider, _ = make_provider(instance="here", environment="test", exporter=memory)
    app = App()
    ask(provider, app)
    ask(provider, app, ("traceparent", TRACEPARENT))
    ask(provider, app, ("traceparent", TRACEPARENT.removesuffix("1") + "0"))
    provider.force_flush()
    provider.shutdown()

    assert [inside.trace_flags.sampled for inside, _ in app.inside] == [False, True, False]
    assert all(inside.is_valid for inside, _ in app.inside)
    assert len(memory.get_finished_spans()) == 1


def test_a_lifespan_is_not_traced(provider: TracerProvider, finished: Finished) -> None:
    """It passes through in the trace of the surrounding host."""
    app = App(None)
    with provider.get_tracer("test").start_as_current_span("the host's own"):
        ask(provider, app, kind="lifespan")

    span = only(finished())
    assert [inside for inside, _ in app.inside] == [span.context]


class Chat:
    """An application with one WebSocket."""

    def __init__(self, *messages: dict[str, Any], error: Exception | None = None) -> None:
        self.messages = messages
        self.error = error

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the messages, and receive one."""
        scope["path_template"] = "/chat/{room}"
        for message in self.messages:
            await send(message)
        if self.error is not None:
            raise self.error
        await receive()


ACCEPT = {"type": "websocket.accept"}
CLOSE = {"type": "websocket.close", "code": 4000}


@pytest.mark.parametrize(
    ("messages", "status", "code"),
    [
        ((ACCEPT,), 101, 1001),
        ((ACCEPT, CLOSE), 101, 4000),
        ((ACCEPT, {"type": "websocket.close"}), 101, 1000),
        ((CLOSE,), 403, 1001),
        (({"type": "websocket.http.response.start", "status": 404},), 404, 1001),
        ((), None, None),
    ],
    ids=["client", "server", "server-without-code", "rejected", "response", "left-before"],
)
def test_a_websocket_has_one_span(
    provider: TracerProvider,
    finished: Finished,
    messages: tuple[dict[str, Any], ...],
    status: int | None,
    code: int | None,
) -> None:
    """Named by its route, with the status of the handshake and the close code."""
    ask_websocket(provider, Chat(*messages), [])
    span = only(finished())
    attributes = dict(span.attributes or {})

    assert (span.name, span.kind) == ("WEBSOCKET /chat/{room}", SpanKind.SERVER)
    assert attributes["http.request.method"] == "GET"
    assert attributes["network.protocol.name"] == "websocket"
    assert attributes.get("http.response.status_code") == status
    assert attributes.get("viralfx.websocket.close_code") == (None if status != 101 else code)
    assert span.status.status_code is StatusCode.UNSET


def test_the_error_of_a_websocket_is_in_its_span(
    provider: TracerProvider, finished: Finished
) -> None:
    """It is in the trace of the caller."""
    traceparent = [(b"traceparent", TRACEPARENT.encode())]
    with pytest.raises(RuntimeError):
        ask_websocket(provider, Chat(ACCEPT, error=RuntimeError("planted")), traceparent)
    span = only(finished())

    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes or {})["error.type"] == "RuntimeError"
    assert f"{span.context.trace_id:032x}" == TRACE


def ask_websocket(provider: TracerProvider, app: Any, headers: list[tuple[bytes, bytes]]) -> None:
    """Open one WebSocket; the client closes it."""

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.disconnect", "code": 1001}

    async def send(_message: Any) -> None:
        """Discard the message."""

    async def run() -> None:
        scope = {"type": "websocket", "path": "/chat/1", "scheme": "ws", "headers": headers}
        traced = TracedRequests(
            app,
            provider.get_tracer("test"),
            provider.sampler,  # type: ignore[arg-type]
            route_of=lambda scope: scope.get("path_template"),
        )
        await traced(scope, receive, send)

    asyncio.run(run())


@pytest.mark.parametrize("headers", [[], [(b"traceparent", b""), (b"tracestate", b"a=1")]])
@pytest.mark.parametrize("sampler", ["always_on", "always_off"])
def test_a_websocket_does_not_join_the_previous_request(
    monkeypatch: pytest.MonkeyPatch,
    memory: InMemorySpanExporter,
    sampler: str,
    headers: list[tuple[bytes, bytes]],
) -> None:
    """A server may start it in the context of the previous request on the connection."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    provider, _ = make_provider(instance="here", environment="test", exporter=memory)
    app = App(None)
    traced = TracedRequests(app, provider.get_tracer("test"), provider.sampler)  # type: ignore[arg-type]

    async def connection() -> None:
        request = {"type": "http", "method": "GET", "path": "/", "http_version": "1.1"}
        await traced({**request, "headers": headers}, None, None)  # type: ignore[arg-type]
        websocket = {"type": "websocket", "path": "/", "headers": []}
        await traced(websocket, None, None)  # type: ignore[arg-type]

    asyncio.run(connection())
    provider.shutdown()

    first, second = (inside for inside, _ in app.inside)
    assert first.is_valid
    assert second.is_valid
    assert first.trace_id != second.trace_id
