"""The plugin in another Litestar application, under other servers."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from httpx import ASGITransport, AsyncClient
from litestar import Litestar, Request, Response, WebSocket, get, websocket
from litestar.config.app import AppConfig
from litestar.datastructures import State
from litestar.exceptions import HTTPException
from litestar.plugins import InitPlugin
from litestar.plugins.prometheus import PrometheusController
from litestar.testing import AsyncTestClient
from tests.servers.ports import free_port
from tests.servers.waiting import until, wait_until
from tests.system.service import READY_WITHIN, ROOT, request

from viralfx import (
    CheckConfig,
    Observation,
    OperationsConfig,
    OperationsPlugin,
    Status,
    ViralFXError,
)
from viralfx.core.correlation import current_correlation_id
from viralfx.core.errors import ConfigurationError
from viralfx.settings import Secret, Settings

SETTINGS = Settings(management_token=Secret("planted"))


@get("/who")
async def who() -> dict[str, str | None]:
    """Return the current correlation id."""
    return {"correlationId": current_correlation_id()}


@get("/teapot")
async def teapot() -> None:
    """Raise an error with a custom status."""
    raise HTTPException(status_code=418, detail="short and stout")


def own_handler(_: Request[object, object, State], error: Exception) -> Response[str]:
    """Handle errors the application's way."""
    return Response(f"own: {error}", status_code=418, media_type="text/plain")


class Recorder:
    """A check and a stage that record their runs."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    async def check(self) -> Observation:
        """Record the run and pass."""
        self.ran.append("check")
        return Observation(status=Status.PASS, message="recorded")

    async def run(self, budget: float) -> None:
        """Record the budget."""
        self.ran.append(f"stage {budget:g}")


@pytest.fixture
async def client() -> AsyncIterator[AsyncTestClient[Litestar]]:
    """Return a client of an application with the plugin and its own error handler."""
    app = Litestar(
        [who, teapot],
        plugins=[OperationsPlugin(OperationsConfig(settings=SETTINGS))],
        exception_handlers={HTTPException: own_handler},
        logging_config=None,
    )
    async with AsyncTestClient(app) as test_client:
        yield test_client


async def ready(client: AsyncTestClient[Litestar]) -> None:
    """Wait until the readiness probe passes."""
    async with asyncio.timeout(5):
        while (await client.get("/health/ready")).status_code != 200:
            await client.get("/health/detailed?fresh=1")


@pytest.mark.parametrize("opens", ["lifespan", "on_startup"])
async def test_a_check_finds_what_the_start_up_opens(
    opens: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its first attempt comes after the start-up, although built-in checks run before."""
    attempts: list[bool] = []
    is_open = False

    async def open_pool() -> None:
        nonlocal is_open
        await until(lambda: monitor.report().checks["memory"].checked_at is not None)
        is_open = True

    class Pool(InitPlugin):
        """A plugin whose lifespan begins after that of the operations layer."""

        @asynccontextmanager
        async def lifespan(self, _app: Litestar) -> AsyncIterator[None]:
            """Open the pool."""
            await open_pool()
            yield

        def on_app_init(self, app_config: AppConfig) -> AppConfig:
            """Add the lifespan."""
            app_config.lifespan.append(self.lifespan)
            return app_config

    async def check() -> bool:
        attempts.append(is_open)
        return is_open

    limits = CheckConfig(check, interval=30.0)
    plugin = OperationsPlugin(OperationsConfig(settings=SETTINGS, checks={"pool": limits}))
    monitor = plugin.operations.monitor
    hooks = [open_pool] if opens == "on_startup" else []
    plugins = [plugin, Pool()] if opens == "lifespan" else [plugin]
    app = Litestar(plugins=plugins, on_startup=hooks, logging_config=None)
    async with AsyncTestClient(app) as client:
        await ready(client)

    assert attempts
    assert all(attempts)
    assert app.on_startup == hooks
    assert [line for line in caplog.records if line.levelno >= logging.ERROR] == []


