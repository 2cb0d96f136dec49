"""An OTLP receiver over HTTP and gRPC that records spans, and ways for it to fail."""

import gzip
import http.server
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from tests.servers.waiting import wait_until

OK = 200


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A span as received."""

    trace: str
    id: str
    parent: str
    name: str
    kind: str
    failed: bool
    attributes: Mapping[str, Any]
    events: Sequence[tuple[str, Mapping[str, Any]]]
    resource: Mapping[str, Any]
    began: int
    ended: int


@dataclass
class Collector:
    """The received spans, and the configured response."""

    port: int = 0
    spans: list[Seen] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    requests: int = 0
    status: int = OK
    """The status over HTTP; spans are recorded only with 200."""
    hold: threading.Event = field(default_factory=threading.Event)
    """Responses wait for this event; it is set at first."""

    def __post_init__(self) -> None:
        """Release the responses."""
        self.hold.set()

    @property
    def url(self) -> str:
        """The address of the receiver."""
        return f"http://127.0.0.1:{self.port}"

    def keep(self, request: ExportTraceServiceRequest) -> None:
        """Record the spans of a request."""
        for of_resource in request.resource_spans:
            resource = _values(of_resource.resource.attributes)
            for scope in of_resource.scope_spans:
                self.spans += [_seen(span, resource) for span in scope.spans]

    def named(self, name: str) -> list[Seen]:
        """Return the spans of a name."""
        return [span for span in list(self.spans) if span.name == name]

    def wait_for(self, *names: str, seconds: float = 20.0) -> list[Seen]:
        """Return the first span of each name, once there are all."""

        def poll() -> list[Seen] | None:
            found = [self.named(name)[:1] for name in names]
            return [each[0] for each in found] if all(found) else None

        return wait_until(
            poll, seconds=seconds, what=lambda: f"{names}; {[s.name for s in self.spans]}"
        )


def _seen(span: Span, resource: Mapping[str, Any]) -> Seen:
    return Seen(
        trace=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        name=span.name,
        kind=Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        failed=span.status.code == 2,
        attributes=_values(span.attributes),
        events=[(event.name, _values(event.attributes)) for event in span.events],
        resource=resource,
        began=span.start_time_unix_nano,
        ended=span.end_time_unix_nano,
    )


def _values(pairs: Sequence[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    return None if kind is None else getattr(value, kind)


@contextmanager
def http_collector(port: int = 0) -> Iterator[Collector]:
    """Receive over HTTP, in protobuf."""
    collector = Collector()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            collector.requests += 1
            collector.headers.append({name.lower(): value for name, value in self.headers.items()})
            collector.hold.wait(60)
            status = collector.status if self.path == "/v1/traces" else 404
            if status == OK:
                collector.keep(ExportTraceServiceRequest.FromString(body))
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(status)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Suppress the log."""

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, *_: object) -> None:
            """Ignore disconnected clients."""

    with Server(("127.0.0.1", port), Handler) as server:
        collector.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield collector
        finally:
            collector.hold.set()
            server.shutdown()
            thread.join(5)


@contextmanager
def grpc_collector() -> Iterator[Collector]:
    """Receive over gRPC."""
    collector = Collector()

    class Servicer(TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> ExportTraceServiceResponse:  # noqa: N802
            collector.requests += 1
            collector.headers.append(dict(context.invocation_metadata()))
            collector.hold.wait(60)
            collector.keep(request)
            return ExportTraceServiceResponse()

    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool)
        add_TraceServiceServicer_to_server(Servicer(), server)  # type: ignore[no-untyped-call]
        collector.port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield collector
        finally:
            collector.hold.set()
            server.stop(0).wait(5)


COLLECTORS: Mapping[str, Callable[[], Any]] = {
    "http/protobuf": http_collector,
    "grpc": grpc_collector,
}


@contextmanager
def silent_port() -> Iterator[int]:
    """Accept connections and never answer."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield listener.getsockname()[1]
