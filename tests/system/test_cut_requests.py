"""Requests that end early: how logs, metrics and traces attribute them.

Most tests share a process, with or without traces. It has to stop gracefully after them, and the
errors that it has logged are those that they expect.
"""

import json
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.servers.collector import Collector, http_collector
from tests.servers.waiting import wait_until
from tests.system.connections import begun, send
from tests.system.jobs import JOBS
from tests.system.service import Service, running

APP = ("--app", "tests.system.cut_app:app")
ENDED = "http_server_request_duration_seconds_count"


def lines(service: Service) -> list[dict[str, Any]]:
    """Return the lines logged so far."""
    return [json.loads(line) for line in list(service.output)]


def access(service: Service, route: str) -> dict[str, Any]:
    """Wait for the line of a request and return it."""

    def found() -> list[dict[str, Any]]:
        return [line for line in lines(service) if line.get("route") == route]

    (line,) = wait_until(found, what=lambda: f"a line of {route}; {service.output}")
    return line


def errors(service: Service) -> list[dict[str, Any]]:
    """Return the lines of errors of a process that has ended."""
    service.logged("")  # wait until the output is read to its end
    return [line for line in lines(service) if line["level"] == "error"]


def counted(metrics: str, route: str, status: int) -> bool:
    """Return whether the metrics count one request of a route with a status."""
    labels = f'http_response_status_code="{status}",http_route="{route}"'
    return re.search(rf"\n{ENDED}{{[^}}]*{labels}}} 1.0\n", metrics) is not None


def stop(service: Service) -> list[dict[str, Any]]:
    """Stop the service gracefully and return the errors that it logged."""
    service.signal(signal.SIGTERM)
    assert service.exit_code() == 0
    assert service.errors == []
    return errors(service)


@dataclass(frozen=True)
class Shared:
    """A process that several tests ask."""

    service: Service
    expected: list[dict[str, Any]] = field(default_factory=list)
    """The errors that the tests have seen and expect."""

    def failure(self, path: str) -> dict[str, Any]:
        """Wait for the error of a request and return it."""

        def found() -> list[dict[str, Any]]:
            return [
                line
                for line in lines(self.service)
                if line["level"] == "error" and line["path"] == path
            ]

        (line,) = wait_until(found, what=lambda: f"an error of {path}; {self.service.output}")
        self.expected.append(line)
        return line

    def cut_requests(self) -> float:
        """Return the number of requests that the metrics count as cut."""
        metrics = self.service.get("/metrics").body.decode()
        return float(metrics.partition("\nviralfx_requests_cut_total ")[2].partition("\n")[0])


def shared(environment: dict[str, str]) -> Iterator[Shared]:
    """Run the process of several tests, and see its end."""
    with running(*APP, environment=environment) as service:
        process = Shared(service.wait_ready())
        yield process
        assert stop(service) == process.expected