@pytest.mark.parametrize("lifespan", [True, False])
async def test_endpoints_answer_with_and_without_a_lifespan(*, lifespan: bool) -> None:
    """The gate and, without a lifespan, the documented routes have the same responses."""
    plugin = OperationsPlugin(OperationsConfig(settings=SETTINGS))
    app = Litestar(plugins=[plugin], logging_config=None)
    async with AsyncExitStack() as stack:
        transport = ASGITransport(app=cast("Any", app))
        client = AsyncClient(transport=transport, base_url="http://test")
        await stack.enter_async_context(client)
        if lifespan:
            await stack.enter_async_context(app.lifespan())
        else:
            await plugin.operations.start()
            plugin.operations.application_ready()
            stack.push_async_callback(plugin.operations.monitor.stop)
        await client.get("/health/detailed?fresh=1")
        await assert_all_endpoints(client)


async def assert_all_endpoints(client: AsyncClient) -> None:
    """Assert the status of each endpoint."""
    responses = {
        path: (await client.get(path)).status_code
        for path in (
            "/health",
            "/health/live",
            "/health/ready",
            "/health/startup",
            "/health/detailed",
            "/health/detailed?fresh=1",
            "/health/memory",
            "/health/nothing",
            "/health/live/",
            "/health/shutdown",
        )
    }
    head = await client.head("/health/live")

    assert list(responses.values()) == [200, 200, 200, 200, 200, 200, 200, 404, 404, 401]
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["cache-control"] == "no-store"


async def test_the_applications_error_handlers_stay(client: AsyncTestClient[Litestar]) -> None:
    """The plugin neither replaces nor bypasses them, and an unknown path stays theirs too."""
    raised = await client.get("/teapot")
    unknown = await client.get("/unknown")

    assert raised.text == "own: 418: short and stout"
    assert unknown.text.startswith("own: 404")
    assert raised.headers["x-correlation-id"]
    assert unknown.headers["x-correlation-id"]


async def test_the_correlation_id_is_bound_in_handlers(client: AsyncTestClient[Litestar]) -> None:
    """A handler sees the id that the answer carries."""
    given = await client.get("/who", headers={"X-Correlation-ID": "given-1"})
    made = await client.get("/who")

    assert given.json()["correlationId"] == given.headers["x-correlation-id"] == "given-1"
    assert made.json()["correlationId"] == made.headers["x-correlation-id"]
    assert current_correlation_id() is None


async def test_another_server_is_not_stopped_over_http(
    client: AsyncTestClient[Litestar],
) -> None:
    """POST /health/shutdown is 409 with the alternative, and triggers nothing."""
    await ready(client)
    response = await client.post("/health/shutdown", headers={"Authorization": "Bearer planted"})

    assert (response.status_code, "viralfx serve" in response.json()["detail"]) == (409, True)
    assert (await client.get("/health/ready")).status_code == 200


async def test_the_lifespan_runs_checks_and_stages() -> None:
    """The application's check is scheduled, and its stages run at the end of the lifespan."""
    recorder = Recorder()
    config = OperationsConfig(
        settings=SETTINGS,
        checks={"recorded": recorder},
        drain_stages={"recorded": recorder},
        close_stages={"recorded": recorder},
    )
    app = Litestar(plugins=[OperationsPlugin(config)], logging_config=None)
    async with AsyncTestClient(app) as client:
        await ready(client)
        body = (await client.get("/health/recorded")).json()

    assert body["message"] == "recorded"
    assert recorder.ran == ["check", "stage 30", "stage 15"]


async def test_an_application_can_start_again() -> None:
    """Test clients start an application several times; each time it becomes ready."""
    app = Litestar(
        plugins=[OperationsPlugin(OperationsConfig(settings=SETTINGS))], logging_config=None
    )
    for _ in range(2):
        async with AsyncTestClient(app) as client:
            await ready(client)
            assert (await client.get("/health")).json()["status"] == "ok"


