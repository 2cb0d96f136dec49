"""Request metrics and log lines: no label and no stored value is chosen by a client."""

import enum
import gc
import json
import logging
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from tests.unit.metrics.reading import series, value
from uvicorn.protocols.utils import ClientDisconnected

from viralfx.telemetry import EndedRequest
from viralfx.telemetry.logging.lines import JsonLines
from viralfx.telemetry.logging.redaction import Redaction
from viralfx.telemetry.metrics.requests import RequestMetrics
from viralfx.web.in_flight import InFlightRequests, RequestRecorder

COUNT = "http_server_request_duration_seconds_count"


@pytest.fixture
def registry() -> CollectorRegistry:
    """Return an empty registry."""
    return CollectorRegistry()


class RequestHandler(logging.NullHandler):
    """Receives ended requests without log records, as the handler of the service does."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[EndedRequest] = []
        self.accept_request = self.requests.append


class MessageHandler(logging.Handler):
    """Collects the messages of log records."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Store the message of a record."""
        self.messages.append(record.getMessage())


@contextmanager
def logging_requests() -> Iterator[list[EndedRequest]]:
    """Yield the list of requests that are logged within the block."""
    # Not in a fixture: the test framework replaces its handlers between fixture and test.
    root, access, handler = (
        logging.getLogger(),
        logging.getLogger("viralfx.access"),
        RequestHandler(),
    )
    before, root.handlers[:] = root.handlers[:], [handler]
    level = access.level
    access.setLevel(logging.INFO)
    try:
        yield handler.requests
    finally:
        access.setLevel(level)
        root.handlers[:] = before


async def nothing(*_: object) -> Any:
    """Receive or send nothing."""


class Code(int, enum.Enum):
    """An enumeration of statuses, as an application may use: members are numbers with a name."""

    FINE = 200


async def test_an_enumeration_member_is_recorded_as_its_number(
    registry: CollectorRegistry,
) -> None:
    """The member's name must be neither a metric label nor a JSON value; 1000000 is no status."""
    recorder = RequestRecorder(RequestMetrics(registry), access_log=True)
    requests = InFlightRequests(recorder.record)
    with logging_requests() as logged:
        for status in (Code.FINE, 200, 1_000_000):
            scope = {"type": "http", "headers": [], "method": "GET", "path_template": "/"}
            request = requests.begin(scope, nothing, nothing, (b"", b""))
            await request.send({"type": "http.response.start", "status": status})
            requests.end(request)
    made = JsonLines(Redaction(), lambda _: []).render_requests(logged).splitlines()

    assert [json.loads(line).get("status") for line in made] == [200, 200, None]
    assert value(registry, COUNT, **labels("GET", "/", 200)) == 2


async def end_request(
    recorder: RequestRecorder, scope: dict[str, Any], status: int | None = 200
) -> None:
    """Record a request that ended with ``status``; None: without a response."""
    requests = InFlightRequests(recorder.record)
    request = requests.begin({"type": "http", "headers": [], **scope}, nothing, nothing, (b"", b""))
    request.status, request.complete = status, status is not None
    requests.end(request)


def labels(method: str, route: str, status: int) -> dict[str, str]:
    """Return the metric labels of a request."""
    return {
        "http_request_method": method,
        "http_route": route,
        "http_response_status_code": str(status),
    }


async def test_requests_without_a_route_share_one_label(registry: CollectorRegistry) -> None:
    """A scanner that tries many paths creates one time series."""
    recorder = RequestRecorder(RequestMetrics(registry), access_log=True)
    with logging_requests() as logged:
        for number in range(3):
            await end_request(recorder, {"method": "GET", "path": f"/{number}"}, 404)

    assert value(registry, COUNT, **labels("GET", "unmatched", 404)) == 3
    assert [request.message for request in logged] == ["GET unmatched 404"] * 3


