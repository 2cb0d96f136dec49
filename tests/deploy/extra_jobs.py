"""A program that does the job of one extra: ``python extra_jobs.py NAME``.

It needs the distribution with that extra, and no package of the tests. DATABASE_URL and REDIS_URL
are empty servers for the extras that have one.
"""

import asyncio
import contextlib
import importlib
import os
import pkgutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import viralfx
from viralfx.bootstrap import Assembly, assemble
from viralfx.cli import main
from viralfx.settings import read_settings

_SECONDS = 30.0


@viralfx.task("double")
async def double(number: int) -> int:
    """Return twice the number."""
    return number * 2


async def _until_done(assembly: Assembly) -> object:
    """Run a job in this process, and return its result."""
    operations, jobs = assembly.operations, assembly.jobs
    await operations.start()
    jobs.enable_worker()
    operations.application_ready()
    submitted = await jobs.service.submit("double", 21)
    try:
        return (await jobs.service.wait(submitted.job.id, timeout=_SECONDS)).result
    finally:
        operations.shutdown.trigger("done")
        await operations.shutdown.run()


def none() -> None:
    """Retry, break a circuit, and run a job and the checks in memory."""
    calls = []

    @viralfx.retry(attempts=2, base_delay=0.0)
    @viralfx.CircuitBreaker(failure_threshold=5, open_for=60.0)
    async def flaky() -> str:
        calls.append(1)
        if len(calls) == 1:
            raise ConnectionError
        return "done"

    assert asyncio.run(flaky()) == "done"
    assert main(["env"]) == 0
    assembly = assemble(read_settings({}), tasks=[double])
    assert asyncio.run(_until_done(assembly)) == b"42"
    report = assembly.operations.monitor.report()
    assert {name: str(check.status) for name, check in report.checks.items()}["memory"] == "pass"
    assert assembly.metrics.registry.get_sample_value("python_info") is None


def litestar() -> None:
    """Answer probes and metrics from the plugin."""
    from litestar import Litestar, get  # noqa: PLC0415
    from litestar.testing import TestClient  # noqa: PLC0415

    @get("/own", sync_to_thread=False)
    def own() -> str:
        return "own"

    with TestClient(Litestar([own], plugins=[viralfx.OperationsPlugin()])) as client:
        paths = ("/health/live", "/health/ready", "/metrics", "/own")
        statuses = {path: client.get(path).status_code for path in paths}
    assert set(statuses.values()) == {200}, statuses


def docs() -> None:
    """Serve the document of the API and its page."""
    from litestar.testing import TestClient  # noqa: PLC0415

    from viralfx.web.app import create_app  # noqa: PLC0415

    with TestClient(create_app(read_settings({}))) as client:
        statuses = [
            client.get(path).status_code for path in ("/api/docs", "/api/docs/openapi.json")
        ]
    assert statuses == [200, 200], statuses


async def plain(scope: dict[str, Any], _receive: object, send: Callable[..., Any]) -> None:
    """Answer each request: an ASGI application without a framework."""
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"plain"})


def serve_app() -> None:
    """Serve an application without a framework, and stop it with SIGTERM."""
    _serve("--app", "extra_jobs:plain", path="/own", body=b"plain")


def serve() -> None:
    """Serve the service itself, its API included, and stop it with SIGTERM."""
    _serve(path="/api/v1/jobs", body=b'{"items":[],"nextCursor":null}')


def _serve(*options: str, path: str, body: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    folder = os.path.dirname(__file__)  # noqa: PTH120 - the path is of a string
    paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), folder]))
    command = [sys.executable, "-m", "viralfx", "serve", *options]
    environment = {**os.environ, "PORT": port, "PYTHONPATH": paths}
    with subprocess.Popen(command, env=environment) as service:
        try:
            assert _get(f"http://127.0.0.1:{port}/health/ready").startswith(b'{"ready":true')
            assert _get(f"http://127.0.0.1:{port}{path}") == body
            service.terminate()
            assert service.wait(_SECONDS) == 0
        finally:
            service.kill()


def _get(url: str) -> bytes:
    """Return the body of the first answer with 200."""
    deadline = time.monotonic() + _SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=_SECONDS) as response:  # noqa: S310 - it is HTTP
                body: bytes = response.read()
                return body
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def cron() -> None:
    """Calculate the next time of a schedule."""
    from datetime import UTC, datetime  # noqa: PLC0415

    from viralfx.jobs.schedule import Schedule  # noqa: PLC0415

    schedule = Schedule(task="t", cron="30 8 * * 1", timezone="Europe/Berlin")
    assert schedule.next_after(datetime(2026, 1, 1, tzinfo=UTC)) == datetime(
        2026, 1, 5, 7, 30, tzinfo=UTC
    )


