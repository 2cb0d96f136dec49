"""Every endpoint under ``viralfx serve``, field by field as in docs/operations.md."""

import re
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
from tests.servers.waiting import wait_until
from tests.system.service import READY_WITHIN, Service, request, running

TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
TOKEN = {"Authorization": "Bearer planted"}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """Run one service for the tests that only read."""
    with running(environment={"MANAGEMENT_TOKEN": "planted"}) as running_service:
        yield running_service.wait_ready()


def test_basic(service: Service) -> None:
    """GET /health has the four fields of docs/operations.md."""
    body = service.get("/health").json()

    assert body.keys() == {"status", "timestamp", "uptime", "environment"}
    assert (body["status"], body["environment"]) == ("ok", "development")
    assert TIMESTAMP.fullmatch(body["timestamp"])
    assert isinstance(body["uptime"], float)


def test_live(service: Service) -> None:
    """GET /health/live has the three fields of docs/operations.md, and its uptime grows."""
    first = service.get("/health/live").json()
    later = wait_until(
        lambda: service.get("/health/live").json()["uptime"] > first["uptime"],
        what="growth",
    )

    assert first.keys() == {"alive", "uptime", "timestamp"}
    assert first["alive"] is True
    assert TIMESTAMP.fullmatch(first["timestamp"])
    assert later


def test_ready(service: Service) -> None:
    """GET /health/ready has exactly the fields of docs/operations.md."""
    reply = service.get("/health/ready")

    assert reply.json() == {"ready": True, "checks": {"database": True, "redis": True}}


def test_startup(service: Service) -> None:
    """GET /health/startup is 200 once the gates have passed."""
    reply = service.get("/health/startup")

    assert (reply.status, reply.json()["started"]) == (200, True)


@pytest.mark.each_python
def test_detailed(service: Service) -> None:
    """GET /health/detailed has every field of docs/operations.md, with its type."""
    body = service.get("/health/detailed").json()
    checks = body["checks"]
    database, redis, memory, queues = (
        checks[name] for name in ("database", "redis", "memory", "queues")
    )

    assert list(body) == [
        "status",
        "timestamp",
        "uptime",
        "version",
        "environment",
        "checks",
        "metrics",
    ]
    assert body["status"] == "healthy"
    for check in checks.values():
        assert check["status"] == "pass"
        assert isinstance(check["message"], str)
        assert isinstance(check["responseTime"], int)
    assert database["details"]["isConnected"] is True
    assert types(database["details"]["stats"]) == {
        "totalConnections": int,
        "activeConnections": int,
        "idleConnections": int,
        "waitingRequests": int,
        "failedConnections": int,
        "slowQueries": int,
        "lastHealthCheck": str,
    }
    assert types(database["details"]["poolConfig"]) == {"min": int, "max": int, "timeout": int}
    assert isinstance(database["details"]["responseTime"], int)
    assert redis["details"]["isConnected"] is True
    assert types(redis["details"]["stats"]) == {
        "isConnected": bool,
        "lastHealthCheck": str,
        "failedAttempts": int,
        "totalRequests": int,
        "successfulRequests": int,
        "failedRequests": int,
    }
    assert redis["details"]["config"] == {"host": "memory", "port": 0, "db": 0}
    for name in ("heapUsed", "heapTotal", "rss", "external"):
        assert re.fullmatch(r"\d+MB", memory["details"][name])
    assert re.fullmatch(r"\d+\.\d\d%", memory["details"]["usagePercent"])
    assert [queue["name"] for queue in queues["details"]] == [
        "default",
        "notifications",
        "analytics",
    ]
    for queue in queues["details"]:
        assert queue["status"] == "ok"
        assert types(queue["metrics"]) == {
            "waiting": int,
            "active": int,
            "completed": int,
            "failed": int,
            "scheduled": int,
            "cancelled": int,
            "oldestDue": float,
            "consumers": int,
        }
    assert types(body["metrics"]["memoryUsage"]) == {
        "rss": int,
        "heapTotal": int,
        "heapUsed": int,
        "external": int,
    }
    assert isinstance(body["metrics"]["responseTime"], int)
    assert isinstance(body["metrics"]["cpuUsage"], int | float)


