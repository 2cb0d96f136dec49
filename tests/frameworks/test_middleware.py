"""The middleware around applications of any framework, without a server."""

import asyncio
import json
import logging
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import pytest
from fastapi import APIRouter, FastAPI
from httpx import ASGITransport, AsyncClient
from litestar import Litestar, get
from litestar.response import ServerSentEvent
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from tests.servers.waiting import until
from tests.system.service import ROOT, clean_environment

from viralfx import OperationsConfig, OperationsPlugin, asgi, task
from viralfx.asgi import AnyApp, OperationsMiddleware
from viralfx.core.errors import ConfigurationError, StartupError
from viralfx.domain.health.model import Observation, Status
from viralfx.runner.applications import find_application
from viralfx.server.interface import ASGIApp, Message, Receive, Scope, Send
from viralfx.settings import Secret, Settings
from viralfx.testing import run_pending
from viralfx.web.jobs.changes import jobs_router
from viralfx.web.layer import OperationsLayer

SETTINGS = Settings(access_log=False)


def wrapped(app: AnyApp, **more: Any) -> OperationsMiddleware:
    """Return an application in the middleware."""
    return OperationsMiddleware(app, OperationsConfig(settings=SETTINGS, **more))


class Lifespan:
    """A server's side of a lifespan."""

    def __init__(self, app: ASGIApp) -> None:
        self.answers: list[Message] = []
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        scope: Scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        self._task = asyncio.ensure_future(self._run(app(scope, self._messages.get, self._answer)))

    async def _run(self, application: Awaitable[None]) -> None:
        await application

    async def _answer(self, message: Message) -> None:
        self.answers.append(message)

    async def _ask(self, step: str) -> str:
        before = len(self.answers)
        await self._messages.put({"type": f"lifespan.{step}"})
        await until(lambda: len(self.answers) > before or self._task.done())
        return self.answers[-1]["type"].removeprefix("lifespan.") if self.answers else "nothing"

    async def start(self) -> str:
        """Begin, and return the answer."""
        return await self._ask("startup")

    async def stop(self) -> str:
        """End, and return the answer."""
        answer = await self._ask("shutdown")
        await self._task
        return answer

    async def cancel(self) -> None:
        """Cancel it, as some servers do."""
        self._task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self._task

    @property
    def error(self) -> str:
        """The message of the last answer."""
        return str(self.answers[-1].get("message"))


@asynccontextmanager
async def client_of(app: ASGIApp) -> AsyncIterator[AsyncClient]:
    """Run the lifespan of an application, and yield a client."""
    lifespan = Lifespan(app)
    assert await lifespan.start() == "startup.complete"
    transport = ASGITransport(app=app, raise_app_exceptions=False)
    async with AsyncClient(transport=transport, base_url="http://test") as client:
        yield client
    assert await lifespan.stop() == "shutdown.complete"


async def respond(send: Send, text: str, status: int = 200) -> None:
    """Send a response."""
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": text.encode()})


async def raises(scope: Scope, _receive: Receive, send: Send) -> None:
    """Have no lifespan, as Django."""
    if scope["type"] != "http":
        raise ValueError("only http is served")
    await respond(send, "served")


async def returns(scope: Scope, _receive: Receive, send: Send) -> None:
    """Ignore the lifespan."""
    if scope["type"] == "http":
        await respond(send, "served")


async def leaves_early(scope: Scope, receive: Receive, send: Send) -> None:
    """Return after the first message of the lifespan, without an answer."""
    if scope["type"] == "lifespan":
        await receive()
        return
    await respond(send, "served")


class Steps:
    """An application that records the steps of its lifespan."""

    def __init__(self, **fails: str) -> None:
        self.seen: list[str] = []
        self._fails = fails
        """By step, how it fails: it raises, reports it, or hangs."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the lifespan."""
        assert scope["type"] == "lifespan"
        for step in ("startup", "shutdown"):
            message = await receive()
            assert message["type"] == f"lifespan.{step}"
            self.seen.append(step)
            if self._fails.get(step) == "raises":
                raise RuntimeError(f"planted in {step}")
            if self._fails.get(step) == "hangs":
                await asyncio.Event().wait()
            if self._fails.get(step) == "reports":
                await send({"type": f"lifespan.{step}.failed", "message": f"planted in {step}"})
                return
            await send({"type": f"lifespan.{step}.complete"})
            if self._fails.get("between") == "raises" and step == "startup":
                raise RuntimeError("planted between")

    async def stage(self, _budget: float) -> None:
        """Record that the stage of the phase that closes connections ran."""
        self.seen.append("stage")