async def test_one_plugin_is_for_one_application_at_a_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Applications that run at the same time would share one shutdown; the log says so."""
    plugin = OperationsPlugin(OperationsConfig(settings=SETTINGS))
    first, second = (Litestar(plugins=[plugin], logging_config=None) for _ in range(2))
    for app in (first, second, first):
        async with AsyncTestClient(app) as client:
            await ready(client)
            with pytest.raises(ConfigurationError, match="at the same time needs its own"):
                Litestar(plugins=[plugin], logging_config=None)
    async with AsyncTestClient(first):
        with pytest.RaisesGroup(ConfigurationError, flatten_subgroups=True):
            async with AsyncTestClient(second):
                raise AssertionError("both run")
    problem = "OperationsPlugin: each application that runs at the same time needs its own"

    assert f"{problem}; make a second one for this application" in caplog.messages


@pytest.mark.parametrize("lifespan", [True, False])
async def test_a_root_path_is_not_part_of_the_path(*, lifespan: bool) -> None:
    """Probes also work behind a server that does not strip the root path."""
    app = Litestar(
        plugins=[OperationsPlugin(OperationsConfig(settings=SETTINGS))], logging_config=None
    )
    transport = ASGITransport(app=cast("Any", app), root_path="/api")
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(
            AsyncClient(transport=transport, base_url="http://test")
        )
        if lifespan:
            await stack.enter_async_context(app.lifespan())
        statuses = [
            (await client.get(f"/api/health/{path}")).status_code for path in ("live", "live/")
        ]

    assert statuses == [200, 404]


async def test_the_path_is_configurable() -> None:
    """OperationsConfig(path=...) moves the endpoints, and /health stays the application's."""

    @get("/health")
    async def own() -> str:
        return "mine"

    plugin = OperationsPlugin(OperationsConfig(settings=SETTINGS, path="/ops/health"))
    async with AsyncTestClient(Litestar([own], plugins=[plugin], logging_config=None)) as client:
        mine, moved = await client.get("/health"), await client.get("/ops/health/live")

    assert (mine.text, moved.status_code) == ("mine", 200)


@pytest.mark.parametrize("path", ["health", "/health/", ""])
def test_an_invalid_path_is_rejected(path: str) -> None:
    """The path must be absolute and not end in a slash."""
    with pytest.raises(ValueError, match="path must start with a slash"):
        OperationsConfig(path=path)


@pytest.mark.parametrize("name", ["database", "live", "shutdown", "Upper", "a/b", ""])
def test_an_invalid_check_name_is_rejected(name: str) -> None:
    """Names of built-in checks and other paths, and malformed names, are errors."""
    config = OperationsConfig(settings=SETTINGS, checks={name: Recorder()})

    with pytest.raises(ConfigurationError, match=r"OperationsConfig\.checks"):
        OperationsPlugin(config)


def test_settings_come_from_the_environment_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """OperationsPlugin() needs no argument; an invalid variable is a ``ViralFXError``."""
    monkeypatch.setenv("HEALTH_CHECK_INTERVAL", "1234")
    plugin = OperationsPlugin()
    monkeypatch.setenv("HEALTH_CHECK_INTERVAL", "never")

    assert plugin.settings.health_check_interval == 1.234
    with pytest.raises(ViralFXError, match="HEALTH_CHECK_INTERVAL"):
        OperationsPlugin()


def test_the_plugin_is_documented_in_the_applications_schema() -> None:
    """The operations routes have their own tag in the OpenAPI document."""
    plugin = OperationsPlugin(OperationsConfig(settings=SETTINGS))
    schema: dict[str, Any] = Litestar([who], plugins=[plugin]).openapi_schema.to_schema()

    assert {"/who", "/health", "/health/live", "/health/{check}"} <= schema["paths"].keys()
    assert schema["paths"]["/health/live"]["get"]["tags"] == ["operations"]


def test_it_runs_under_a_plain_server(tmp_path: Path) -> None:
    """Probes, checks and stages work under plain uvicorn, which handles the signals."""
    port = free_port()
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "docs.examples.orders:app", "--port", str(port)],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            env={**os.environ, "SHUTDOWN_READINESS_DELAY": "5000"},
        )
        try:
            wait_until(
                lambda: status(port, "/health/ready") == 200, seconds=READY_WITHIN, what="ready"
            )
            request(port, "/orders/tea", method="POST")
            process.send_signal(signal.SIGTERM)
            code = process.wait(4)
        finally:
            process.kill()

    assert code == -signal.SIGTERM, "uvicorn re-raises the signal after a clean stop"
    assert "shipped tea" in log.read_text()


def test_several_processes_of_one_server_are_one_warning(tmp_path: Path) -> None:
    """Of two, one warns; one alone has no reason to."""
    port = free_port()
    log = tmp_path / "log"
    command = [sys.executable, "-m", "uvicorn", "docs.examples.orders:app", "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--workers", "2"], cwd=ROOT, stdout=output, stderr=output
        )
        try:
            wait_until(
                lambda: log.read_text().count("Application startup complete") == 2,
                seconds=READY_WITHIN,
                what="two workers",
            )
        finally:
            process.terminate()
            process.wait(20)

    assert log.read_text().count("Several processes of one server") == 1