async def test_ten_thousand_unknown_methods_are_one_series(
    registry: CollectorRegistry,
) -> None:
    """Unknown methods are counted as _OTHER and use no memory; known methods keep their label."""
    recorder = RequestRecorder(RequestMetrics(registry), access_log=True)
    await end_request(recorder, {"method": "GET", "path_template": "/"})
    await end_request(recorder, {"method": "X0", "path_template": "/"}, 405)
    before = series(registry)
    with logging_requests() as logged:
        tracemalloc.start()
        try:
            gc.collect()
            before_bytes, _ = tracemalloc.get_traced_memory()
            for number in range(1, 10_001):
                await end_request(recorder, {"method": f"X{number}", "path_template": "/"}, 405)
                assert logged.pop().method == "_OTHER"
            gc.collect()
            kept = tracemalloc.get_traced_memory()[0] - before_bytes
        finally:
            tracemalloc.stop()

    assert series(registry) == before
    assert value(registry, COUNT, **labels("_OTHER", "/", 405)) == 10_001
    assert kept < 200_000


async def test_metrics_and_log_line_of_a_request_agree(registry: CollectorRegistry) -> None:
    """This includes a cut request, and one with an impossible Content-Length."""
    recorder = RequestRecorder(RequestMetrics(registry), access_log=True)
    head = {"method": "POST", "path_template": "/orders"}
    with logging_requests() as logged:
        await end_request(recorder, {**head, "headers": [(b"content-length", b"12")]}, 201)
        await end_request(recorder, {**head, "headers": [(b"content-length", b"9" * 40)]}, None)
    whole, cut = logged

    assert (whole.status, whole.received, whole.cut) == (201, 12, False)
    assert (cut.status, cut.received, cut.cut) == (None, None, True)
    assert value(registry, "viralfx_requests_cut_total") == 1


@pytest.mark.parametrize("encoding", [[], [(b"content-encoding", b"gzip")]], ids=["plain", "gzip"])
async def test_an_event_stream_is_not_in_the_duration_histogram(
    encoding: list[tuple[bytes, bytes]], registry: CollectorRegistry
) -> None:
    """Event streams have their own counter; their duration is in the log line only."""
    recorder = RequestRecorder(RequestMetrics(registry), access_log=True)
    requests = InFlightRequests(recorder.record)
    scope = {"type": "http", "headers": [], "method": "GET", "path_template": "/events"}
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), *encoding]
    with logging_requests() as logged:
        request = requests.begin(scope, nothing, nothing, (b"", b""))
        await request.send({"type": "http.response.start", "status": 200, "headers": headers})
        request.started_at -= 3600
        requests.end(request)

    assert value(registry, COUNT, **labels("GET", "/events", 200)) is None
    assert value(registry, "viralfx_event_streams_total", http_route="/events") == 1
    assert [request.message for request in logged] == ["GET /events 200"]
    assert logged[0].seconds > 3599


@pytest.mark.parametrize("status", [400, 404, 503])
async def test_a_failed_event_stream_is_recorded_as_an_ordinary_request(
    status: int, registry: CollectorRegistry
) -> None:
    """The content type of an error response does not make it an event stream."""
    recorder = RequestRecorder(RequestMetrics(registry), access_log=False)
    requests, sent = InFlightRequests(recorder.record), list[Any]()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": [], "method": "GET", "path_template": "/events"}
    headers = [(b"content-type", b"text/event-stream")]
    request = requests.begin(scope, nothing, send, (b"", b""))
    await request.send({"type": "http.response.start", "status": status, "headers": headers})
    requests.announce_shutdown()
    body = {"type": "http.response.body", "body": b"data: no\n\n", "more_body": True}
    await request.send(body)
    requests.end(request)

    assert value(registry, COUNT, **labels("GET", "/events", status)) == 1
    assert value(registry, "viralfx_event_streams_total", http_route="/events") is None
    assert sent[1:] == [body]


async def test_a_new_log_handler_receives_records_of_requests(registry: CollectorRegistry) -> None:
    """After the handler is removed, requests are logged without records again."""
    recorder = RequestRecorder(RequestMetrics(registry), access_log=True)
    handler, access = MessageHandler(), logging.getLogger("viralfx.access")
    deadline = time.monotonic() + 5
    with logging_requests() as logged:
        await end_request(recorder, {"method": "GET", "path_template": "/"})
        access.addHandler(handler)
        try:
            while not handler.messages and time.monotonic() < deadline:
                await end_request(recorder, {"method": "GET", "path_template": "/"})
        finally:
            access.removeHandler(handler)
        before = len(logged)
        while len(logged) == before and time.monotonic() < deadline:
            await end_request(recorder, {"method": "GET", "path_template": "/"})

    assert handler.messages[0] == "GET / 200"
    assert len(logged) > before > 0


