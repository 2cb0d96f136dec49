"""The plugin in somebody else's application, under servers that know nothing of it."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, cast

import pytest
from httpx import ASGITransport, AsyncClient
from litestar import Litestar, Request, Response, WebSocket, get, websocket
from litestar.datastructures import State
from litestar.exceptions import HTTPException
from litestar.testing import AsyncTestClient
from tests.servers.ports import free_port
from tests.servers.waiting import wait_until
from tests.system.service import READY_WITHIN, ROOT, request

from viralfx import Observation, OperationsConfig, OperationsPlugin, Status, ViralFXError
from viralfx.domain.correlation import current_correlation_id
from viralfx.domain.errors import ConfigurationError
from viralfx.settings import Secret, Settings

SETTINGS = Settings(management_token=Secret("planted"))


@get("/who")
async def who() -> dict[str, str | None]:
    """Tell the correlation id that is bound."""
    return {"correlationId": current_correlation_id()}


@get("/teapot")
async def teapot() -> None:
    """Fail with a status of the application's own."""
    raise HTTPException(status_code=418, detail="short and stout")


def own_handler(_: Request[object, object, State], error: Exception) -> Response[str]:
    """Handle errors the application's way."""
    return Response(f"own: {error}", status_code=418, media_type="text/plain")


class Recorder:
    """A check and a stage that remember that they ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    async def check(self) -> Observation:
        """Pass."""
        self.ran.append("check")
        return Observation(status=Status.PASS, message="recorded")

    async def run(self, budget: float) -> None:
        """Note the budget."""
        self.ran.append(f"stage {budget:g}")


@pytest.fixture
async def client() -> AsyncIterator[AsyncTestClient[Litestar]]:
    """Return a client of an application with the plugin and an error handler of its own."""
    app = Litestar(
        [who, teapot],
        plugins=[OperationsPlugin(OperationsConfig(settings=SETTINGS))],
        exception_handlers={HTTPException: own_handler},
        logging_config=None,
    )
    async with AsyncTestClient(app) as test_client:
        yield test_client


async def ready(client: AsyncTestClient[Litestar]) -> None:
    """Wait until readiness says yes."""
    async with asyncio.timeout(5):
        while (await client.get("/health/ready")).status_code != 200:
            await client.get("/health/detailed?fresh=1")


@pytest.mark.parametrize("lifespan", [True, False])
async def test_endpoints_answer_with_and_without_a_lifespan(*, lifespan: bool) -> None:
    """The gate and, on a server that runs no lifespan, the documented routes answer the same."""
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
    answers = {
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

    assert list(answers.values()) == [200, 200, 200, 200, 200, 200, 200, 404, 404, 401]
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


async def test_a_foreign_server_is_not_stopped_from_inside(
    client: AsyncTestClient[Litestar],
) -> None:
    """POST /health/shutdown says what to do instead, and triggers nothing."""
    await ready(client)
    answer = await client.post("/health/shutdown", headers={"Authorization": "Bearer planted"})

    assert (answer.status_code, "viralfx serve" in answer.json()["detail"]) == (409, True)
    assert (await client.get("/health/ready")).status_code == 200


async def test_the_lifespan_runs_checks_and_stages() -> None:
    """An application's own check is scheduled, and its own stages run when the lifespan ends."""
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


async def test_a_second_lifespan_is_as_good_as_the_first() -> None:
    """An application may be started again, as test clients do, and is ready again."""
    app = Litestar(
        plugins=[OperationsPlugin(OperationsConfig(settings=SETTINGS))], logging_config=None
    )
    for _ in range(2):
        async with AsyncTestClient(app) as client:
            await ready(client)
            assert (await client.get("/health")).json()["status"] == "ok"


def test_one_plugin_is_for_one_application() -> None:
    """Two would share one shutdown, so the second is refused."""
    plugin = OperationsPlugin(OperationsConfig(settings=SETTINGS))
    Litestar(plugins=[plugin], logging_config=None)

    with pytest.raises(ConfigurationError, match="one of its own"):
        Litestar(plugins=[plugin], logging_config=None)


@pytest.mark.parametrize("lifespan", [True, False])
async def test_a_root_path_is_not_part_of_the_path(*, lifespan: bool) -> None:
    """Behind a server that strips nothing from the path, probes answer all the same."""
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