def types(body: dict[str, object]) -> dict[str, type]:
    """Return the type of each field."""
    return {name: type(value) for name, value in body.items()}


@pytest.mark.parametrize("name", ["database", "redis", "memory", "queues"])
def test_one_check(service: Service, name: str) -> None:
    """GET /health/{check} is one check with its history."""
    body = service.get(f"/health/{name}").json()

    assert (name, "pass") == (body["name"], body["status"])
    assert body["history"][0]["new"] == "pass"


PROBES = ["/health", "/health/live", "/health/ready", "/health/startup", "/health/detailed"]


@pytest.mark.parametrize("path", [*PROBES, "/health/memory"])
def test_head(service: Service, path: str) -> None:
    """HEAD gives the headers of GET and no body."""
    head, get = service.get(path, method="HEAD"), service.get(path)

    assert (head.status, head.body) == (200, b"")
    assert head.headers.keys() == get.headers.keys()
    assert head.headers["content-type"] == "application/json"


@pytest.mark.parametrize("path", [*PROBES, "/health/memory"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_wrong_method(service: Service, path: str, method: str) -> None:
    """Another method is a 405 problem with Allow."""
    reply = service.get(path, method=method)

    assert (reply.status, reply.headers["allow"]) == (405, "GET, HEAD")
    assert_problem(reply.headers, reply.json(), 405)


@pytest.mark.parametrize("path", ["/health/nothing", "/health/", "/health/live/", "/nothing"])
def test_unknown(service: Service, path: str) -> None:
    """An unknown check, a trailing slash and an unknown path are 404 problems, never a redirect."""
    reply = service.get(path)

    assert_problem(reply.headers, reply.json(), 404)
    assert reply.status == 404


def assert_problem(headers: Mapping[str, str], body: dict[str, object], status: int) -> None:
    """Assert the shape of RFC 9457."""
    assert headers["content-type"] == "application/problem+json"
    assert body["status"] == status
    assert isinstance(body["title"], str)
    assert body["correlationId"] == headers["x-correlation-id"]


@pytest.mark.parametrize("path", PROBES)
def test_probe_headers(service: Service, path: str) -> None:
    """Probe responses are not cacheable and carry a correlation id."""
    headers = service.get(path).headers

    assert headers["cache-control"] == "no-store"
    assert re.fullmatch("[0-9a-f]{32}", headers["x-correlation-id"])


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic planted"}]
)
def test_shutdown_without_the_right_token(
    service: Service, method: str, headers: dict[str, str]
) -> None:
    """A missing or wrong token is 401 with a challenge, and nothing is triggered."""
    reply = service.get("/health/shutdown", method=method, headers=headers)

    assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert service.get("/health/ready").status == 200


def test_shutdown_is_never_triggered_by_reading(service: Service) -> None:
    """GET with the token shows that no shutdown is under way; PUT is 405."""
    reply = service.get("/health/shutdown", headers=TOKEN)
    wrong = service.get("/health/shutdown", method="PUT", headers=TOKEN)

    assert (reply.status, reply.json()["reason"]) == (200, None)
    assert (wrong.status, wrong.headers["allow"]) == (405, "GET, HEAD, POST")


def test_without_a_token_the_shutdown_is_forbidden() -> None:
    """Without MANAGEMENT_TOKEN the shutdown endpoints answer every request with 403."""
    with running() as service:
        service.wait_ready()
        replies = [
            service.get("/health/shutdown", method=method, headers=headers)
            for method in ("GET", "POST")
            for headers in ({}, TOKEN)
        ]

        assert [reply.status for reply in replies] == [403] * 4


def test_details_can_require_authorization() -> None:
    """HEALTH_DETAILS=authorized guards details and single checks, never the probes."""
    environment = {"HEALTH_DETAILS": "authorized", "MANAGEMENT_TOKEN": "planted"}
    with running(environment=environment) as service:
        service.wait_ready()
        refused = [service.get(path).status for path in ("/health/detailed", "/health/memory")]
        allowed = [
            service.get(path, headers=TOKEN).status
            for path in ("/health/detailed", "/health/memory")
        ]
        probes = [service.get(path).status for path in PROBES[:-1]]

        assert (refused, allowed, probes) == ([401, 401], [200, 200], [200] * 4)


def test_a_valid_correlation_id_is_echoed(service: Service) -> None:
    """A valid X-Correlation-ID comes back; an invalid one is skipped for a valid X-Request-ID."""
    own = service.get("/health/live", headers={"X-Correlation-ID": "abc-123_D.ef"})
    second = service.get(
        "/nothing", headers={"X-Correlation-ID": "no spaces", "X-Request-ID": "request-1"}
    )
    trace = service.get("/health", headers={"traceparent": f"00-{'a1' * 16}-{'b2' * 8}-01"})

    assert own.headers["x-correlation-id"] == "abc-123_D.ef"
    assert second.headers["x-correlation-id"] == second.json()["correlationId"] == "request-1"
    assert trace.headers["x-correlation-id"] == "a1" * 16


@pytest.mark.parametrize(
    "hostile", [b"a\tb", b"x" * 10_000, "ä".encode(), b"\xff\xfe", b"${jndi:ldap://x}", b"a,b"]
)
def test_a_hostile_correlation_id_is_replaced(service: Service, hostile: bytes) -> None:
    """It is neither echoed nor logged."""
    lines_before = len(service.output)
    raw = b"X-Correlation-ID: " + hostile + b"\r\n"
    reply = request(service.port, "/nothing", raw_headers=raw)

    assert re.fullmatch("[0-9a-f]{32}", reply.headers["x-correlation-id"])
    text = hostile.decode("latin-1")
    assert not any(text in line for line in service.output[lines_before:])


def test_a_split_header_cannot_add_headers(service: Service) -> None:
    """A bare line feed in a header is refused by the parser or replaced, never echoed."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(
            b"GET /health/live HTTP/1.1\r\nHost: t\r\nConnection: close\r\n"
            b"X-Correlation-ID: a\x0bInjected: yes\r\n\r\n"
        )
        reply = connection.recv(65536)

    assert b"njected" not in reply.split(b"\r\n\r\n")[0]


def test_the_routes_are_documented(service: Service) -> None:
    """OpenAPI names every row of the contract, and the documentation page exists."""
    paths = service.get("/api/docs/openapi.json").json()["paths"]

    assert paths.keys() == {
        "/health",
        "/health/live",
        "/health/ready",
        "/health/startup",
        "/health/detailed",
        "/health/shutdown",
        "/health/info",
        "/health/tasks",
        "/health/loggers",
        "/health/loggers/{name}",
        "/health/{check}",
        "/api/v1/jobs",
        "/api/v1/jobs/{job_id}",
        "/api/v1/jobs/{job_id}/retry",
        "/api/v1/jobs/{job_id}/events",
        "/api/v1/jobs/{job_id}/cancel",
        "/api/v1/jobs/{job_id}/run",
        "/api/v1/jobs/batch",
        "/api/v1/jobs/retry",
        "/api/v1/jobs/cancel",
        "/api/v1/queues",
        "/api/v1/queues/{queue}/pause",
        "/api/v1/queues/{queue}/resume",
        "/api/v1/schedules",
        "/api/v1/schedules/{task}/pause",
        "/api/v1/schedules/{task}/resume",
        "/api/v1/schedules/{task}/run",
    }
    assert paths["/health/shutdown"].keys() == {"get", "post"}
    assert paths["/health/ready"]["get"]["responses"].keys() == {"200", "503"}
    assert service.get("/api/docs").headers["content-type"].startswith("text/html")


@pytest.mark.each_python
@pytest.mark.parametrize(
    ("behaviour", "code"), [("hang", "timeout"), ("swallow", "timeout"), ("raise", "error")]
)
def test_a_bad_check_fails_and_stops_nothing(behaviour: str, code: str) -> None:
    """Probes respond, the check fails in time, and at most one attempt is outstanding."""
    with bad_check(behaviour) as service:
        wait_until(lambda: service.status("/health/live") == 200, seconds=READY_WITHIN, what="live")
        wait_until(
            lambda: service.get("/health/planted").json()["error"]["code"] == code,
            what="the check fails",
        )
        service.wait_ready()
        for _ in range(50):
            for path in ("/health/live", "/health/ready"):
                assert service.status(path) == 200
        body = service.get("/health/planted")
        detailed = service.get("/health/detailed")
        counts = service.get("/attempts").json()

    assert body.status == 503
    assert body.json()["status"] == "fail"
    assert b"secret" not in body.body
    assert (detailed.status, detailed.json()["status"]) == (200, "degraded")
    assert counts["mostOutstanding"] == 1
    if behaviour == "raise":
        assert body.json()["error"]["correlationId"]
        logged = [
            line for line in service.logged("Health check changed") if line["check"] == "planted"
        ]
        assert len(logged) == 1
        assert "planted secret" in str(logged[0]["exception"])


@contextmanager
def bad_check(behaviour: str, *, passes: int = 0, timeout: int = 300) -> Iterator[Service]:
    """Run the service with a check that misbehaves after some passes; ``timeout`` is in ms."""
    environment = {
        "PLANTED_CHECK": behaviour,
        "PLANTED_PASSES": str(passes),
        "HEALTH_CHECK_TIMEOUT": str(timeout),
        "HEALTH_CHECK_INTERVAL": "200",
    }
    with running("--app", "tests.system.apps:planted", environment=environment) as service:
        yield service


@pytest.mark.parametrize("behaviour", ["hang", "swallow"])
def test_a_bad_check_slows_no_probe(behaviour: str) -> None:
    """All probes are answered before the second attempt of the check ends."""
    with bad_check(behaviour, passes=1, timeout=60_000) as service:
        service.wait_ready()
        wait_until(lambda: service.get("/attempts").json()["attempts"] == 2, what="it hangs")
        for _ in range(50):
            for path in ("/health/live", "/health/ready"):
                assert service.get(path).status == 200
        counts = service.get("/attempts").json()

    assert (counts["attempts"], counts["outstanding"]) == (2, 1)


def test_a_broken_application_breaks_no_probe() -> None:
    """Probes stay correct with middleware that fails every request, and 50 hanging requests."""
    with running("--app", "tests.system.apps:broken") as service:
        service.wait_ready()
        hanging = [
            socket.create_connection(("127.0.0.1", service.port), timeout=10) for _ in range(50)
        ]
        for connection in hanging:
            connection.sendall(b"GET /hang HTTP/1.1\r\nHost: test\r\n\r\n")
        statuses = [service.get(path).status for path in ("/work", *PROBES)]
        for connection in hanging:
            connection.close()

        assert [500, *[200] * 5] == statuses


def test_a_critical_check_makes_it_unhealthy_and_a_gate_not_ready() -> None:
    """HEALTH_CRITICAL and READINESS_REQUIRES take an application's own check by name."""
    environment = {
        "PLANTED_CHECK": "raise",
        "HEALTH_CRITICAL": "planted",
        "READINESS_REQUIRES": "database,planted",
    }
    with running("--app", "tests.system.apps:planted", environment=environment) as service:
        wait_until(lambda: service.status("/health/planted") == 503, what="the check fails")
        ready, detailed = service.get("/health/ready"), service.get("/health/detailed")
        startup = service.get("/health/startup")

        assert (ready.status, ready.json()["reason"]) == (503, "starting")
        assert ready.json()["checks"] == {"database": True, "redis": True, "planted": False}
        assert (detailed.status, detailed.json()["status"]) == (503, "unhealthy")
        assert (startup.status, startup.json()["pending"]) == (503, ["planted"])
        assert int(ready.headers["retry-after"]) >= 1
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0


def test_probes_cause_no_checks() -> None:
    """A thousand probes in a row cause no attempt; ?fresh=1 causes one round."""
    environment = {"HEALTH_CHECK_INTERVAL": "600000"}
    with running("--app", "tests.system.apps:planted", environment=environment) as service:
        service.wait_ready()
        before = service.get("/attempts").json()["attempts"]
        for _ in range(250):
            for path in ("/health/live", "/health/ready", "/health/detailed", "/health/planted"):
                assert service.get(path).status == 200
        after = service.get("/attempts").json()["attempts"]
        began = time.monotonic()
        for _ in range(20):
            assert service.get("/health/detailed?fresh=1").status == 200
        more = int(time.monotonic() - began)  # a second after a round there may be another
        fresh = service.get("/attempts").json()["attempts"]

        assert (before, after) == (1, 1)
        assert 2 <= fresh <= 2 + more
