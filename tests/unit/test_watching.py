"""What is told of requests: nothing that a client made up is counted by, or kept."""

import enum
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

from viralfx.telemetry.log_lines import JsonLines
from viralfx.telemetry.metrics.requests import RequestMetrics
from viralfx.telemetry.redaction import Redaction
from viralfx.telemetry.requests import EndedRequest
from viralfx.web.exchanges import Exchanges
from viralfx.web.watching import RequestWatch

COUNT = "http_server_request_duration_seconds_count"


@pytest.fixture
def registry() -> CollectorRegistry:
    """Return an empty registry."""
    return CollectorRegistry()


class Taker(logging.NullHandler):
    """Takes requests the short way, as the handler of a program does."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[EndedRequest] = []
        self.take_request = self.requests.append


class Seeing(logging.Handler):
    """Keeps the messages of records."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take one."""
        self.messages.append(record.getMessage())


@contextmanager
def logging_requests() -> Iterator[list[EndedRequest]]:
    """Yield what is logged of requests."""
    # Within the test: the test framework has handlers of its own by then.
    root, access, taker = logging.getLogger(), logging.getLogger("viralfx.access"), Taker()
    before, root.handlers[:] = root.handlers[:], [taker]
    level = access.level
    access.setLevel(logging.INFO)
    try:
        yield taker.requests
    finally:
        access.setLevel(level)
        root.handlers[:] = before


async def nothing(*_: object) -> Any:
    """Stand for a client that neither says nor takes anything."""


class Code(int, enum.Enum):
    """As an application may have: its members are numbers, but do not look like them."""

    FINE = 200


async def test_a_status_is_a_number_whatever_the_application_has(
    registry: CollectorRegistry,
) -> None:
    """Or the name of an enumeration's member would be a label, and break a line of JSON."""
    watch = RequestWatch(RequestMetrics(registry), access_log=True)
    exchanges = Exchanges(watch.ended)
    with logging_requests() as taken:
        for status in (Code.FINE, 200, 1_000_000):
            scope = {"type": "http", "headers": [], "method": "GET", "path_template": "/"}
            exchange = exchanges.begin(scope, nothing, nothing, (b"", b""))
            await exchange.send({"type": "http.response.start", "status": status})
            exchanges.end(exchange)
    made = JsonLines(Redaction(), lambda _: []).of_requests(taken).splitlines()

    assert [json.loads(line).get("status") for line in made] == [200, 200, None]
    assert value(registry, COUNT, **labels("GET", "/", 200)) == 2


async def ended(watch: RequestWatch, scope: dict[str, Any], status: int | None = 200) -> None:
    """Tell of a request that ended so."""
    exchanges = Exchanges(watch.ended)
    exchange = exchanges.begin(
        {"type": "http", "headers": [], **scope}, nothing, nothing, (b"", b"")
    )
    exchange.status, exchange.complete = status, status is not None
    exchanges.end(exchange)


def labels(method: str, route: str, status: int) -> dict[str, str]:
    """Return the labels of a request."""
    return {
        "http_request_method": method,
        "http_route": route,
        "http_response_status_code": str(status),
    }


async def test_what_no_route_is_for_shares_one_name(registry: CollectorRegistry) -> None:
    """A scanner's paths are one series."""
    watch = RequestWatch(RequestMetrics(registry), access_log=True)
    with logging_requests() as taken:
        for number in range(3):
            await ended(watch, {"method": "GET", "path": f"/{number}"}, 404)

    assert value(registry, COUNT, **labels("GET", "unmatched", 404)) == 3
    assert [request.message for request in taken] == ["GET unmatched 404"] * 3


async def test_ten_thousand_methods_are_one_series_and_no_memory(
    registry: CollectorRegistry,
) -> None:
    """Clients make methods up; what is known stays known beside them."""
    watch = RequestWatch(RequestMetrics(registry), access_log=True)
    await ended(watch, {"method": "GET", "path_template": "/"})
    await ended(watch, {"method": "X0", "path_template": "/"}, 405)
    before = series(registry)
    with logging_requests() as taken:
        tracemalloc.start()
        try:
            began = tracemalloc.take_snapshot()
            for number in range(1, 10_001):
                await ended(watch, {"method": f"X{number}", "path_template": "/"}, 405)
                assert taken.pop().method == "_OTHER"
            differences = tracemalloc.take_snapshot().compare_to(began, "filename")
        finally:
            tracemalloc.stop()

    assert series(registry) == before
    assert value(registry, COUNT, **labels("_OTHER", "/", 405)) == 10_001
    assert sum(difference.size_diff for difference in differences) < 200_000