async def test_the_path_can_be_another() -> None:
    """OperationsConfig(path=...) moves the endpoints, and /health stays the application's."""

    @get("/health")
    async def own() -> str:
        return "mine"

    plugin = OperationsPlugin(OperationsConfig(settings=SETTINGS, path="/ops/health"))
    async with AsyncTestClient(Litestar([own], plugins=[plugin], logging_config=None)) as client:
        mine, moved = await client.get("/health"), await client.get("/ops/health/live")

    assert (mine.text, moved.status_code) == ("mine", 200)


@pytest.mark.parametrize("path", ["health", "/health/", ""])
def test_a_path_that_is_none_is_refused(path: str) -> None:
    """The path must be absolute and not end in a slash."""
    with pytest.raises(ValueError, match="path must start with a slash"):
        OperationsConfig(path=path)


@pytest.mark.parametrize("name", ["database", "live", "shutdown", "Upper", "a/b", ""])
def test_a_check_name_that_cannot_be_is_refused(name: str) -> None:
    """Names of built-in checks, of other paths, and what is no name, are refused in one line."""
    config = OperationsConfig(settings=SETTINGS, checks={name: Recorder()})

    with pytest.raises(ConfigurationError, match=r"OperationsConfig\.checks"):
        OperationsPlugin(config)


def test_settings_come_from_the_environment_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """OperationsPlugin() needs no argument; a wrong variable is an error of this package."""
    monkeypatch.setenv("HEALTH_CHECK_INTERVAL", "1234")
    plugin = OperationsPlugin()
    monkeypatch.setenv("HEALTH_CHECK_INTERVAL", "never")

    assert plugin.settings.health_check_interval == 1234
    with pytest.raises(ViralFXError, match="HEALTH_CHECK_INTERVAL"):
        OperationsPlugin()


def test_the_plugin_is_documented_in_the_applications_schema() -> None:
    """The operations routes are in OpenAPI under a tag of their own."""
    plugin = OperationsPlugin(OperationsConfig(settings=SETTINGS))
    schema: dict[str, Any] = Litestar([who], plugins=[plugin]).openapi_schema.to_schema()

    assert {"/who", "/health", "/health/live", "/health/{check}"} <= schema["paths"].keys()
    assert schema["paths"]["/health/live"]["get"]["tags"] == ["operations"]


def test_it_runs_under_a_plain_server(tmp_path: Path) -> None:
    """Under uvicorn alone: probes, checks, the stages at the end, and uvicorn's own signals."""
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


def status(port: int, path: str) -> int | None:
    """Return the status of an answer, or None when there is none."""
    try:
        return request(port, path).status
    except OSError:
        return None


async def test_a_token_may_have_blanks_around_it() -> None:
    """Blanks from a file or a manifest do not lock everybody out."""
    settings = Settings(management_token=Secret(" planted "))
    app = Litestar(
        plugins=[OperationsPlugin(OperationsConfig(settings=settings))], logging_config=None
    )
    async with AsyncTestClient(app) as client:
        reply = await client.get("/health/shutdown", headers={"Authorization": "Bearer planted"})

    assert reply.status_code == 200


async def test_details_that_are_no_json_are_shown_as_text() -> None:
    """A check may put anything into its details without breaking the answer."""

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
    """Answer for somebody else's metrics."""
    return "own"


async def test_metrics_of_the_applications_own_are_not_hidden() -> None:
    """It would be answered ahead of the routing; another path leaves both."""
    app = Litestar([own_metrics], plugins=[OperationsPlugin(OperationsConfig(settings=SETTINGS))])
    with pytest.raises(ExceptionGroup) as caught:
        async with app.lifespan():
            pass
    what = "metrics_path: the application answers /metrics itself"
    assert caught.group_contains(ConfigurationError, match=what)

    config = OperationsConfig(settings=SETTINGS, metrics_path="/prometheus")
    app = Litestar([own_metrics], plugins=[OperationsPlugin(config)])
    async with AsyncTestClient(app) as client:
        assert (await client.get("/metrics")).text == "own"
        assert "viralfx_ready" in (await client.get("/prometheus")).text


@pytest.mark.parametrize(
    "path",
    ["/health", "/health/own", "/health/{own:str}", "/health/loggers", "/health/loggers/own"],
)
async def test_routes_of_the_applications_own_are_not_hidden(path: str) -> None:
    """Litestar would refuse some, and some would not be reached; another path leaves both."""

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


async def test_what_is_far_below_the_path_is_the_applications() -> None:
    """Two segments that are none of ours, and WebSockets."""

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
def test_a_metrics_path_that_is_none_is_refused(path: str) -> None:
    """Not absolute, with a slash at its end, or where the health endpoints are."""
    with pytest.raises(ValueError, match="metrics_path must"):
        OperationsConfig(metrics_path=path)
