"""The service on Postgres and Redis: its responses, and its load on both servers."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jq
import pytest
from tests import forked
from tests.servers.postgres import PostgresServer, postgres_server
from tests.servers.redis import RedisServer
from tests.servers.waiting import wait_until
from tests.system.load import Load
from tests.system.service import Service, running

from viralfx.domain.fleet import BEAT_SECONDS

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


@contextmanager
def serving(postgres: PostgresServer, redis: RedisServer, **more: str) -> Iterator[Service]:
    """Run the service on both servers."""
    environment = {
        "DATABASE_URL": postgres.url(),
        "REDIS_HOST": redis.host,
        "REDIS_PORT": str(redis.port),
        **more,
    }
    result = forked.viralfx("migrate", environ=environment)
    assert result.returncode == 0, result.stderr
    with running(environment=environment) as service:
        yield service.wait_ready()


@pytest.fixture(scope="module")
def talkative() -> Iterator[PostgresServer]:
    """Return a Postgres that logs every statement with the name of the client."""
    with postgres_server(settings={"log_statement": "all", "log_line_prefix": "[%a] "}) as server:
        yield server


def shape(value: Any) -> Any:
    """Return the names and types of a JSON value."""
    if isinstance(value, dict):
        return {name: shape(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [shape(inner) for inner in value]
    if isinstance(value, str) and TIME.fullmatch(value):
        return "time"
    return {bool: "boolean", int: "number", float: "number", str: "text"}[type(value)]


def holds(shown: Any, wanted: Any) -> bool:
    """Return whether ``shown`` holds everything in ``wanted``, and possibly more."""
    if isinstance(wanted, dict):
        return isinstance(shown, dict) and all(
            name in shown and holds(shown[name], inner) for name, inner in wanted.items()
        )
    return bool(shown == wanted)


DATABASE_STATS = {
    "totalConnections": "number",
    "activeConnections": "number",
    "idleConnections": "number",
    "failedConnections": "number",
    "lastHealthCheck": "time",
}
REDIS_STATS = {
    "isConnected": "boolean",
    "lastHealthCheck": "time",
    "failedAttempts": "number",
    "totalRequests": "number",
    "successfulRequests": "number",
    "failedRequests": "number",
}
DATABASE = {
    "status": "text",
    "message": "text",
    "details": {
        "isConnected": "boolean",
        "stats": DATABASE_STATS,
        "poolConfig": {"min": "number", "max": "number", "timeout": "number"},
        "responseTime": "number",
    },
    "responseTime": "number",
}
FILTERS: dict[str, object] = {
    ".checks.database.details.stats": DATABASE_STATS,
    ".checks.database": DATABASE,
    ".checks.database.details.responseTime": "number",
    ".checks.redis": {
        "status": "text",
        "message": "text",
        "details": {
            "isConnected": "boolean",
            "stats": REDIS_STATS,
            "config": {"host": "text", "port": "number", "db": "number"},
        },
        "responseTime": "number",
    },
    ".checks.memory": {"status": "text", "details": {"rss": "text", "usagePercent": "text"}},
    ".checks.queues": {"status": "text", "message": "text", "responseTime": "number"},
    ".metrics": {
        "responseTime": "number",
        "memoryUsage": {
            "rss": "number",
            "heapTotal": "number",
            "heapUsed": "number",
            "external": "number",
        },
        "cpuUsage": "number",
    },
}


def test_the_filters_of_the_guide_print_their_fields(
    talkative: PostgresServer, own_redis: RedisServer
) -> None:
    """Each jq filter of docs/operations.md on a real response, healthy and without servers."""
    times = {"HEALTH_CHECK_INTERVAL": "500", "DB_HEALTH_CHECK_INTERVAL": "500"}
    with serving(talkative, own_redis, **times) as service:
        wait_until(
            lambda: service.get("/health/database").json()["details"]["stats"]["totalConnections"],
            what="counts after the pool was opened",
        )
        healthy = service.get("/health/detailed").json()
        talkative.freeze()
        own_redis.freeze()
        try:
            wait_until(lambda: service.status("/health/detailed") == 503, what="unhealthy")
            wait_until(lambda: service.status("/health/redis") == 503, what="both are down")
            wait_until(
                lambda: service.status("/health/queues") == 503, what="the counts are missing"
            )
            failing = service.get("/health/detailed").json()
        finally:
            talkative.thaw()
            own_redis.thaw()

    for response in (healthy, failing):
        for text, wanted in FILTERS.items():
            shown = shape(jq.compile(text).input_value(response).first())
            assert holds(shown, wanted), f"{text}: {shown}"
        failed = jq.compile(".checks.queues.details[].metrics.failed").input_value(response).all()
        # The database counts jobs: without it there are no numbers, rather than zeros.
        assert failed == ([0, 0, 0] if response is healthy else [])
    stats = healthy["checks"]["database"]["details"]["stats"]
    assert stats["totalConnections"] == 2
    assert stats["activeConnections"] + stats["idleConnections"] == stats["totalConnections"]
    assert healthy["checks"]["database"]["details"]["isConnected"] is True
    assert healthy["checks"]["redis"]["details"]["config"] == {
        "host": own_redis.host,
        "port": own_redis.port,
        "db": 0,
    }
    assert (failing["status"], failing["checks"]["database"]["details"]["isConnected"]) == (
        "unhealthy",
        False,
    )


def test_details_query_each_backend_at_most_once_a_second(
    talkative: PostgresServer, own_redis: RedisServer
) -> None:
    """Many requests with ?fresh=1 cause at most one query a second to each server."""
    fresh = "/health/detailed?fresh=1"
    with serving(talkative, own_redis) as service:
        asked = Asked(talkative, own_redis)
        began, before = time.monotonic(), asked.questions()
        with Load(service.port, {fresh: 40.0, "/health/detailed": 10.0}) as load:
            wait_until(lambda: len(load.of(fresh)) >= 80, what="requests")
        after, seconds = asked.questions(), time.monotonic() - began

    assert {a.status for a in load.responses} == {200}
    for old, new in zip(before, after, strict=True):
        assert 1 <= new - old <= seconds + 2


def test_an_idle_service_queries_once_an_interval(
    talkative: PostgresServer, own_redis: RedisServer
) -> None:
    """The checks' queries are its only traffic except its report, for any number of probes."""
    times = {"HEALTH_CHECK_INTERVAL": "1000", "DB_HEALTH_CHECK_INTERVAL": "1000"}
    with serving(talkative, own_redis, **times) as service:
        asked = Asked(talkative, own_redis)
        wait_until(lambda: asked.questions()[1] > 1, what="two rounds of checks")
        wait_until(asked.reported, what="the reports of the start")
        began, before = time.monotonic(), asked.everything()
        with Load(service.port, {"/health/ready": 20.0, "/health/detailed": 20.0}) as load:
            wait_until(lambda: len(load.responses) >= 120, what="requests")
        after, seconds = asked.everything(), time.monotonic() - began

    # The process writes a report each five seconds, in a connection of the pool.
    assert after.others - before.others <= seconds // BEAT_SECONDS + 1
    for old, new in zip(before[:2], after[:2], strict=True):
        # The interval runs from the end of one attempt to the start of the next.
        assert 1 <= new - old <= seconds + 2