RECEIVED = [
    {"type": "websocket.connect"},
    {"type": "websocket.receive", "text": "hellö", "bytes": None},
    {"type": "websocket.receive", "bytes": b"1234"},
]
ACCEPT = {"type": "websocket.accept"}
SENT = [{"type": "websocket.send", "text": "ä"}, {"type": "websocket.send", "bytes": b"12345"}]


def closed_by_client(code: int | None) -> dict[str, Any]:
    """Return the message about a client that closed."""
    return {"type": "websocket.disconnect", "code": code}


@pytest.mark.parametrize(
    ("received", "sent", "error", "ended"),
    [
        ([*RECEIVED, closed_by_client(1001)], [ACCEPT, *SENT], None, (101, 1001, "1001", False)),
        ([*RECEIVED, closed_by_client(None)], [ACCEPT, *SENT], None, (101, 1005, "1005", False)),
        ([*RECEIVED, closed_by_client(4711)], [ACCEPT, *SENT], None, (101, 4711, "4xxx", False)),
        ([*RECEIVED, closed_by_client(2999)], [ACCEPT, *SENT], None, (101, 2999, "other", False)),
        (RECEIVED, [ACCEPT, *SENT, {"type": "websocket.close"}], None, (101, 1000, "1000", False)),
        (
            RECEIVED,
            [ACCEPT, *SENT, {"type": "websocket.close", "code": 3000}],
            None,
            (101, 3000, "3xxx", False),
        ),
        (RECEIVED, [ACCEPT, *SENT], None, (101, 1006, "1006", True)),
        (RECEIVED, [ACCEPT, *SENT], RuntimeError("planted"), (101, 1011, "1011", False)),
        (RECEIVED, [{"type": "websocket.close"}], None, (403, None, "rejected", False)),
        (
            RECEIVED,
            [{"type": "websocket.http.response.start", "status": 404, "headers": []}],
            None,
            (404, None, "rejected", False),
        ),
        (RECEIVED, [], RuntimeError("planted"), (500, None, "rejected", False)),
        ([closed_by_client(1006)], [], None, (None, None, "rejected", False)),
        (RECEIVED, [ACCEPT, *SENT], ClientDisconnected(), (101, 1006, "1006", True)),
        (RECEIVED, [], ClientDisconnected(), (None, None, "rejected", False)),
    ],
    ids=[
        "client",
        "client-without-code",
        "client-own-code",
        "client-odd-code",
        "server",
        "server-own-code",
        "without-frame",
        "error",
        "rejected",
        "rejected-by-response",
        "error-before",
        "left-before",
        "left-unnoticed",
        "left-unnoticed-before",
    ],
)
async def test_a_websocket_is_recorded_once_at_its_end(
    received: list[dict[str, Any]],
    sent: list[dict[str, Any]],
    error: Exception | None,
    ended: tuple[int | None, int | None, str, bool],
    registry: CollectorRegistry,
) -> None:
    """With status, close code and bytes; clients cannot create series with their codes."""
    recorder = RequestRecorder(RequestMetrics(registry), access_log=True)
    requests, messages = InFlightRequests(recorder.record), iter(received)

    async def receive() -> dict[str, Any]:
        return next(messages)

    scope = {"type": "websocket", "headers": [], "path_template": "/chat"}
    with logging_requests() as logged:
        request = requests.begin(scope, receive, nothing, (b"", b""))
        await request.receive_websocket()
        for message in sent:
            await request.send_websocket(dict(message))
        for _ in received[1:]:
            await request.receive_websocket()
        if error is not None:
            request.record_error(error)
        requests.end(request)
    status, code, label, cut = ended
    (line,) = logged
    bytes_sent = 0 if code is None else 7
    bytes_received = 0 if len(received) == 1 else 10

    assert (line.method, line.route, line.status, line.close_code) == (
        "WEBSOCKET",
        "/chat",
        status,
        code,
    )
    assert (line.received, line.sent, line.cut) == (bytes_received, bytes_sent, cut)
    assert line.message == f"WEBSOCKET /chat {code or status or 'without a response'}"
    assert value(registry, "viralfx_websockets_total", http_route="/chat", close_code=label) == 1
    sizes = ("viralfx_websocket_received_bytes_total", "viralfx_websocket_sent_bytes_total")
    assert [value(registry, name, http_route="/chat") for name in sizes] == [
        bytes_received,
        bytes_sent,
    ]