@pytest.fixture(scope="module")
def process() -> Iterator[Shared]:
    """Return a process without traces."""
    yield from shared({})


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    """Return the collector of the traced process."""
    with http_collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def traced(collector: Collector) -> Iterator[Shared]:
    """Return a process that exports spans every 100 ms."""
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
    yield from shared({**endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"})


@pytest.mark.parametrize("route", ["/upload", "/upload/typed", "/upload/group", JOBS])
def test_a_client_disconnect_during_upload_is_no_failure(
    traced: Shared, collector: Collector, route: str
) -> None:
    """The log, the metrics and the trace show no failure."""
    head = (
        f"POST {route} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        "Content-Length: 100\r\n\r\nabc"
    )
    before = traced.cut_requests()
    send(traced.service, head.encode()).close()
    line = access(traced.service, route)
    cut = traced.cut_requests() - before
    metrics = traced.service.get("/metrics").body.decode()
    (span,) = collector.wait_for(f"POST {route}")

    assert (line["message"], line["cut"]) == (f"POST {route} without a response", True)
    assert "status" not in line
    assert (line["requestSize"], line["responseSize"]) == (100, 0)
    assert f'http_route="{route}"' not in metrics
    assert cut == 1
    assert not span.failed
    assert "http.response.status_code" not in span.attributes


def test_a_stream_cut_by_the_stop_is_no_error() -> None:
    """The stop cuts a stream without end, and logs no error."""
    with running(*APP, environment={"SHUTDOWN_DRAIN_TIMEOUT": "500"}) as service:
        service.wait_ready()
        connection = begun(service, b"GET /stream/endless HTTP/1.1\r\nHost: test\r\n\r\n")
        logged_errors = stop(service)
        connection.close()
        line = access(service, "/stream/endless")

    assert logged_errors == []
    assert (line["status"], line["cut"]) == (200, True)


def test_a_client_disconnect_cuts_its_stream(process: Shared) -> None:
    """The server notices the disconnect of a streaming response."""
    begun(process.service, b"GET /stream/endless HTTP/1.1\r\nHost: test\r\n\r\n").close()
    line = access(process.service, "/stream/endless")

    assert (line["status"], line["cut"]) == (200, True)


def test_a_failing_stream_is_cut_and_logs_one_error(traced: Shared, collector: Collector) -> None:
    """The error holds the ids of the request and the original exception."""
    head = b"GET /stream/fails HTTP/1.1\r\nHost: test\r\nX-Correlation-ID: order-1\r\n\r\n"
    connection, received = send(traced.service, head), b""
    while chunk := connection.recv(65536):
        received += chunk
    connection.close()
    line = access(traced.service, "/stream/fails")
    error = traced.failure("/stream/fails")
    (span,) = collector.wait_for("GET /stream/fails")

    assert not received.endswith(b"0\r\n\r\n"), "the client sees a truncated body"
    assert (line["status"], line["cut"]) == (200, True)
    assert (error["message"], error["context"]) == ("Request failed", "web")
    assert error["method"] == "GET"
    assert (error["correlationId"], error["traceId"]) == ("order-1", line["traceId"])
    assert (error["exception"][0]["exc_type"], error["exception"][0]["exc_value"]) == (
        "RuntimeError",
        "planted",
    )
    assert (span.failed, span.attributes["error.type"]) == (True, "RuntimeError")
    assert [event["exception.type"] for _, event in span.events] == ["RuntimeError"]


def test_a_failure_after_the_response_cuts_nothing(process: Shared) -> None:
    """The failure is logged, and the client receives the whole response."""
    assert process.service.get("/after/fails").body == b"answered"
    line = access(process.service, "/after/fails")
    error = process.failure("/after/fails")

    assert line["status"] == 200
    assert "cut" not in line
    assert error["message"] == "Request failed"
    assert error["exception"][0]["exc_value"] == "planted"


def test_a_failing_error_handler_is_a_500(process: Shared) -> None:
    """If the error response itself fails, log and metrics show the 500 that the client got."""
    assert process.service.get("/handler/fails").status == 500
    line = access(process.service, "/handler/fails")
    metrics = process.service.get("/metrics").body.decode()
    error = process.failure("/handler/fails")

    assert line["message"] == "GET /handler/fails 500"
    assert "cut" not in line
    assert counted(metrics, "/handler/fails", 500)
    assert error["message"] == "Request failed"
    assert error["exception"][0]["exc_value"] == "planted"


def test_a_mounted_application_is_one_route(traced: Shared, collector: Collector) -> None:
    """All paths below a mount share its route, apart from unknown paths."""
    assert b"mounted" in traced.service.get("/mounted/anything/else").body
    line = access(traced.service, "/mounted")
    (span,) = collector.wait_for("GET /mounted")
    metrics = traced.service.get("/metrics").body.decode()

    assert line["message"] == "GET /mounted 200"
    assert span.attributes["http.route"] == "/mounted"
    assert counted(metrics, "/mounted", 200)


def runs(service: Service) -> bool:
    """Return whether a handler of another request runs."""
    return b"http_server_active_requests 1.0" in service.get("/metrics").body


@pytest.mark.each_python
@pytest.mark.parametrize(
    ("route", "expected"), [("/waits", []), ("/waits/cancelled", ["cancelled"])]
)
def test_a_client_disconnect_cuts_a_running_handler(
    process: Shared, route: str, expected: list[str]
) -> None:
    """The server notices at once; it cancels only handlers that ask for cancellation."""
    service, before = process.service, process.cut_requests()
    left, began = int(service.get("/left").body), len(service.output)
    connection = send(service, f"GET {route} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
    wait_until(lambda: runs(service), what="the handler runs")
    connection.close()
    wait_until(lambda: int(service.get("/left").body) == left + 1, what="the server has noticed")
    service.get("/release")
    line = access(service, route)
    cut = process.cut_requests() - before
    later = lines(service)[began:]
    seen = [each["message"] for each in later if each["context"] == "cut_app"]

    assert (line["message"], line["cut"]) == (f"GET {route} without a response", True)
    assert "status" not in line
    assert cut == 1
    assert seen == expected


def test_a_handler_receives_the_disconnect(process: Shared) -> None:
    """``receive`` returns ``http.disconnect`` once the client has left."""
    connection = send(process.service, b"GET /listens HTTP/1.1\r\nHost: test\r\n\r\n")
    wait_until(lambda: runs(process.service), what="the handler runs")
    connection.close()
    line = access(process.service, "/listens")

    assert line["cut"] is True