@pytest.mark.each_python
@pytest.mark.parametrize("app", [raises, returns, leaves_early])
async def test_an_application_without_a_lifespan_gets_the_layer(app: ASGIApp) -> None:
    """Its start-up succeeds, probes answer, its routes work, and the stages run."""
    recorder = Steps()
    async with client_of(wrapped(app, close_stages={"own": recorder.stage})) as client:
        await client.get("/health/detailed?fresh=1")
        statuses = [
            (await client.get(path)).status_code
            for path in ("/health/ready", "/health/live", "/metrics", "/anything")
        ]

    assert statuses == [200] * 4
    assert recorder.seen == ["stage"]


async def test_the_application_stops_before_connections_close() -> None:
    """As under ``viralfx serve``: it starts with open resources, and ends before the stages."""
    app = Steps()
    async with client_of(wrapped(app, close_stages={"own": app.stage})):
        assert app.seen == ["startup"]

    assert app.seen == ["startup", "shutdown", "stage"]


@pytest.mark.parametrize("how", ["raises", "reports"])
async def test_a_failed_start_stays_a_failure(how: str) -> None:
    """The server learns it with the text, and the stages close what was open."""
    app = Steps(startup=how)
    lifespan = Lifespan(wrapped(app, close_stages={"own": app.stage}))

    assert await lifespan.start() == "startup.failed"
    assert "planted in startup" in lifespan.error
    assert app.seen == ["startup", "stage"]


