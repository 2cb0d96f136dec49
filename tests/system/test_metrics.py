"""Tests of a running service's metrics, scraped as Prometheus does."""

import re
from collections.abc import Mapping

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from tests import forked
from tests.servers.postgres import postgres_server
from tests.servers.redis import RedisServer
from tests.servers.waiting import wait_until
from tests.system.service import Reply, Service, request, running

OPENMETRICS = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}
REQUESTS = "http_server_request_duration_seconds_count"

Key = tuple[str, frozenset[tuple[str, str]]]


def samples(reply: Reply) -> dict[Key, float]:
    """Return the values of all series in a response."""
    assert reply.status == 200
    body, newer = reply.body.decode(), "openmetrics" in reply.headers["content-type"]
    parse = openmetrics.text_string_to_metric_families if newer else text_string_to_metric_families
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse(body)  # type: ignore[no-untyped-call,unused-ignore]
        for sample in family.samples
    }


def scrape(service: Service, headers: Mapping[str, str] | None = None) -> dict[Key, float]:
    """Scrape the API port."""
    return samples(service.get("/metrics", headers=headers))


def requests_by(seen: Mapping[Key, float]) -> dict[tuple[str, str, str], float]:
    """Return the counts of requests by method, route and status."""
    return {
        (
            labels["http_request_method"],
            labels["http_route"],
            labels["http_response_status_code"],
        ): count
        for (name, pairs), count in seen.items()
        if name == REQUESTS and (labels := dict(pairs))
    }


@pytest.mark.each_python
def test_counts_match_the_sent_requests() -> None:
    """Both formats count by method, route and status; probes and scrapes are excluded."""
    with running() as service:
        service.wait_ready()
        first = samples(service.get("/metrics"))
        for number in range(5):
            assert service.get(f"/api/v1/jobs/{number}").status in {400, 404}
        for _ in range(3):
            assert service.get("/api/v1/jobs").status == 200
        for number in range(4):
            assert service.get(f"/nothing/{number}").status == 404
        for method in ("PROPFIND", "MKCOL", "SEARCH", "REPORT", "PURGE", "LOCK"):
            assert service.get("/api/v1/jobs", method=method).status == 405
        for path in ("/health", "/health/live", "/health/ready", "/health/detailed"):
            service.get(path)
        old, new = requests_by(scrape(service)), requests_by(scrape(service, OPENMETRICS))

    assert requests_by(first) == {}
    assert old == new
    assert sum(old.values()) == 18
    assert old["GET", "/api/v1/jobs", "200"] == 3
    assert old["GET", "unmatched", "404"] == 4
    assert sum(count for (_, route, _), count in old.items() if "{" in route) == 5
    assert sum(count for (method, _, _), count in old.items() if method == "_OTHER") == 6


def test_clients_cannot_create_series() -> None:
    """Two thousand invented paths and ids leave the number of series unchanged."""
    with running() as service:
        service.wait_ready()
        made_up(service, 0)
        before = len(scrape(service))
        for number in range(1, 2_000):
            made_up(service, number)
        after = scrape(service)

    assert len(after) == before
    assert requests_by(after)["GET", "unmatched", "404"] == 2_000


def made_up(service: Service, number: int) -> None:
    """Send a request with unique path, method and headers."""
    headers = {"X-Correlation-ID": f"id-{number}", "User-Agent": f"agent/{number}"}
    assert service.get(f"/nothing/{number}?q={number}", headers=headers).status == 404


def test_a_job_is_counted_from_its_acceptance_to_its_end() -> None:
    """With memory adapters the service runs the job itself."""
    task = {"queue": "analytics", "task": "analytics.rollup_health"}
    accepted: Key = ("viralfx_jobs_accepted_total", frozenset(task.items()))
    ended: Key = (
        "viralfx_job_executions_total",
        frozenset({**task, "outcome": "completed"}.items()),
    )
    with running() as service:
        service.wait_ready()
        for _ in range(3):
            reply = service.get(f"/api/v1/schedules/{task['task']}/run", method="POST")
            assert reply.status == 202, reply.body
        wait_until(lambda: scrape(service).get(ended, 0) >= 3, what="three executions")
        seen = scrape(service)

    assert seen[accepted] >= 3
    assert seen["viralfx_job_wait_seconds_count", frozenset(task.items())] >= 3


