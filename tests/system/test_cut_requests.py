"""Requests that did not end as they should: whose doing it was, and who is told."""

import json
import re
import signal
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
    """Return what was logged so far."""
    return [json.loads(line) for line in list(service.output)]


def access(service: Service, route: str) -> dict[str, Any]:
    """Wait for the line of a request and return it."""

    def look() -> list[dict[str, Any]]:
        return [line for line in lines(service) if line.get("route") == route]

    (line,) = wait_until(look, what=lambda: f"a line of {route}; {service.output}")
    return line


def errors(service: Service) -> list[dict[str, Any]]:
    """Return the lines of errors of a process that has ended."""
    service.logged("")  # all of it is read
    return [line for line in lines(service) if line["level"] == "error"]


def counted(metrics: str, route: str, status: int) -> bool:
    """Tell whether a request was counted so."""
    labels = f'http_response_status_code="{status}",http_route="{route}"'
    return re.search(rf"\n{ENDED}{{[^}}]*{labels}}} 1.0\n", metrics) is not None


def stop(service: Service) -> list[dict[str, Any]]:
    """Stop it in order, and return the errors that it told of."""
    service.signal(signal.SIGTERM)
    assert service.exit_code() == 0
    assert service.errors == []
    return errors(service)


def sending(collector: Collector) -> dict[str, str]:
    """Return the variables of a process that sends its traces soon."""
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}


@pytest.mark.parametrize("route", ["/upload", "/upload/typed", "/upload/group", JOBS])
def test_a_client_that_leaves_during_its_upload_is_nobodys_failure(route: str) -> None:
    """Neither in the log nor among the answers that are counted, nor in the trace."""
    head = f"POST {route} HTTP/1.1\r\nHost: test\r\nContent-Length: 100\r\n\r\nabc"
    with http_collector() as collector, running(*APP, environment=sending(collector)) as service:
        service.wait_ready()
        send(service, head.encode()).close()
        line = access(service, route)
        metrics = service.get("/metrics").body.decode()
        (span,) = collector.wait_for(f"POST {route}")
        told = stop(service)

    assert (line["message"], line["cut"]) == (f"POST {route} without an answer", True)
    assert "status" not in line
    assert (line["requestSize"], line["responseSize"]) == (100, 0)
    assert told == []
    assert f'http_route="{route}"' not in metrics
    assert "\nviralfx_requests_cut_total 1.0\n" in metrics
    assert not span.failed
    assert "http.response.status_code" not in span.attributes


def test_what_the_stop_cuts_is_no_error() -> None:
    """A stream without end has a client until then."""
    with running(*APP, environment={"SHUTDOWN_DRAIN_TIMEOUT": "500"}) as service:
        service.wait_ready()
        connection = begun(service, b"GET /stream/endless HTTP/1.1\r\nHost: test\r\n\r\n")
        told = stop(service)
        connection.close()
        line = access(service, "/stream/endless")

    assert told == []
    assert (line["status"], line["cut"]) == (200, True)


def test_a_stream_whose_client_leaves_is_cut() -> None:
    """It is noticed, as the server is asked for it."""
    with running(*APP) as service:
        service.wait_ready()
        begun(service, b"GET /stream/endless HTTP/1.1\r\nHost: test\r\n\r\n").close()
        line = access(service, "/stream/endless")
        told = stop(service)

    assert told == []
    assert (line["status"], line["cut"]) == (200, True)


def test_a_stream_that_fails_is_one_error_and_cut() -> None:
    """With the ids of the request, and with what was raised instead of what was made of it."""
    head = b"GET /stream/fails HTTP/1.1\r\nHost: test\r\nX-Correlation-ID: order-1\r\n\r\n"
    with http_collector() as collector, running(*APP, environment=sending(collector)) as service:
        service.wait_ready()
        connection, received = send(service, head), b""
        while chunk := connection.recv(65536):
            received += chunk
        connection.close()
        line = access(service, "/stream/fails")
        (span,) = collector.wait_for("GET /stream/fails")
        (told,) = stop(service)

    assert not received.endswith(b"0\r\n\r\n"), "the client can tell"
    assert (line["status"], line["cut"]) == (200, True)
    assert (told["message"], told["context"]) == ("Request failed", "web")
    assert (told["method"], told["path"]) == ("GET", "/stream/fails")
    assert (told["correlationId"], told["traceId"]) == ("order-1", line["traceId"])
    assert (told["exception"][0]["exc_type"], told["exception"][0]["exc_value"]) == (
        "RuntimeError",
        "planted",
    )
    assert (span.failed, span.attributes["error.type"]) == (True, "RuntimeError")
    assert [event["exception.type"] for _, event in span.events] == ["RuntimeError"]


def test_what_fails_after_the_answer_cuts_nothing() -> None:
    """It is told of like any other failure, and the client has everything."""
    with running(*APP) as service:
        service.wait_ready()
        assert service.get("/after/fails").body == b"answered"
        line = access(service, "/after/fails")
        (told,) = stop(service)

    assert line["status"] == 200
    assert "cut" not in line
    assert told["message"] == "Request failed"
    assert told["exception"][0]["exc_value"] == "planted"


def test_a_failure_that_the_server_answers_for_is_a_500() -> None:
    """As where the answer to an error fails; it is counted as what the client got."""
    with running(*APP) as service:
        service.wait_ready()
        assert service.get("/handler/fails").status == 500
        line = access(service, "/handler/fails")
        metrics = service.get("/metrics").body.decode()
        (told,) = stop(service)

    assert line["message"] == "GET /handler/fails 500"
    assert "cut" not in line
    assert counted(metrics, "/handler/fails", 500)
    assert told["message"] == "Request failed"
    assert told["exception"][0]["exc_value"] == "planted"


def test_what_is_mounted_is_called_by_its_path() -> None:
    """Whatever is below it, and apart from what nothing is for."""
    with http_collector() as collector, running(*APP, environment=sending(collector)) as service:
        service.wait_ready()
        assert b"mounted" in service.get("/mounted/anything/else").body
        line = access(service, "/mounted")
        (span,) = collector.wait_for("GET /mounted")
        metrics = service.get("/metrics").body.decode()

    assert line["message"] == "GET /mounted 200"
    assert span.attributes["http.route"] == "/mounted"
    assert counted(metrics, "/mounted", 200)
