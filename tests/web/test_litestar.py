"""The plugin as a part of a Litestar application: dependencies, jobs API, document, CORS."""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import pytest
from litestar import Litestar, get
from litestar.config.compression import CompressionConfig
from litestar.di import NamedDependency, Provide
from litestar.openapi import OpenAPIConfig
from litestar.params import FromPath, FromQuery
from litestar.response import ServerSentEvent
from litestar.testing import AsyncTestClient
from tests.servers.waiting import until

from viralfx import (
    Cache,
    ConfigurationError,
    JobService,
    OperationsConfig,
    OperationsPlugin,
    PostgresDatabase,
    task,
)
from viralfx.asgi import OperationsMiddleware
from viralfx.server.interface import Message, Scope
from viralfx.settings import Secret, Settings
from viralfx.web.layer import OperationsLayer


@task("greet")
async def greet(name: str) -> str:
    """Greet."""
    return f"Hello, {name}"


def application(*handlers: Any, settings: Settings | None = None, **options: Any) -> Litestar:
    """Make an application with the plugin; ``options`` are those of ``OperationsConfig``."""
    config = OperationsConfig(settings=settings or Settings(), tasks=[greet], **options)
    return Litestar(
        handlers,
        plugins=[OperationsPlugin(config)],
        logging_config=None,
        openapi_config=OpenAPIConfig(title="Shop", version="1"),
    )


def document(app: Litestar) -> Any:
    """Return the OpenAPI document of an application."""
    return app.openapi_schema.to_schema()


@get("/greet/{name:str}")
async def greeting(
    name: FromPath[str], jobs: NamedDependency[JobService], cache: NamedDependency[Cache]
) -> str:
    """Submit a job and use the cache."""

    async def load() -> bytes:
        return (await jobs.submit("greet", name)).job.id.encode()

    return (await cache.get_or_load(name, 60.0, load)).decode()


# -- dependencies ----------------------------------------------------------------------------------


async def test_handlers_get_the_clients_by_name() -> None:
    """Also in a second lifespan, which has new ones."""
    app = application(greeting)
    for _ in range(2):
        async with AsyncTestClient(app) as client:
            responses = [await client.get("/greet/Ann") for _ in range(2)]

            assert [each.status_code for each in responses] == [200, 200]
            assert responses[0].text == responses[1].text


async def test_tasks_get_the_clients_by_name() -> None:
    """As dependencies of the application."""
    seen: list[object] = []

    @task("of-clients")
    async def of_clients(payload: int, jobs: JobService, cache: Cache) -> int:
        seen.extend((jobs, cache))
        return payload

    plugin = OperationsPlugin(OperationsConfig(settings=Settings(), tasks=[of_clients]))
    async with AsyncTestClient(Litestar(plugins=[plugin], logging_config=None)):
        job = (await plugin.jobs.submit("of-clients", 1)).job
        await plugin.jobs.wait(job.id)

        assert seen == [plugin.jobs, plugin.cache]


async def test_dependencies_of_the_application_win() -> None:
    """The plugin adds and never replaces."""

    @get("/own")
    async def own(cache: NamedDependency[int]) -> int:
        return cache

    provide = Provide(lambda: 7, sync_to_thread=False)
    plugin = OperationsPlugin(OperationsConfig(settings=Settings()))
    app = Litestar([own], dependencies={"cache": provide}, plugins=[plugin], logging_config=None)
    async with AsyncTestClient(app) as client:
        assert (await client.get("/own")).text == "7"


async def test_a_client_that_is_not_configured_is_an_error_of_the_request() -> None:
    """The application starts, and other requests work."""

    @get("/rows")
    async def rows(database: NamedDependency[PostgresDatabase]) -> str:
        return type(database).__name__

    async with AsyncTestClient(application(rows)) as client:
        assert (await client.get("/rows")).status_code == 500
        assert (await client.get("/health")).status_code == 200


async def test_a_parameter_that_is_meant_for_another_thing_is_an_error() -> None:
    """It would get a client in place of the query's value."""

    @get("/page")
    async def page(cache: FromQuery[int], database: FromQuery[str] = "") -> str:
        return f"{cache}{database}"

    with pytest.raises(ConfigurationError) as raised:
        application(page)
    async with AsyncTestClient(application(page, dependencies=False)) as client:
        answer = await client.get("/page?cache=3")

    assert [each.partition(" gets")[0] for each in raised.value.problems] == [
        "page: its parameter 'cache'",
        "page: its parameter 'database'",
    ]
    assert answer.text == "3"