class Counts(NamedTuple):
    """Commands to Postgres by the check, to Redis, and to Postgres by everything else."""

    checks: int
    redis: int
    others: int


class Asked:
    """Counts the queries of a service to both servers."""

    def __init__(self, postgres: PostgresServer, redis: RedisServer) -> None:
        self._postgres = postgres
        self._redis = redis
        self._own = 0
        self._reports = (0, 0.0)

    def questions(self) -> tuple[int, int]:
        """Return the numbers of health queries so far."""
        # Some rounds query the memory instead of sending a ping.
        calls = self._calls()
        asked = self._postgres.log().count("current_setting('transaction_read_only')")
        return asked, calls.get("ping", 0) + calls["info"]

    def reported(self) -> bool:
        """Return whether the pool was used, and not in the last second."""
        count = self._statements("viralfx")
        if count != self._reports[0]:
            self._reports = (count, time.monotonic())
        return count > 0 and time.monotonic() > self._reports[1] + 1

    def everything(self) -> Counts:
        """Return the numbers of all commands so far, without connection set-up."""
        greetings = {"hello", "client|setinfo"}
        calls = {name: count for name, count in self._calls().items() if name not in greetings}
        # A check sends its write together with the ping or the query of the memory.
        asked = calls.get("ping", 0) + calls["info"]
        calls["set"] = max(0, calls.get("set", 0) - asked)
        checks, all_of_them = (self._statements(name) for name in ("viralfx-health", "viralfx.*"))
        return Counts(checks, sum(calls.values()), all_of_them - checks)

    def _statements(self, application: str) -> int:
        line = rf"^\[{application}\] LOG: .*(?:statement|execute)"
        return len(re.findall(line, self._postgres.log(), re.MULTILINE))

    def _calls(self) -> dict[str, int]:
        stats = self._redis.command("INFO", "commandstats")
        calls = {name.removeprefix("cmdstat_"): int(s["calls"]) for name, s in stats.items()}
        # Subtract the commands of this test; the current one is not in its own response.
        calls["info"] = calls.get("info", 0) - self._own
        self._own += 1
        return calls