async def test_what_is_told_of_a_request_is_what_is_logged(registry: CollectorRegistry) -> None:
    """Also of one that was cut, and of one that announced a size that none can have."""
    watch = RequestWatch(RequestMetrics(registry), access_log=True)
    head = {"method": "POST", "path_template": "/orders"}
    with logging_requests() as taken:
        await ended(watch, {**head, "headers": [(b"content-length", b"12")]}, 201)
        await ended(watch, {**head, "headers": [(b"content-length", b"9" * 40)]}, None)
    whole, cut = taken

    assert (whole.status, whole.received, whole.cut) == (201, 12, False)
    assert (cut.status, cut.received, cut.cut) == (None, None, True)
    assert value(registry, "viralfx_requests_cut_total") == 1


@pytest.mark.parametrize("encoding", [[], [(b"content-encoding", b"gzip")]], ids=["plain", "gzip"])
async def test_how_long_somebody_listened_is_no_duration_of_a_request(
    encoding: list[tuple[bytes, bytes]], registry: CollectorRegistry
) -> None:
    """An event stream is counted by itself; whoever wants to know how long it was has the line."""
    watch = RequestWatch(RequestMetrics(registry), access_log=True)
    exchanges = Exchanges(watch.ended)
    scope = {"type": "http", "headers": [], "method": "GET", "path_template": "/events"}
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), *encoding]
    with logging_requests() as taken:
        exchange = exchanges.begin(scope, nothing, nothing, (b"", b""))
        await exchange.send({"type": "http.response.start", "status": 200, "headers": headers})
        exchange.began -= 3600
        exchanges.end(exchange)

    assert value(registry, COUNT, **labels("GET", "/events", 200)) is None
    assert value(registry, "viralfx_event_streams_total", http_route="/events") == 1
    assert [request.message for request in taken] == ["GET /events 200"]
    assert taken[0].seconds > 3599


@pytest.mark.parametrize("status", [400, 404, 503])
async def test_an_event_stream_that_was_refused_is_a_request_like_any_other(
    status: int, registry: CollectorRegistry
) -> None:
    """Whatever kind its answer says to be of: nobody listens to it, and an error has to count."""
    watch = RequestWatch(RequestMetrics(registry), access_log=False)
    exchanges, sent = Exchanges(watch.ended), list[Any]()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": [], "method": "GET", "path_template": "/events"}
    headers = [(b"content-type", b"text/event-stream")]
    exchange = exchanges.begin(scope, nothing, send, (b"", b""))
    await exchange.send({"type": "http.response.start", "status": status, "headers": headers})
    exchanges.tell()
    body = {"type": "http.response.body", "body": b"data: no\n\n", "more_body": True}
    await exchange.send(body)
    exchanges.end(exchange)

    assert value(registry, COUNT, **labels("GET", "/events", status)) == 1
    assert value(registry, "viralfx_event_streams_total", http_route="/events") is None
    assert sent[1:] == [body]


async def test_who_begins_to_handle_requests_soon_gets_them(registry: CollectorRegistry) -> None:
    """As records; and who stops is not given any for long either."""
    watch = RequestWatch(RequestMetrics(registry), access_log=True)
    handler, access = Seeing(), logging.getLogger("viralfx.access")
    deadline = time.monotonic() + 5
    with logging_requests() as taken:
        await ended(watch, {"method": "GET", "path_template": "/"})
        access.addHandler(handler)
        try:
            while not handler.messages and time.monotonic() < deadline:
                await ended(watch, {"method": "GET", "path_template": "/"})
        finally:
            access.removeHandler(handler)
        before = len(taken)
        while len(taken) == before and time.monotonic() < deadline:
            await ended(watch, {"method": "GET", "path_template": "/"})

    assert handler.messages[0] == "GET / 200"
    assert len(taken) > before > 0