async def test_a_parameter_of_a_dependency_is_checked_as_that_of_a_handler() -> None:
    """Also of a dependency's dependency: each request would fail."""

    def limit(cache: FromQuery[bool]) -> int:
        return int(cache)

    def page(limit: NamedDependency[int]) -> str:
        return f"page {limit}"

    providers = {
        "limit": Provide(limit, sync_to_thread=False),
        "page": Provide(page, sync_to_thread=False),
    }

    @get("/page", dependencies=providers)
    async def show(page: NamedDependency[str], jobs: NamedDependency[JobService]) -> str:
        return page + type(jobs).__name__

    with pytest.raises(ConfigurationError) as raised:
        application(show)

    assert [each.partition(" gets")[0] for each in raised.value.problems] == [
        "show: its parameter 'cache' of its dependency 'limit'"
    ]


# -- the jobs API ----------------------------------------------------------------------------------


async def test_the_jobs_api_in_an_application() -> None:
    """It accepts jobs, and its errors are problem details; those of the application stay."""
    async with AsyncTestClient(application(jobs_api=True)) as client:
        accepted = await client.post("/api/v1/jobs", json={"task": "greet", "payload": "Ann"})
        async with asyncio.timeout(10):
            link = accepted.json()["links"]["self"]
            while (job := (await client.get(link)).json())["state"] != "completed":
                pass
        unknown = await client.post("/api/v1/jobs", json={"task": "greed", "payload": "Ann"})
        missing = await client.get("/api/v1/jobs/nothing")
        malformed = await client.get("/api/v1/jobs?zzz=1")
        foreign = await client.post(
            "/api/v1/jobs",
            json={"task": "greet", "payload": "Ann"},
            headers={"Origin": "https://elsewhere.example"},
        )
        others = await client.get("/nothing")

    assert (accepted.status_code, job["result"]) == (202, "Hello, Ann")
    found = [unknown, missing, malformed, foreign]
    assert [each.status_code for each in found] == [422, 404, 400, 403]
    assert {each.headers["content-type"] for each in found} == {"application/problem+json"}
    assert others.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("settings", "token", "status"),
    [
        (Settings(api_token=Secret("planted")), "planted", 200),
        (Settings(api_token=Secret("planted")), "wrong", 401),
        (Settings(api_token=Secret("planted")), None, 401),
        (Settings(), None, 200),
    ],
)
async def test_the_jobs_api_has_the_token_of_the_service(
    settings: Settings, token: str | None, status: int
) -> None:
    """Without one it is open, outside of production."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    async with AsyncTestClient(application(settings=settings, jobs_api=True)) as client:
        assert (await client.get("/api/v1/jobs", headers=headers)).status_code == status


SHOP = Litestar(logging_config=None)
STRONG = Secret("Qm7-wXk2_vB9.tLd4")


@pytest.mark.parametrize(
    ("settings", "variables"),
    [
        (Settings(environment="production"), ["DATABASE_URL", "API_TOKEN"]),
        (Settings(environment="production", allow_memory_adapters=True), ["API_TOKEN"]),
        (Settings(environment="production", api_token=STRONG), ["DATABASE_URL"]),
        (
            Settings(environment="production", api_token=Secret("abc"), allow_memory_adapters=True),
            ["API_TOKEN"],
        ),
    ],
)
@pytest.mark.parametrize("layer", [OperationsPlugin, partial(OperationsMiddleware, SHOP)])
@pytest.mark.parametrize("read", [False, True], ids=["given", "read"])
def test_the_jobs_api_in_production_has_the_rules_of_the_service(
    monkeypatch: pytest.MonkeyPatch,
    settings: Settings,
    variables: list[str],
    layer: Callable[[OperationsConfig], OperationsLayer],
    *,
    read: bool,
) -> None:
    """A strong token and a database, also for settings that the application passes."""
    config = OperationsConfig(settings=settings, jobs_api=True)
    if read:
        config = OperationsConfig(env_prefix="OPS_", jobs_api=True)
        monkeypatch.setenv("OPS_ENVIRONMENT", "production")
        monkeypatch.setenv("OPS_ALLOW_MEMORY_ADAPTERS", str(settings.allow_memory_adapters).lower())
        monkeypatch.setenv("OPS_API_TOKEN", settings.api_token.value if settings.api_token else "")

    with pytest.raises(ConfigurationError) as refused:
        layer(config)

    beginning = "OPS_" if read else ""
    names = [line.partition(":")[0] for line in refused.value.problems]
    assert names == [f"{beginning}{name}" for name in variables]


@pytest.mark.parametrize(
    ("settings", "variable"),
    [
        (Settings(environment="production", management_token=Secret("abc")), "MANAGEMENT_TOKEN"),
        (Settings(environment="staging", tokens=Secret("ann admin abc")), "TOKENS"),
        (Settings(environment="live", trusted_proxies=("0.0.0.0/0",)), "TRUSTED_PROXIES"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_settings_of_an_application_have_the_rules_of_production(
    settings: Settings, variable: str
) -> None:
    """A weak token begins the stop of the process, also without the jobs API."""
    with pytest.raises(ConfigurationError) as refused:
        OperationsPlugin(OperationsConfig(settings=settings))

    assert [line.partition(":")[0] for line in refused.value.problems] == [variable]


async def test_the_jobs_api_in_production_with_a_strong_token() -> None:
    """It starts, and asks for the token."""
    settings = Settings(environment="production", api_token=STRONG, allow_memory_adapters=True)
    async with AsyncTestClient(application(settings=settings, jobs_api=True)) as client:
        assert (await client.get("/api/v1/jobs")).status_code == 401


def test_the_document_of_an_application_with_the_jobs_api() -> None:
    """It has the tasks, the token, and the application's own title."""
    settings = Settings(api_token=Secret("planted"))
    whole = document(application(greeting, settings=settings, jobs_api=True))
    body = whole["paths"]["/api/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]

    assert whole["info"]["title"] == "Shop"
    assert "greet" in body["schema"]["properties"]["task"]["enum"]
    assert whole["components"]["securitySchemes"]["apiToken"]["scheme"] == "bearer"
    assert whole["paths"]["/api/v1/jobs"]["post"]["security"] == [{"apiToken": []}]
    assert "/greet/{name}" in whole["paths"]


async def test_without_the_option_there_is_no_jobs_api() -> None:
    """A path that the application did not ask for stays its own."""
    async with AsyncTestClient(application()) as client:
        assert (await client.get("/api/v1/jobs")).status_code == 404


def test_the_jobs_api_has_its_path() -> None:
    """Its links would lead elsewhere below the path of an application."""
    plugin = OperationsPlugin(OperationsConfig(settings=Settings(), jobs_api=True))
    with pytest.raises(ConfigurationError, match="the jobs API is at /api/v1"):
        Litestar(path="/shop", plugins=[plugin], logging_config=None)


# -- the document ----------------------------------------------------------------------------------


async def test_an_application_below_a_path_serves_what_its_document_lists() -> None:
    """The endpoints are at their own path, too, where probes expect them."""
    plugin = OperationsPlugin(OperationsConfig(settings=Settings(), groups={"edge": ["memory"]}))
    app = Litestar(path="/shop/", plugins=[plugin], logging_config=None)
    listed = [
        path.format(check="memory", name="root", group="edge")
        for path, item in document(app)["paths"].items()
        if "get" in item
    ]
    async with AsyncTestClient(app) as client:
        await client.get("/health/detailed?fresh=1")
        statuses = {path: (await client.get(path)).status_code for path in [*listed, "/health"]}

    assert len(listed) == 12
    assert {*statuses.values()} == {200, 403}
    refused = {path for path, status in statuses.items() if status == 403}
    assert refused == {"/shop/health/shutdown", "/shop/health/tasks"}


async def test_the_console_stays_at_its_path_below_which_its_files_are() -> None:
    """The page alone, below the path of the application, would not load."""
    plugin = OperationsPlugin(OperationsConfig(settings=Settings()))
    app = Litestar(path="/shop", plugins=[plugin], logging_config=None)
    parts = ("ui", "ui/app.js", "ui/session", "events")
    async with AsyncTestClient(app) as client:
        below = [(await client.get(f"/shop/health/{part}")).status_code for part in parts]
        own = [(await client.get(f"/health/{part}")).status_code for part in parts[:-1]]

    assert below == [404] * len(parts)
    assert own == [200] * len(own)


def test_the_endpoints_can_be_left_out_of_the_document() -> None:
    """Also those of the jobs API."""
    app = application(greeting, include_in_schema=False, jobs_api=True)

    assert list(document(app)["paths"]) == ["/greet/{name}"]


# -- pages of other origins ------------------------------------------------------------------------

PAGE = "https://status.example"


@pytest.fixture
async def reading() -> AsyncIterator[AsyncTestClient[Litestar]]:
    """Return a client of an application that a page of another origin may read."""
    settings = Settings(management_token=Secret("planted"))
    app = application(
        settings=settings, cors_origins=[PAGE, "http://localhost:5173"], groups={"edge": ["memory"]}
    )
    async with AsyncTestClient(app) as client:
        yield client


async def test_a_page_of_a_listed_origin_may_read(reading: AsyncTestClient[Litestar]) -> None:
    """It reads each endpoint, errors included; other origins do not, and caches keep them apart."""
    for path in (
        "/health",
        "/health/ready",
        "/health/detailed",
        "/health/detailed?fresh=1",
        "/health/memory",
        "/health/nothing",
        "/health/group/edge",
        "/health/loggers/root",
        "/health/shutdown",
        "/metrics",
    ):
        listed = await reading.get(path, headers={"Origin": PAGE})
        others = [
            await reading.get(path, headers={"Origin": other})
            for other in (
                "https://status.example.evil",
                "null",
                f"{PAGE}:8443",
                "http://status.example",
            )
        ]
        preflight = {"Origin": PAGE, "Access-Control-Request-Method": "GET"}
        asked = await reading.options(path, headers=preflight)

        assert listed.headers["access-control-allow-origin"] == PAGE
        assert {each.headers.get("access-control-allow-origin") for each in others} == {None}
        assert {each.headers["vary"] for each in (listed, *others)} == {"origin"}
        assert "access-control-allow-credentials" not in listed.headers
        assert asked.status_code == 204
        assert asked.headers["access-control-allow-origin"] == PAGE
        assert asked.headers["access-control-allow-methods"] == "GET, HEAD"
        assert "authorization" in asked.headers["access-control-allow-headers"]


@pytest.mark.parametrize(
    ("path", "method"), [("/health/shutdown", "POST"), ("/health/loggers/root", "PUT")]
)
async def test_a_page_of_a_listed_origin_may_change_nothing(
    reading: AsyncTestClient[Litestar], path: str, method: str
) -> None:
    """The preflight request gets no permission, and neither does the request itself."""
    preflight = {"Origin": PAGE, "Access-Control-Request-Method": method}
    asked = await reading.options(path, headers=preflight)
    changed = await reading.request(method, path, headers={"Origin": PAGE}, content=b"{}")

    for response in (asked, changed):
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("path", ["/health", "/health/detailed"])
async def test_every_origin_may_read(path: str) -> None:
    """The asterisk needs no header that tells origins apart."""
    async with AsyncTestClient(application(cors_origins=["*"])) as client:
        response = await client.get(path, headers={"Origin": "https://anywhere.example"})

    assert response.headers["access-control-allow-origin"] == "*"
    assert "vary" not in response.headers


@pytest.mark.parametrize(
    "origins", [PAGE, ["status.example"], [f"{PAGE}/"], ["https://Status.example"], ["null"], [5]]
)
def test_an_origin_in_another_form_is_a_problem(origins: Any) -> None:
    """It would match no browser."""
    with pytest.raises(ConfigurationError, match=r"OperationsConfig\.cors_origins is a list"):
        application(cors_origins=origins)


async def test_without_origins_there_are_no_such_headers() -> None:
    """The answers are the bytes that they were."""
    async with AsyncTestClient(application()) as client:
        response = await client.get("/health", headers={"Origin": PAGE})

    assert not {"vary", "access-control-allow-origin"} & set(response.headers)


# -- compressed event streams ----------------------------------------------------------------------


@pytest.mark.parametrize("encodings", [b"gzip, deflate, br", None])
async def test_an_event_stream_of_a_compressing_application_announces_the_stop(
    encodings: bytes | None,
) -> None:
    """A browser offers compression; its event stream is sent as it is."""

    @get("/events")
    async def events() -> ServerSentEvent:
        async def forever() -> AsyncIterator[str]:
            yield "first " * 200
            await asyncio.Event().wait()

        return ServerSentEvent(forever())

    plugin = OperationsPlugin(OperationsConfig(settings=Settings()))
    app = Litestar(
        [events],
        plugins=[plugin],
        compression_config=CompressionConfig(backend="gzip", minimum_size=1),
        logging_config=None,
    )
    sent: list[Message] = []

    async def receive() -> Message:
        await asyncio.Event().wait()
        return {}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"accept", b"text/event-stream")]
    if encodings is not None:
        headers.append((b"accept-encoding", encodings))
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/events",
        "raw_path": b"/events",
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    gate = plugin.gate(app)  # type: ignore[arg-type]
    gate.open = True
    stream = asyncio.create_task(gate(scope, receive, send))
    await until(lambda: any(b"first" in each.get("body", b"") for each in sent))
    gate.requests.announce_shutdown()
    await until(lambda: b"event: shutdown" in sent[-1].get("body", b""))
    stream.cancel()
    await asyncio.wait({stream})

    assert b"content-encoding" not in dict(sent[0]["headers"])
