"""Tests of tracing: one trace through all processes to an OTLP receiver; no cost when off."""

import asyncio
import base64
import json
import signal
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import psutil
import pytest
from tests import forked
from tests.servers.collector import COLLECTORS, Collector, http_collector, silent_port
from tests.servers.ports import free_port
from tests.servers.postgres import Database
from tests.servers.receiver import Receiver, receiver, status
from tests.servers.redis import RedisServer
from tests.servers.waiting import wait_until
from tests.soak import SOAK
from tests.system.jobs import JOBS, accept, until
from tests.system.load import Load
from tests.system.service import Service, command, running
from tests.system.workers import api, environment_of, worker

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CORRELATION = "order-17"
SECRET = "whsec_" + base64.b64encode(b"n" * 32).decode()


def sending(collector: Collector, **more: str) -> dict[str, str]:
    """Return the variables of a process that exports its spans soon."""
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        **more,
    }


@pytest.mark.parametrize("protocol", COLLECTORS)
async def test_one_trace_spans_all_processes(database: Database, protocol: str) -> None:
    """It leads from a caller's request through two processes to the receiver of a webhook."""
    with COLLECTORS[protocol]() as collector:
        async with receiver() as receiving:
            receiving.respond_with(status(503, "Retry-After: 1"), status(204))
            seen = await asyncio.to_thread(_one_job, database, protocol, collector, receiving)
    shown, first, second = seen
    request, send, _ = collector.wait_for("POST /webhooks", "send notifications", "SELECT")
    selects = [span for span in collector.named("SELECT") if span.parent == send.id]
    accepts = 'FROM "viralfx_ops".viralfx_accept_jobs'
    (sql,) = [span for span in selects if accepts in span.attributes["db.query.text"]]
    attempts = sorted(collector.named("process notifications"), key=lambda span: span.began)
    posts = sorted(collector.named("POST"), key=lambda span: span.began)

    # One trace with the right parents.
    ours = [request, send, sql, *attempts, *posts]
    assert (len(attempts), len(posts)) == (2, 2)
    assert {span.trace for span in ours} == {TRACE}
    assert (request.parent, send.parent, sql.parent) == (CALLER, request.id, send.id)
    assert [attempt.parent for attempt in attempts] == [send.id, send.id]
    assert [post.parent for post in posts] == [attempt.id for attempt in attempts]
    assert [span.kind for span in ours[:3]] == ["SERVER", "PRODUCER", "CLIENT"]
    assert [span.kind for span in (attempts[0], posts[0])] == ["CONSUMER", "CLIENT"]
    assert sql.attributes["db.system.name"] == "postgresql"
    assert (posts[0].failed, posts[1].failed) == (True, False)
    assert [name for name, _ in attempts[0].events] == ["viralfx.job.attempt_failed"]

    # Two processes of one service.
    instances = {span.resource["service.instance.id"] for span in ours}
    assert len(instances) == 2
    assert {span.resource["service.name"] for span in ours} == {"orders"}

    # One correlation id on all spans.
    assert {span.attributes["viralfx.correlation_id"] for span in ours} == {CORRELATION}
    assert shown["correlationId"] == CORRELATION
    for post, received in zip(posts, receiving.requests, strict=True):
        assert received.headers["x-correlation-id"] == CORRELATION
        assert received.headers["traceparent"].startswith(f"00-{TRACE}-{post.id}-0")
        assert "webhook-signature" in received.headers
    lines = _lines(second, shown["id"], TRACE)
    assert [line["message"] for line in lines if line["level"] == "warn"] == ["Job attempt failed"]
    (access,) = [line for line in _lines(first, TRACE) if line["context"] == "access"]
    assert (access["traceId"], access["spanId"]) == (TRACE, request.id)
    for line in [*_lines(first, shown["id"], TRACE, CORRELATION), *lines]:
        assert (line["correlationId"], line["traceId"]) == (CORRELATION, TRACE), line

    # No spans of the background work of the processes.
    assert all(span.parent for span in collector.spans if span.kind == "CLIENT")


def _one_job(
    database: Database, protocol: str, collector: Collector, receiving: Receiver
) -> tuple[dict[str, Any], Service, Service]:
    environment = environment_of(
        database,
        **sending(collector, OTEL_EXPORTER_OTLP_PROTOCOL=protocol),
        WEBHOOK_ALLOWED_HOSTS=f"http://127.0.0.1:{receiving.port}",
        WEBHOOK_SECRET=SECRET,
        LOG_LEVEL="verbose",
        OTEL_SERVICE_NAME="orders",
    )
    payload = {
        "url": f"http://127.0.0.1:{receiving.port}/orders",
        "type": "order.shipped",
        "data": {},
    }
    headers = {"X-Correlation-ID": CORRELATION, "traceparent": f"00-{TRACE}-{CALLER}-01"}
    application = ("--app", "tests.system.apps:webhooks")
    with api(environment, *application) as service, worker(environment) as working:
        sent = service.get("/webhooks", method="POST", json_body=payload, headers=headers)
        shown = until(service, sent.json()["id"], "completed")
        for process in (service, working):
            process.signal(signal.SIGTERM)
            assert process.exit_code() == 0
    return shown, service, working