def test_both_ports_serve_metrics_and_require_the_token() -> None:
    """Without the token the status is 401, with it 200."""
    environment = {"MANAGEMENT_TOKEN": "planted", "HEALTH_DETAILS": "authorized"}
    token = {"Authorization": "Bearer planted"}
    with running(management=True, environment=environment) as service:
        service.wait_ready()
        assert service.management_port is not None
        for port in (service.port, service.management_port):
            refused = request(port, "/metrics")
            wrong = request(port, "/metrics", headers={"Authorization": "Bearer other"})
            allowed = request(port, "/metrics", headers=token)
            head = request(port, "/metrics", method="HEAD", headers=token)

            assert (refused.status, wrong.status) == (401, 401)
            assert refused.headers["www-authenticate"] == "Bearer"
            assert ("viralfx_ready", frozenset()) in samples(allowed)
            assert (head.status, head.body) == (200, b"")
            assert request(port, "/metrics", method="POST", headers=token).status == 405


_STATEMENT = r"^\[viralfx.*\] LOG: .*(?:\n\t.*)*"
"""A statement in the log of Postgres, which indents its further lines by a tab."""


def test_a_scrape_queries_neither_postgres_nor_redis(own_redis: RedisServer) -> None:
    """A hundred scrapes cause no statement and no command, counted at the servers."""
    settings = {"log_statement": "all", "log_line_prefix": "[%a] "}
    with postgres_server(settings=settings) as postgres:
        environment = {
            "DATABASE_URL": postgres.url(),
            "REDIS_HOST": own_redis.host,
            "REDIS_PORT": str(own_redis.port),
            # The second attempt of a check is at a random moment of its interval.
            "HEALTH_CHECK_INTERVAL": "3600000",
            "DB_HEALTH_CHECK_INTERVAL": "3600000",
        }
        assert forked.viralfx("migrate", environ=environment).returncode == 0

        def statements() -> list[str]:
            return re.findall(_STATEMENT, postgres.log(), re.MULTILINE)

        def calls() -> int:
            stats = own_redis.command("INFO", "commandstats")
            return sum(int(command["calls"]) for command in stats.values())

        with running(environment=environment) as service:
            service.wait_ready()
            settled(service)
            known, before, after_nothing = len(statements()), calls(), calls()
            for _ in range(100):
                scrape(service)
            after, new, seen = calls(), statements()[known:], scrape(service)

    # Reading the counters also costs commands.
    assert after - after_nothing == after_nothing - before
    # The fleet gets a report every few seconds, with scrapes or without. Before it, the pool may
    # test a connection that was idle for long, and the first one of a connection asks for types.
    reports = [each for each in new if "viralfx_instances" in each]
    preparing = [each for each in new if each.endswith(" SELECT 1") or "typeinfo_tree" in each]
    assert [each for each in new if each not in (*reports, *preparing)] == []
    assert len(preparing) <= 2 * len(reports)
    assert seen["viralfx_redis_connected", frozenset()] == 1
    assert seen["viralfx_database_pool_connections", frozenset({("state", "idle")})] == 2


def settled(service: Service) -> None:
    """Wait until the pool and every check are ready."""

    def there() -> bool:
        seen = scrape(service)
        connections = seen["viralfx_database_pool_connections", frozenset({("state", "idle")})]
        checks = [v for (name, _), v in seen.items() if name == "viralfx_check_age_seconds"]
        return connections == 2 and len(checks) == 5

    wait_until(there, what="the pool and the checks")


def test_the_redis_check_reads_memory_instead_of_a_ping(own_redis: RedisServer) -> None:
    """The second check does so without an additional command."""
    environment = {
        "REDIS_HOST": own_redis.host,
        "REDIS_PORT": str(own_redis.port),
        "HEALTH_CHECK_INTERVAL": "200",
    }
    used: Key = ("viralfx_redis_memory_used_bytes", frozenset())
    with running(environment=environment) as service:
        service.wait_ready()
        wait_until(lambda: used in scrape(service), what="memory")
        seen = scrape(service)[used]

    assert 100_000 < seen < 1e9
