"""Runs with planted secrets: none leaks, and each line has the fields of docs/operations.md."""

import json
import re
import signal
import urllib.parse
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from tests.servers.fixtures import or_skip
from tests.servers.postgres import PostgresServer
from tests.servers.redis import RedisServer, redis_server
from tests.servers.waiting import wait_until
from tests.system import jobs
from tests.system.service import Reply, Service, running
from tests.system.workers import environment_of

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
LEVELS = {"error", "warn", "info", "debug", "verbose"}
MANAGEMENT_TOKEN, API_TOKEN = "planted-management-token", "planted-api-token"
REDIS_PASSWORD = "planted-redis-password"
WEBHOOK_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
ALERTS = "http://127.0.0.1:9/planted-alert-path/credential"
BEARER = {"Authorization": f"Bearer {MANAGEMENT_TOKEN}"}


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """Return a Redis with a password."""
    with or_skip(), redis_server(password=REDIS_PASSWORD) as server:
        yield server


@pytest.fixture
def environment(own_postgres: PostgresServer, own_redis: RedisServer) -> dict[str, str]:
    """Return variables with a secret in each place that can hold one."""
    return environment_of(
        own_postgres,
        REDIS_HOST=own_redis.host,
        REDIS_PORT=str(own_redis.port),
        REDIS_PASSWORD=REDIS_PASSWORD,
        MANAGEMENT_TOKEN=MANAGEMENT_TOKEN,
        API_TOKEN=API_TOKEN,
        WEBHOOK_SECRET=WEBHOOK_SECRET,
        WEBHOOK_ALLOWED_HOSTS="hooks.example.com",
        ALERT_WEBHOOK_URL=ALERTS,
        HEALTH_CHECK_INTERVAL="300",
        DB_HEALTH_CHECK_INTERVAL="300",
        HEALTH_CHECK_TIMEOUT="500",
        SHUTDOWN_ON_UNCAUGHT="false",
        LOG_LEVEL="verbose",
        LOOP_STALL_THRESHOLD="200",
        TASK_MODULES="tests.system.module_tasks",
        JOB_MAX_ATTEMPTS="2",
    )


def planted(environment: dict[str, str]) -> set[str]:
    """Return the planted secrets in all encodings."""
    dsn = environment["DATABASE_URL"]
    password = urllib.parse.urlsplit(dsn).password
    assert password
    secrets = {
        dsn,
        password,
        MANAGEMENT_TOKEN,
        API_TOKEN,
        WEBHOOK_SECRET,
        WEBHOOK_SECRET.removeprefix("whsec_"),
        ALERTS,
        "/planted-alert-path/credential",
        REDIS_PASSWORD,
    }
    return {form for s in secrets for form in (s, json.dumps(s)[1:-1], urllib.parse.quote(s, ""))}


def all_responses(service: Service) -> Iterator[Reply]:
    """Yield every kind of response: health, metrics, loggers, errors of the application."""
    for path in (
        "/health/detailed?fresh=1",
        "/health/database",
        "/health/redis",
        "/health/queues",
        "/health/none",
        "/health/loggers",
        "/metrics",
        "/leak",
        "/nowhere",
        "/block?seconds=0.5",
        f"/{MANAGEMENT_TOKEN}",
    ):
        yield service.get(path, headers={**BEARER, "X-Correlation-ID": "run-1"}, timeout=30)
    yield service.get("/health/shutdown", headers={"Authorization": f"Bearer {API_TOKEN}"})
    yield service.get("/health/shutdown", headers=BEARER)


def failed_job(service: Service) -> Iterator[Reply]:
    """Let a task fail with every secret, and yield the API's responses about its job."""
    bearer = {"Authorization": f"Bearer {API_TOKEN}"}
    names = ["DATABASE_URL", "REDIS_PASSWORD", "MANAGEMENT_TOKEN", "API_TOKEN", "WEBHOOK_SECRET"]
    job_id = jobs.accept(service, "modules.betray_all", names, **bearer)

    def failed() -> list[Reply]:
        reply = service.get(f"{jobs.JOBS}/{job_id}", headers=bearer)
        return [reply] if reply.json()["state"] == "failed" else []

    yield from wait_until(failed, what="the job failed")
    yield service.get(f"{jobs.JOBS}?state=failed", headers=bearer)
    yield service.get(f"{jobs.JOBS}/{job_id}/events", headers=bearer)


@pytest.mark.each_python
def test_no_secret_leaks_in_a_whole_run(
    environment: dict[str, str], own_postgres: PostgresServer, own_redis: RedisServer
) -> None:
    """The run has start, traffic, faults and shutdown of an API, a worker and a failing process."""
    replies: list[Reply] = []
    with ExitStack() as stack:
        app = ("--app", "tests.system.log_app:app")
        api = stack.enter_context(running(*app, environment=environment)).wait_ready()
        worker = stack.enter_context(
            running(program="worker", management=True, environment=environment)
        ).wait_ready()
        api.get("/crash")
        replies += all_responses(api)
        of_a_job = [*failed_job(api)]
        own_postgres.freeze()
        own_redis.freeze()
        wait_until(
            lambda: all(s.logged("Database connection lost") for s in (api, worker)),
            what="the loss is noticed",
        )
        replies += all_responses(api)
        own_postgres.thaw()
        own_redis.thaw()
        wait_until(lambda: api.status("/health/ready") == 200, what="recovery")
        replies += all_responses(api)
        for service in (api, worker):
            service.signal(signal.SIGTERM)
        assert [api.exit_code(seconds=40), worker.exit_code(seconds=40)] == [0, 0]
        wrong = {**environment, "DATABASE_URL": _with_wrong_password(environment["DATABASE_URL"])}
        wrong |= {"DB_MAX_RECONNECT_ATTEMPTS": "1", "DB_RECONNECT_DELAY": "0"}
        failing = stack.enter_context(running(*app, environment=wrong))
        assert failing.exit_code() == 3
        state = own_postgres.execute("SELECT * FROM viralfx_state")
        rows = own_postgres.execute("SELECT * FROM viralfx_all_jobs")
    lines = [line for service in (api, worker, failing) for line in service.output]
    bodies = "\n".join(reply.body.decode() for reply in [*replies, *of_a_job])
    errors = "\n".join(line for service in (api, worker, failing) for line in service.errors)

    for line in lines:
        parsed = json.loads(line)
        assert list(parsed)[:4] == ["timestamp", "level", "context", "message"], line
        assert TIME.fullmatch(parsed["timestamp"]), line
        assert parsed["level"] in LEVELS, line
        assert parsed["context"], line
    leaked = [
        (where, secret)
        for where, text in {
            "log": "\n".join(lines),
            "responses": bodies,
            "errors": errors,
            "state": repr(state),
            "ledger": repr(rows),
        }.items()
        for secret in planted(environment) | {"wrong-planted-password"}
        if secret in text
    ]
    assert leaked == []
    assert len(lines) > 50
    assert len(replies) == 39
    assert state
    assert "cannot reach ['***', '***', '***'" in repr(rows)
    assert of_a_job[0].json()["error"]["message"].startswith("cannot reach ['***', ")
    contexts = {json.loads(line)["context"] for line in lines}
    assert {"access", "health", "warnings", "asyncpg", "taskiq.receiver", "loop"} <= contexts


def _with_wrong_password(dsn: str) -> str:
    parts = urllib.parse.urlsplit(dsn)
    netloc = f"{parts.username}:wrong-planted-password@{parts.hostname}:{parts.port}"
    return parts._replace(netloc=netloc).geturl()