def postgres() -> None:
    """Apply the migrations, and query Postgres through the pool."""
    migrate()
    asyncpg()


def asyncpg() -> None:
    """Query Postgres through the pool."""
    database = assemble(read_settings(_of("DATABASE_URL"))).database
    assert database is not None

    async def ask() -> object:
        await database.open()
        try:
            return await database.execute_with_retry(lambda c: c.fetchval("select 42"), 1)
        finally:
            database.terminate()

    assert asyncio.run(ask()) == 42


def migrate() -> None:
    """Apply the migrations, and find them applied."""
    assert main(["migrate"]) == 0
    assert main(["migrate", "--check"]) == 0


def redis() -> None:
    """Keep a value in Redis."""
    assembly = assemble(read_settings(_of("REDIS_URL")))

    async def keep() -> object:
        assert assembly.redis is not None
        try:
            await assembly.redis.redis.set("extra", "kept")
            return await assembly.redis.redis.get("extra")
        finally:
            await assembly.redis.redis.aclose()

    assert asyncio.run(keep()) in {"kept", b"kept"}


def jobs() -> None:
    """Run a message of taskiq as a job, and make the notifier over Redis."""
    from viralfx.adapters.taskiq import StreamNotifier  # noqa: PLC0415
    from viralfx.taskiq import LedgerBroker  # noqa: PLC0415

    assert StreamNotifier.__name__
    broker = LedgerBroker()

    @broker.task("triple")
    async def triple(number: int) -> int:
        return number * 3

    async def run() -> object:
        await broker.startup()
        try:
            sent = await triple.kiq(14)
            return (await sent.wait_result(timeout=_SECONDS)).return_value
        finally:
            await broker.shutdown()

    assert asyncio.run(run()) == 42


def webhooks() -> None:
    """Post a webhook to a server."""
    from viralfx.adapters.http import HttpWebhookSender  # noqa: PLC0415
    from viralfx.domain.webhooks.url import parse_destination  # noqa: PLC0415

    with _receiver() as (port, paths):
        sender = HttpWebhookSender(lambda *_: None)
        sent = sender.post(parse_destination(f"http://127.0.0.1:{port}/hook"), {}, b"{}")
        assert asyncio.run(sent).status == 200
    assert paths == ["/hook"]


def otel() -> None:
    """Send a span by HTTP."""
    with _receiver() as (port, paths):
        _trace(OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{port}")
    assert paths == ["/v1/traces"]


def otel_grpc() -> None:
    """Begin to send a span by gRPC: HTTP/2 arrives."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(_SECONDS)
        place = f"http://127.0.0.1:{server.getsockname()[1]}"
        variables = {"ENDPOINT": place, "PROTOCOL": "grpc", "TIMEOUT": "1"}
        sent = {f"OTEL_EXPORTER_OTLP_{name}": value for name, value in variables.items()}
        threading.Thread(target=_trace, kwargs=sent, daemon=True).start()
        connection, _ = server.accept()
        with connection:
            connection.settimeout(_SECONDS)
            assert connection.recv(3) == b"PRI"


def heap() -> None:
    """Count the objects of the heap."""
    from viralfx.runner.diagnostics import _report  # noqa: PLC0415

    _, objects, size = _report()
    assert objects > 1000
    assert size > objects


def everything() -> None:
    """Import each module of the package."""
    for module in pkgutil.walk_packages(viralfx.__path__, "viralfx."):
        importlib.import_module(module.name)


def _of(variable: str) -> dict[str, str]:
    return {variable: os.environ[variable]}


def _trace(**variables: str) -> None:
    os.environ |= variables
    from viralfx.telemetry.tracing import start_tracing  # noqa: PLC0415

    tracing = start_tracing(instance="extra", environment="test")
    assert tracing is not None
    tracing.make_global()
    from opentelemetry import trace  # noqa: PLC0415

    with trace.get_tracer("extra").start_as_current_span("job"):
        pass
    asyncio.run(tracing.flush(_SECONDS))


@contextlib.contextmanager
def _receiver() -> Iterator[tuple[int, list[str]]]:
    """Run a server that notes the paths of its requests; give its port."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            paths.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port, paths
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


JOBS: dict[str, Callable[[], None]] = {
    "": none,
    "litestar": litestar,
    "serve": serve,
    "serve-app": serve_app,
    "postgres": postgres,
    "asyncpg": asyncpg,
    "migrate": migrate,
    "redis": redis,
    "jobs": jobs,
    "cron": cron,
    "webhooks": webhooks,
    "otel": otel,
    "otel-grpc": otel_grpc,
    "heap": heap,
    "docs": docs,
    "all": everything,
}
"""By extra; the empty name is the distribution without one."""

if __name__ == "__main__":
    JOBS[sys.argv[1]]()