def _lines(process: Service, *texts: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in process.output if any(text in line for text in texts)]


@pytest.mark.parametrize("process", ["serve", "worker"])
def test_opentelemetry_is_not_imported_without_an_endpoint(
    database: Database, redis: RedisServer, process: str
) -> None:
    """Other variables of OpenTelemetry do not matter."""
    off = {"OTEL_SERVICE_NAME": "shop", "OTEL_TRACES_EXPORTER": "otlp"}
    backends = {"REDIS_HOST": redis.host, "REDIS_PORT": str(redis.port)}
    tasks = {"TASK_MODULES": "tests.system.module_tasks"}
    environment = environment_of(database, **tasks, **backends, **off)
    with ExitStack() as stack:
        if process == "worker":
            stack.enter_context(worker(environment, fresh=True))
        service = stack.enter_context(
            api(environment, *(["--worker"] if process == "serve" else []), fresh=True)
        )
        found = [
            until(service, accept(service, "modules.list", prefix), "completed")["result"]
            for prefix in ("opentelemetry", "grpc", "google.protobuf", "viralfx.telemetry.tracing.")
        ]

    assert found == [
        [],
        [],
        [],
        ["viralfx.telemetry.tracing.variables"],
    ]


@pytest.mark.parametrize("program", ["serve", "worker"])
def test_an_invalid_variable_ends_the_start(database: Database, program: str) -> None:
    """Each problem is one line, and the exit code is 2."""
    environment = {
        "DATABASE_URL": database.url,
        "OTEL_EXPORTER_OTLP_ENDPOINT": "localhost:4318",
        "OTEL_TRACES_SAMPLER": "sometimes",
        # The library reads it while it is imported.
        "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "few",
    }
    ended = command(program, environment=environment)

    assert ended.returncode == 2
    lines = ended.stderr.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == [
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT",
        "OTEL_TRACES_SAMPLER",
    ]


def test_probes_are_not_traced_and_the_shutdown_is() -> None:
    """The shutdown has a span for each stage, which is sent before the process ends."""
    with http_collector() as collector:
        with running("--no-worker", environment=sending(collector), management=True) as service:
            service.wait_ready()
            for path in ("/health", "/health/live", "/health/detailed?fresh=1", "/metrics"):
                assert service.get(path).status == service.manage(path).status == 200
            assert service.get("/nowhere").status == 404
            service.signal(signal.SIGTERM)
            assert service.exit_code() == 0
        (root,) = collector.named("shutdown")

    stages = [span for span in collector.spans if span.parent == root.id]
    assert {"stage requests", "stage jobs", "stage server"} <= {span.name for span in stages}
    assert root.attributes["viralfx.shutdown.reason"] == "SIGTERM"
    assert all(root.began <= span.began <= span.ended <= root.ended for span in stages)
    (ended,) = service.logged("Process ends")
    assert {span.trace for span in stages} == {root.trace}
    rest = {span.name for span in collector.spans if span.trace != root.trace}
    assert rest == {"GET"}
    assert ended["exitCode"] == 0


@pytest.mark.each_python
def test_statements_and_commands_are_children_of_their_request(
    database: Database, redis: RedisServer
) -> None:
    """They contain no values, and pool resets are excluded."""
    environment = {"DATABASE_URL": database.url, "REDIS_HOST": redis.host}
    environment["REDIS_PORT"] = str(redis.port)
    forked.viralfx("migrate", environ=environment)
    app = ("--app", "tests.system.backend_app:app")
    with (
        http_collector() as collector,
        running(*app, environment={**environment, **sending(collector)}) as service,
    ):
        service.wait_ready()
        for path in ("/query", "/slow-query/0.01", "/cached"):
            assert service.get(path).status == 200
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0
    below = {
        span.name: [child for child in collector.spans if child.parent == span.id]
        for span in collector.spans
        if span.kind == "SERVER"
    }

    ((query,), (slow,), (cached,)) = (
        below[f"GET {route}"] for route in ("/query", "/slow-query/{seconds}", "/cached")
    )
    assert (query.kind, query.name, query.attributes["db.query.text"]) == (
        "CLIENT",
        "SELECT",
        "SELECT ?",
    )
    assert query.attributes["db.system.name"] == "postgresql"
    assert slow.attributes["db.query.text"] == "SELECT pg_sleep(?), ?"
    assert (cached.name, cached.attributes["db.system.name"]) == ("GET", "redis")
    assert cached.attributes["db.query.text"] == "GET ?"
    assert "planted" not in repr(collector.spans)