def status(port: int, path: str) -> int | None:
    """Return the status of a response, or None without a response."""
    try:
        return request(port, path).status
    except OSError:
        return None


async def test_whitespace_around_a_token_is_ignored() -> None:
    """A file or a manifest may add whitespace."""
    settings = Settings(management_token=Secret(" planted "))
    app = Litestar(
        plugins=[OperationsPlugin(OperationsConfig(settings=settings))], logging_config=None
    )
    async with AsyncTestClient(app) as client:
        reply = await client.get("/health/shutdown", headers={"Authorization": "Bearer planted"})

    assert reply.status_code == 200


async def test_details_without_a_json_type_are_shown_as_text() -> None:
    """A check may put any value into its details."""

    class Odd:
        async def check(self) -> Observation:
            return Observation(status=Status.PASS, message="odd", details={"what": Path("/odd")})

    config = OperationsConfig(settings=SETTINGS, checks={"odd": Odd()})
    app = Litestar(plugins=[OperationsPlugin(config)], logging_config=None)
    async with AsyncTestClient(app) as client:
        await ready(client)
        body = (await client.get("/health/detailed")).json()

    assert body["checks"]["odd"]["details"]["what"] == "/odd"


@get("/metrics")
async def own_metrics() -> str:
    """Serve the application's own metrics."""
    return "own"


async def test_the_applications_metrics_are_not_hidden() -> None:
    """A route at ``metrics_path`` is an error; with another path both work."""
    what = "metrics_path: the application answers /metrics itself; choose another path, or"
    for handler in (own_metrics, PrometheusController):
        with pytest.raises(ConfigurationError, match=what):
            Litestar([handler], plugins=[OperationsPlugin(OperationsConfig(settings=SETTINGS))])

    config = OperationsConfig(settings=SETTINGS, metrics_path="/prometheus")
    app = Litestar([own_metrics], plugins=[OperationsPlugin(config)])
    async with AsyncTestClient(app) as client:
        assert (await client.get("/metrics")).text == "own"
        assert "viralfx_ready" in (await client.get("/prometheus")).text


@pytest.mark.parametrize(
    "path",
    ["/health", "/health/own", "/health/{own:str}", "/health/loggers", "/health/loggers/own"],
)
async def test_the_applications_routes_are_not_hidden(path: str) -> None:
    """A route below ``path`` is an error; with another path both work."""

    @get(path)
    async def own() -> str:
        return "own"

    what = f"OperationsConfig.path: the application answers {path} itself"
    with pytest.raises(ConfigurationError) as caught:
        Litestar([own], plugins=[OperationsPlugin(OperationsConfig(settings=SETTINGS))])
    assert str(caught.value) == f"{what}; choose another path than /health"

    config = OperationsConfig(settings=SETTINGS, path="/operations")
    app = Litestar([own], plugins=[OperationsPlugin(config)], logging_config=None)
    async with AsyncTestClient(app) as client:
        assert (await client.get(path.replace("{own:str}", "own"))).text == "own"
        assert (await client.get("/operations/live")).json()["alive"] is True


async def test_deeper_paths_belong_to_the_application() -> None:
    """Paths with two segments below the prefix and WebSockets do not conflict."""

    @get("/health/own/page")
    async def page() -> str:
        return "own"

    @websocket("/health/own")
    async def echo(socket: WebSocket[object, object, State]) -> None:
        await socket.accept()
        await socket.close()

    plugin = OperationsPlugin(OperationsConfig(settings=SETTINGS))
    app = Litestar([page, echo], plugins=[plugin], logging_config=None)
    async with AsyncTestClient(app) as client:
        assert (await client.get("/health/own/page")).text == "own"


@pytest.mark.parametrize("path", ["metrics", "/metrics/", "/health", "/health/metrics"])
def test_an_invalid_metrics_path_is_rejected(path: str) -> None:
    """The path is relative, ends with a slash, or is below the health endpoints."""
    with pytest.raises(ValueError, match="metrics_path must"):
        OperationsConfig(metrics_path=path)