@pytest.mark.parametrize("how", ["raises", "reports"])
async def test_a_failed_shutdown_stays_a_failure(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The remaining stages run before the server learns it."""
    app = Steps(shutdown=how)
    lifespan = Lifespan(wrapped(app, close_stages={"own": app.stage}))
    await lifespan.start()

    assert await lifespan.stop() == "shutdown.failed"
    assert app.seen == ["startup", "shutdown", "stage"]
    logged = [r for r in caplog.records if r.message == "The application's lifespan failed"]
    assert len(logged) == (how == "raises")


async def test_a_lifespan_that_ends_early_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The application goes on, and the stages run at the stop."""
    app = Steps(between="raises")
    lifespan = Lifespan(wrapped(app, close_stages={"own": app.stage}))

    assert await lifespan.start() == "startup.complete"
    assert await lifespan.stop() == "shutdown.failed"
    assert app.seen == ["startup", "stage"]
    assert "The application's lifespan failed" in caplog.messages


async def test_a_hanging_shutdown_does_not_delay_the_answer() -> None:
    """The stage of the application ends with its budget, and the next one runs."""
    app = Steps(shutdown="hangs")
    settings = Settings(shutdown_connection_timeout=0.2)
    config = OperationsConfig(settings=settings, close_stages={"own": app.stage})
    lifespan = Lifespan(OperationsMiddleware(app, config))
    await lifespan.start()

    assert await lifespan._ask("shutdown") == "shutdown.complete"
    assert app.seen == ["startup", "shutdown", "stage"]
    await lifespan.cancel()


@pytest.mark.each_python
async def test_a_cancelled_lifespan_runs_the_stages() -> None:
    """A server may cancel it instead of asking for the shutdown."""
    app = Steps()
    lifespan = Lifespan(wrapped(app, close_stages={"own": app.stage}))
    await lifespan.start()
    await lifespan.cancel()

    assert app.seen == ["startup", "stage"]


async def test_a_cancelled_start_is_undone() -> None:
    """A server may give up while a resource opens; the application can start again."""
    opening = asyncio.Event()

    class Slow:
        async def open(self) -> None:
            opening.set()
            await asyncio.Event().wait()

    app = wrapped(returns)
    app.operations.resources = (*app.operations.resources, Slow())
    lifespan = Lifespan(app)
    start = asyncio.ensure_future(lifespan.start())
    await opening.wait()

    await lifespan.cancel()
    await start
    assert app.loop is None
    async with client_of(app) as client:
        assert (await client.get("/health/live")).status_code == 200


async def test_a_stage_with_a_name_in_use_is_a_failed_start() -> None:
    """Also with a server that goes on without a lifespan after an exception."""
    app = Steps()
    lifespan = Lifespan(wrapped(app, close_stages={"application": app.stage}))

    assert await lifespan.start() == "startup.failed"
    assert "has a stage named 'application' already" in lifespan.error


async def test_an_application_can_start_again() -> None:
    """Test clients start an application several times; each time it becomes ready."""
    app = wrapped(raises)
    for _ in range(2):
        async with client_of(app) as client:
            await client.get("/health/detailed?fresh=1")
            assert (await client.get("/health/ready")).status_code == 200


async def test_one_lifespan_runs_at_a_time() -> None:
    """A second server on the same object would share its shutdown."""
    app = wrapped(raises)
    first, second = Lifespan(app), Lifespan(app)
    await first.start()

    assert await second.start() == "startup.failed"
    assert second.error == (
        "OperationsMiddleware: its lifespan runs already; give each application that runs at the"
        " same time its own middleware"
    )
    assert await first.stop() == "shutdown.complete"


async def test_a_server_without_a_lifespan_gets_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The application serves, the instance is alive and not ready, and one line says why."""
    app = wrapped(raises)
    transport = ASGITransport(app=app)
    async with AsyncClient(transport=transport, base_url="http://test") as client:
        statuses = [
            (await client.get(path)).status_code
            for path in ("/anything", "/health/live", "/health/ready")
        ]

    assert statuses == [200, 200, 503]
    line = (
        "The server runs no lifespan, so the instance does not become ready and has no ordered"
        " stop; turn the lifespan on"
    )
    assert caplog.messages.count(line) == 1


# -- routes ----------------------------------------------------------------------------------


def text(_request: Request) -> PlainTextResponse:
    """Respond."""
    return PlainTextResponse("here")


def fastapi_with_routers() -> FastAPI:
    """Return an application with a router that is included below a prefix, and a mounted one."""
    app, router, sub = FastAPI(), APIRouter(prefix="/v1"), FastAPI()
    for each, path in ((router, "/items/{item}"), (app, "/plain/{item}"), (sub, "/deep/{item}")):
        each.add_api_route(path, lambda item: item)
    app.include_router(router, prefix="/api")
    app.mount("/tenants/{tenant}", sub)
    return app


async def served_by(app: OperationsMiddleware, *paths: str) -> list[str]:
    """Return the routes in the metrics after requests for ``paths``."""
    async with client_of(app) as client:
        for path in paths:
            await client.get(path)
        metrics = (await client.get("/metrics")).text
    lines = [x for x in metrics.splitlines() if "request_duration_seconds_count" in x]
    return sorted(line.partition('http_route="')[2].partition('"')[0] for line in lines)


@pytest.mark.each_python
@pytest.mark.parametrize(
    ("app", "paths", "routes"),
    [
        (
            wrapped(fastapi_with_routers()),
            ("/api/v1/items/1", "/plain/1", "/tenants/hostile/deep/1", "/nothing"),
            ["/api/v1/items/{item}", "/deep/{item}", "/plain/{item}", "unmatched"],
        ),
        (
            wrapped(Starlette(routes=[Mount("/m", routes=[Route("/{x}", text)])])),
            ("/m/hostile", "/nothing"),
            ["/{x}", "unmatched"],
        ),
        ("plain_app", ("/items/hostile", "/nothing"), ["/items/{id}", "unmatched"]),
        ("django_app", ("/items/hostile", "/nothing"), ["/items/<str:item>", "unmatched"]),
        ("quart_app", ("/items/hostile", "/nothing"), ["/items/<item>", "unmatched"]),
    ],
    ids=["FastAPI", "Starlette", "plain ASGI", "Django", "Quart"],
)
async def test_metrics_have_the_routes_template(
    app: OperationsMiddleware | str, paths: tuple[str, ...], routes: list[str]
) -> None:
    """Never the path, which clients choose."""
    # Each process of a run collects this file, and one of them needs the frameworks.
    made = import_module(f"tests.frameworks.{app}").app if isinstance(app, str) else app

    assert await served_by(made, *paths) == routes


# -- conflicts -------------------------------------------------------------------------------


def fastapi_with(*paths: str, prefix: str = "") -> FastAPI:
    """Return an application with routes."""
    app, router = FastAPI(), APIRouter()
    for path in paths:
        router.add_api_route(path, lambda: "mine")
    app.include_router(router, prefix=prefix)
    return app


@pytest.mark.parametrize(
    ("app", "problem"),
    [
        (fastapi_with("/health"), "OperationsConfig.path: the application answers /health itself"),
        (fastapi_with("/ready", prefix="/health"), "the application answers /health/ready itself"),
        (
            Starlette(routes=[Route("/metrics", text)]),
            "OperationsConfig.metrics_path: the application answers /metrics itself",
        ),
    ],
    ids=["health", "router", "metrics"],
)
async def test_an_own_route_at_a_path_of_the_layer_is_an_error(app: ASGIApp, problem: str) -> None:
    """The gate would hide it. Another path solves it."""
    lifespan = Lifespan(wrapped(app))

    assert await lifespan.start() == "startup.failed"
    assert problem in lifespan.error
    assert "choose another path" in lifespan.error
    async with client_of(wrapped(app, path="/ops", metrics_path="/ops-metrics")) as client:
        assert (await client.get("/ops/live")).status_code == 200


@pytest.mark.parametrize(
    "app",
    [
        fastapi_with("/{page}", "/health/{page}"),
        Starlette(routes=[Mount("/", app=raises)]),
    ],
)
async def test_a_route_for_any_path_is_no_conflict(app: ASGIApp) -> None:
    """It keeps the paths that the layer does not have."""
    async with client_of(wrapped(app)) as client:
        assert (await client.get("/health/live")).json()["alive"] is True
        assert (await client.get("/other")).status_code == 200


def test_two_layers_around_one_application_are_an_error() -> None:
    """Also a plugin inside a middleware."""
    plugin = OperationsPlugin(OperationsConfig(settings=SETTINGS))
    for app in (wrapped(raises), Litestar(plugins=[plugin], logging_config=None)):
        with pytest.raises(ConfigurationError, match="has an operations layer already"):
            wrapped(app)


async def test_a_second_layer_further_inside_is_a_failed_start() -> None:
    """Starlette creates its middleware when it starts."""
    app = Starlette()
    app.add_middleware(OperationsMiddleware, config=OperationsConfig(settings=SETTINGS))
    lifespan = Lifespan(wrapped(app))

    assert await lifespan.start() == "startup.failed"
    assert "has an operations layer already" in lifespan.error


async def test_a_plugin_further_inside_is_a_failed_start() -> None:
    """Its checks would run, and no probe would show them; it starts in the middleware's place."""

    def shop() -> bool:
        return True

    config = OperationsConfig(settings=SETTINGS, checks={"shop": shop})
    inner = cast("ASGIApp", Litestar(plugins=[OperationsPlugin(config)], logging_config=None))

    async def around(scope: Scope, receive: Receive, send: Send) -> None:
        await inner(scope, receive, send)

    outer = Lifespan(wrapped(around))

    assert await outer.start() == "startup.failed"
    assert "the application has an operations layer already" in outer.error
    async with client_of(around) as client:
        assert (await client.get("/health/shop")).json()["name"] == "shop"


@pytest.mark.each_python
async def test_it_works_as_middleware_of_starlette() -> None:
    """Without another one around the application."""
    app = Starlette(routes=[Route("/own", text)])
    app.add_middleware(OperationsMiddleware, config=OperationsConfig(settings=SETTINGS))
    async with client_of(app) as client:
        statuses = [(await client.get(path)).status_code for path in ("/health/live", "/own")]

    assert statuses == [200, 200]


def test_two_plugins_in_one_application_are_an_error() -> None:
    """Both would answer the same probes."""
    plugins = [OperationsPlugin(OperationsConfig(settings=SETTINGS)) for _ in range(2)]

    with pytest.raises(ConfigurationError, match="the application has two"):
        Litestar(plugins=plugins, logging_config=None)


def test_the_application_inside_is_not_served_without_its_middleware() -> None:
    """Its routes would submit jobs to a layer that never starts."""
    with pytest.raises(ConfigurationError, match="plain_app:plain is inside an OperationsMid"):
        find_application(SETTINGS, "tests.frameworks.plain_app:plain")


@pytest.mark.parametrize("name", ["bare", "make_bare"])
async def test_any_application_is_found_for_serve(name: str) -> None:
    """The application itself, and the function that makes it."""
    app, layer = find_application(SETTINGS, f"tests.frameworks.test_middleware:{name}")

    assert isinstance(layer, OperationsMiddleware)
    async with client_of(app) as client:
        statuses = [(await client.get(path)).status_code for path in ("/health/live", "/own")]
    assert statuses == [200, 200]


def make_bare() -> Starlette:
    """Return an application without the middleware."""
    return Starlette(routes=[Route("/own", text)])


bare = make_bare()


async def test_another_message_of_a_lifespan_reaches_the_server() -> None:
    """The middleware does not take it for the end of the shutdown."""

    async def odd(_scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.odd"})

    lifespan = Lifespan(wrapped(odd))
    await lifespan.start()
    await until(lambda: len(lifespan.answers) == 2)

    assert [each["type"] for each in lifespan.answers] == [
        "lifespan.odd",
        "lifespan.startup.complete",
    ]
    assert await lifespan.stop() == "shutdown.complete"


@pytest.mark.each_python
@pytest.mark.parametrize("inside", [FastAPI, lambda: returns], ids=["FastAPI", "plain ASGI"])
async def test_the_jobs_api_beside_any_application(inside: Callable[[], AnyApp]) -> None:
    """Its jobs run, its routes are in the metrics, and all other paths are the application's."""
    app = wrapped(inside(), jobs_api=True, tasks=[double])
    body = {"task": "frameworks.double", "payload": 21}
    async with client_of(app) as client:
        accepted = await client.post("/api/v1/jobs", json=body)
        link = accepted.json()["links"]["self"]
        await app.jobs.wait(accepted.json()["id"])
        job, head = await client.get(link), await client.head(link)
        wrong = await client.post("/api/v1/jobs", json={**body, "task": "no.such"})
        missing = await client.get("/api/v1/jobs/nothing/at/all")
        own = [await client.get(path) for path in ("/api/v1/items", "/api/v1/jobsites", "/api/v1")]
        metrics = (await client.get("/metrics")).text

    assert (accepted.status_code, job.status_code, head.status_code) == (202, 200, 200)
    assert (job.json()["state"], job.json()["result"]) == ("completed", 42)
    for response, status in ((wrong, 422), (missing, 404)):
        assert response.status_code == status
        assert response.headers["content-type"] == "application/problem+json"
        assert "x-correlation-id" in response.headers
    answers = {(each.status_code, each.text) for each in own}
    assert answers in ({(200, "served")}, {(404, '{"detail":"Not Found"}')})
    assert 'http_route="/api/v1/jobs"' in metrics
    assert 'http_route="/api/v1/jobs/{job_id}"' in metrics


def test_every_path_of_the_jobs_api_leads_to_it() -> None:
    """Paths beside them are the application's."""
    layer = OperationsLayer(OperationsConfig(settings=Settings()))
    served = Litestar([jobs_router(layer)], logging_config=None, openapi_config=None).routes
    paths = {route.path for route in served}

    assert {"/".join(path.split("/")[:4]) for path in paths} == set(asgi._JOBS_API)
    assert len(paths) > 10


async def test_the_jobs_api_has_its_token() -> None:
    """The application of another framework gets no second way in."""
    settings = Settings(access_log=False, api_token=Secret("planted"))
    app = OperationsMiddleware(FastAPI(), OperationsConfig(settings=settings, jobs_api=True))
    async with client_of(app) as client:
        statuses = [
            (await client.get("/api/v1/jobs", headers={"Authorization": token})).status_code
            for token in ("", "Bearer wrong", "Bearer planted")
        ]

    assert statuses == [401, 401, 200]


async def test_the_jobs_api_serves_again_after_a_start() -> None:
    """Each lifespan has services of its own."""
    app = wrapped(returns, jobs_api=True, tasks=[double])
    for _ in range(2):
        async with client_of(app) as client:
            listed = (await client.get("/api/v1/jobs")).json()["items"]
            body = {"task": "frameworks.double", "payload": 1}
            assert (listed, (await client.post("/api/v1/jobs", json=body)).status_code) == ([], 202)


async def test_without_the_option_the_paths_are_the_applications() -> None:
    """No application gets an open API unasked."""
    async with client_of(wrapped(returns)) as client:
        assert (await client.get("/api/v1/jobs")).text == "served"


def mounted(path: str, *routes: BaseRoute) -> Starlette:
    """Return an application with mounted routes."""
    return Starlette(routes=[Mount(path, routes=routes)])


@pytest.mark.each_python
@pytest.mark.parametrize(
    ("app", "path"),
    [
        (fastapi_with("/api/v1/jobs"), "/api/v1/jobs"),
        (fastapi_with("/api/v1/jobs/{job}/label"), "/api/v1/jobs/{job}/label"),
        (fastapi_with("/today", prefix="/api/v1/schedules"), "/api/v1/schedules/today"),
        (Starlette(routes=[Route("/api/v1/queues/", text)]), "/api/v1/queues/"),
        (mounted("/api", Route("/v1/queues/{name}/size", text)), "/api/v1/queues/{name}/size"),
        (mounted("/api/v1/jobs/own", Route("/a", text), Route("/b", text)), "/api/v1/jobs/own"),
        (Starlette(routes=[Mount("/api/v1/jobs/files", app=raises)]), "/api/v1/jobs/files"),
    ],
    ids=["exact", "below", "included", "slash", "in a mount", "mount", "application"],
)
async def test_an_own_route_at_a_path_of_the_jobs_api_is_an_error(app: ASGIApp, path: str) -> None:
    """The jobs API would hide it, also below its paths."""
    lifespan = Lifespan(wrapped(app, jobs_api=True))

    assert await lifespan.start() == "startup.failed"
    line = f"OperationsConfig.jobs_api: the application answers {path} itself; move that route"
    assert lifespan.error == f"{line}, or leave the option out"


@pytest.mark.parametrize(
    "app",
    [
        fastapi_with("/{page:path}", "/api/v1/{kind}/{item}", "/api/v1/jobsites/{site}"),
        mounted("/api/v1/jobs", WebSocketRoute("/live", text)),
        Starlette(routes=[WebSocketRoute("/api/v1/jobs/{job}/live", text)]),
        mounted("/{tenant}", Route("/api/v1/jobs/1", text)),
    ],
    ids=["any", "mounted WebSocket", "WebSocket", "mount"],
)
async def test_a_route_that_is_not_hidden_by_the_jobs_api_is_no_conflict(app: ASGIApp) -> None:
    """It takes other paths, or it is for WebSockets, which the jobs API does not have."""
    async with client_of(wrapped(app, jobs_api=True)) as client:
        assert (await client.get("/api/v1/jobs")).json()["items"] == []


@pytest.mark.parametrize("app", [None, "package.module:app", OperationsConfig()])
def test_another_object_is_no_application(app: Any) -> None:
    """The message names the argument."""
    with pytest.raises(TypeError, match="takes an ASGI application first"):
        OperationsMiddleware(app)


# -- the rest of the layer -------------------------------------------------------------------


@task("frameworks.double")
async def double(number: int) -> int:
    """Double a number."""
    return 2 * number


class Shop:
    """A check of the application."""

    async def check(self) -> Observation:
        """Pass."""
        return Observation(status=Status.PASS, message="open")


async def test_it_has_the_clients_of_the_plugin() -> None:
    """Jobs and cache work in memory; the others name the missing setting."""
    app = wrapped(raises, checks={"shop": Shop()}, tasks=[double])
    await app.jobs.submit(double, 21)
    jobs = await run_pending(app)

    assert [job.result for job in jobs] == [42]
    assert await app.cache.get_or_load("key", 60.0, loader) == b"loaded"
    for name, variable in (("database", "DATABASE_URL"), ("redis", "REDIS_HOST")):
        with pytest.raises(ConfigurationError, match=variable):
            getattr(app, name)


async def loader() -> bytes:
    """Return a value for the cache."""
    return b"loaded"


async def test_a_resource_that_cannot_open_is_a_failed_start() -> None:
    """The text is one line for people."""

    class Broken:
        async def open(self) -> None:
            raise StartupError("DATABASE_URL: no server answers")

    app = wrapped(raises)
    app.operations.resources = (Broken(),)
    lifespan = Lifespan(app)

    assert await lifespan.start() == "startup.failed"
    assert lifespan.error == "DATABASE_URL: no server answers"


async def test_signals_and_logging_stay_those_of_the_application() -> None:
    """The middleware changes neither."""

    def state() -> object:
        root = logging.getLogger()
        handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
        return handlers, root.level, list(root.handlers), sys.excepthook

    before = state()
    async with client_of(wrapped(raises)):
        during = state()

    assert before == during == state()


class Reader:
    """A client of an event stream that leaves when it gets the event of the shutdown."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.left = asyncio.Event()
        self._complete = asyncio.Event()

    async def send(self, message: Message) -> None:
        """Take a message of the response."""
        self.bodies.append(message.get("body", b""))
        if b"event: shutdown" in self.bodies[-1]:
            self.left.set()
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._complete.set()

    async def receive(self) -> Message:
        """Have nothing to send, and disconnect after the response, as a server says it."""
        await self._complete.wait()
        return {"type": "http.disconnect"}

    async def read_until_stopped(self, app: ASGIApp) -> None:
        """Read the stream of an application while its lifespan ends."""
        lifespan = Lifespan(app)
        assert await lifespan.start() == "startup.complete"
        scope: Scope = {"type": "http", "method": "GET", "path": "/", "raw_path": b"/"}
        scope.update(root_path="", http_version="1.1", headers=[], query_string=b"")
        request = asyncio.ensure_future(_call(app, scope, self.receive, self.send))
        await until(lambda: any(b"data: 1" in body for body in self.bodies))
        assert await lifespan.stop() == "shutdown.complete"
        await request


def stages_of(layer: OperationsLayer) -> dict[str, list[str]]:
    """Return the stages of each phase in order, without that which ends the application."""
    phases = layer.operations.shutdown.report().phases
    return {str(p.phase): [n for n in p.planned if n != "application"] for p in phases}


@pytest.mark.each_python
async def test_streams_get_the_event_shutdown_at_the_end_of_the_lifespan() -> None:
    """The drain waits for them, as for other requests. Litestar's plugin has these stages, too."""
    reader, other = Reader(), Reader()

    async def stream(scope: Scope, _receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        await reader.left.wait()

    @get("/")
    async def events() -> ServerSentEvent:
        async def more() -> AsyncIterator[str]:
            yield "1"
            await other.left.wait()

        return ServerSentEvent(more())

    app = wrapped(stream)
    plugin = OperationsPlugin(OperationsConfig(settings=SETTINGS))
    await reader.read_until_stopped(app)
    litestar = Litestar([events], plugins=[plugin], logging_config=None)
    await other.read_until_stopped(cast("ASGIApp", litestar))

    assert reader.bodies[-1] == b"event: shutdown\ndata: {}\n\n"
    assert reader.bodies[-1] in other.bodies
    assert stages_of(app) == stages_of(plugin)
    assert (stages_of(plugin)["stop accepting"], stages_of(plugin)["drain"][-1]) == ([], "requests")


def shown_by_traced_app(*arguments: str) -> Any:
    """Return what a process with a tracer provider of its own prints at the end."""
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.frameworks.traced_app", *arguments],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=80,
    )
    assert shown.returncode == 0, shown.stderr
    return json.loads(shown.stdout.splitlines()[-1])


@pytest.mark.parametrize("during", ["lifespan", "startup"])
def test_a_provider_that_the_application_sets_while_it_starts(during: str) -> None:
    """The application makes the spans of its requests, and the layer those of the jobs API."""
    in_jobs_api = {"lifespan": [0, 1], "startup": [1, 0]}  # Litestar's plugin traces it, too
    found = shown_by_traced_app(during)

    assert found == {"/": [1, 0], "/api/v1/jobs": in_jobs_api[during]}


def test_the_trace_of_an_application_has_the_generated_correlation_id() -> None:
    """Also if FastAPI makes the span. An id or a trace of the client stays."""
    first, second, named, continued, malformed = shown_by_traced_app("ids")

    for correlation_id, trace in (first, second, continued, malformed):
        assert correlation_id == trace
    assert len({trace for _, trace in (first, second, named, continued, malformed)}) == 5
    assert named[0] == "order-17"
    assert continued[1] == "a" * 32


def test_an_application_that_traces_itself_has_one_span_for_each_request() -> None:
    """So has one that does not, and the jobs API beside both. Access lines have the trace."""
    found = shown_by_traced_app()
    kinds = ("bare", "native", "fastapi", "instrumented", "starlette", "asgi", "quart")
    kinds_of_jobs = ("jobs beside bare", "jobs beside native")
    assert found == {
        "without a provider": 1,
        **{kind: [1, True] for kind in (*kinds, *kinds_of_jobs)},
        # Its middleware is inside: the response leaves after the end of the span.
        "of_django": [1, False],
    }


async def iterates(scope: Scope, _receive: Receive, send: Send) -> None:
    """Send the headers as an iterator, as Sanic does."""
    if scope["type"] == "http":
        pairs = [(b"content-type", b"text/plain"), (b"content-length", b"6")]
        await send({"type": "http.response.start", "status": 200, "headers": iter(pairs)})
        await send({"type": "http.response.body", "body": b"served"})


async def test_headers_may_be_an_iterator() -> None:
    """An application's headers reach the client in whichever iterable they are."""
    app = wrapped(iterates)
    async with client_of(app) as client:
        for stopping in (False, True):
            app.current_gate.requests.stopping = stopping
            response = await client.get("/")
            assert response.headers["content-type"] == "text/plain"
            assert response.headers["content-length"] == "6"
            assert "x-correlation-id" in response.headers


async def test_a_file_that_the_server_sends_is_a_complete_response(tmp_path: Path) -> None:
    """The metrics count no cut response where a server sends the file itself, as granian does."""
    (tmp_path / "page.txt").write_text("served")
    app = wrapped(Starlette(routes=[Mount("/", StaticFiles(directory=tmp_path))]))
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async with client_of(app) as client:
        extensions: Scope = {"http.response.pathsend": {}}
        scope: Scope = {"type": "http", "method": "GET", "path": "/page.txt", "root_path": ""}
        scope.update(headers=[], query_string=b"", extensions=extensions)
        await app(scope, asyncio.Queue[Message]().get, send)
        lines = (await client.get("/metrics")).text.splitlines()
    assert [each["type"] for each in sent] == ["http.response.start", "http.response.pathsend"]
    assert "viralfx_requests_cut_total 0.0" in lines


async def _call(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


async def test_an_error_has_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """Frameworks respond with 500 and raise it, too; a client that left is no error."""

    def route(error: Exception) -> Callable[[Request], PlainTextResponse]:
        def fail(_request: Request) -> PlainTextResponse:
            raise error

        return fail

    routes = [
        Route("/broken", route(RuntimeError("planted"))),
        Route("/left", route(ClientDisconnect())),
    ]
    async with client_of(wrapped(Starlette(routes=routes))) as client:
        statuses = [(await client.get(path)).status_code for path in ("/broken", "/left")]

    assert statuses == [500, 500]
    failed = [r for r in caplog.records if r.message.startswith("Request failed")]
    assert [r.exc_info[1].args for r in failed if r.exc_info and r.exc_info[1]] == [("planted",)]


WITHOUT_LITESTAR = """
import sys
sys.modules.update(dict.fromkeys(("litestar", "structlog", "uvicorn", "asyncpg", "redis"), None))
from tests.frameworks.fastapi_app import app
assert type(app).__name__ == "OperationsMiddleware", app
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_it_needs_no_litestar() -> None:
    """The middleware works where no extra is installed."""
    shown = subprocess.run(
        [sys.executable, "-c", WITHOUT_LITESTAR],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (shown.returncode, shown.stderr) == (0, "")
    assert "fastapi" in shown.stdout.split()