def test_no_secret_is_in_a_trace() -> None:
    """A task raises an error that contains secrets; the trace has only its class."""
    secrets = {"API_TOKEN": "planted-api-token", "TASK_MODULES": "tests.system.module_tasks"}
    with (
        http_collector() as collector,
        running(environment={**sending(collector), **secrets}) as service,
    ):
        service.wait_ready()
        headers = {"Authorization": "Bearer planted-api-token"}
        accept(service, "modules.betray", "API_TOKEN", **headers)
        (name, event), *_ = wait_until(
            lambda: [
                event
                for span in collector.named("process default")
                if span.attributes["viralfx.job.task"] == "modules.betray"
                for event in span.events
            ]
        )
        service.signal(signal.SIGTERM)
        service.exit_code()

    assert name == "viralfx.job.attempt_failed"
    assert set(event) == {"viralfx.job.attempt", "error.type", "viralfx.job.delay"}
    assert "planted" not in repr(collector.spans)


def test_exemplars_have_ids_of_exported_traces() -> None:
    """A histogram's bucket links to the trace of the request."""
    with http_collector() as collector, running(environment=sending(collector)) as service:
        service.wait_ready()
        service.get(JOBS)
        (span,) = collector.wait_for(f"GET {JOBS}")
        accepted = {"Accept": "application/openmetrics-text; version=1.0.0"}
        text = service.get("/metrics", headers=accepted).body.decode()

    measured = [line for line in text.splitlines() if f'trace_id="{span.trace}"' in line]
    assert any(line.startswith("http_server_request_duration_seconds_bucket") for line in measured)
    assert f'span_id="{span.id}"' in measured[0]


EXPORT_SECONDS = 1
"""Seconds that a request would take if it waited for its export to a silent collector."""


class Away:
    """Collectors that fail in different ways."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def environment(self, how: str) -> Mapping[str, str]:
        """Return the variables for one of the collectors."""
        if how == "silent":
            port = self._stack.enter_context(silent_port())
        elif how == "dead":
            port = free_port()
        else:
            collector: Collector = self._stack.enter_context(http_collector())
            port = collector.port
            if how == "erring":
                collector.status = 500
            elif how == "overloaded":
                collector.status = 503
            else:
                collector.hold.clear()
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc" if how == "dead" else "http/protobuf",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "OTEL_EXPORTER_OTLP_TIMEOUT": str(EXPORT_SECONDS),
        }


FAILING = ["dead", "silent", "erring", "overloaded", "holding"]
"""A usual run has one that refuses connections, one that is silent, and one that answers 500.

The exporter repeats its request to one that answers 503, and waits for one that holds its response,
until its timeout: as for a silent one.
"""


@pytest.mark.soak
@pytest.mark.parametrize("how", FAILING if SOAK else FAILING[:3])
def test_a_failing_collector_does_not_affect_the_service(how: str) -> None:
    """Requests and the stop do not wait for it, memory is bounded, and one line is logged."""
    with ExitStack() as stack:
        environment = {
            **Away(stack).environment(how),
            "OTEL_BSP_MAX_QUEUE_SIZE": "32",
            "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "32",
            "SHUTDOWN_CONNECTION_TIMEOUT": "2000",
        }
        with running(environment=environment) as service:
            service.wait_ready()
            memory = psutil.Process(service.process.pid)
            with Load(service.port, {"/nowhere": 60.0}) as load:
                wait_until(lambda: len(load.responses) >= 40)
                before = memory.memory_info().rss
                wait_until(lambda: len(load.responses) >= 160)
                grown = memory.memory_info().rss - before
            wait_until(lambda: service.logged("Traces are lost"), seconds=60)
            service.signal(signal.SIGTERM)
            code = service.exit_code()  # while the collector is still away

    assert code == 0
    assert {response.status for response in load.responses} == {404}
    assert grown < 20_000_000
    expected = (
        "Data in memory is lost",
        '"context":"loop"',
    )  # a busy machine blocks loops
    lines = [
        line
        for line in service.output
        if '"warn"' in line and not any(each in line for each in expected)
    ]
    assert len(lines) == 1, lines
    assert service.errors == []
    assert load.median("/nowhere") < EXPORT_SECONDS / 2
