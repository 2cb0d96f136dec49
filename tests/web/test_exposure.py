"""The exposure of each route: its answer to each caller, in each environment.

Routes come from the application and its endpoints. A route without an entry in `NEEDS` fails.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import httpx
import pytest
from litestar import Litestar
from litestar.testing import AsyncTestClient

from viralfx import OperationsConfig, OperationsPlugin
from viralfx.settings import Secret, Settings
from viralfx.web.app import create_app
from viralfx.web.endpoints import OperationsEndpoints

OPEN, DETAILS, READ, OPERATE, ADMIN, SESSION = (
    "open",
    "details",
    "read",
    "operate",
    "admin",
    "session",
)
SUBMIT, READ_JOBS, CHANGE_JOBS = "submit", "read jobs", "change jobs"
DOCUMENT, EVENTS = "document", "events"
NEEDS: Mapping[tuple[str, str], str] = {
    **{("GET", f"/health{path}"): OPEN for path in ("", "/live", "/ready", "/startup")},
    **{
        ("GET", path): DETAILS
        for path in (
            "/health/detailed",
            "/health/info",
            "/health/loggers",
            "/health/loggers/{name}",
            "/health/{check}",
            "/health/database",
            "/health/redis",
            "/health/memory",
            "/health/queues",
            "/health/circuits",
            "/metrics",
        )
    },
    ("GET", "/health/tasks"): READ,
    ("GET", "/health/shutdown"): READ,
    ("PUT", "/health/loggers/{name}"): OPERATE,
    ("POST", "/health/shutdown"): ADMIN,
    # The page and its files hold no data; its session says what the caller may see.
    ("GET", "/health/ui"): OPEN,
    ("GET", "/health/ui/session"): OPEN,
    ("POST", "/health/ui/session"): SESSION,
    ("DELETE", "/health/ui/session"): OPEN,
    # A page that may not follow it gets 401, and asks for the log-in.
    ("GET", "/health/events"): EVENTS,
    **{
        (method, f"/api/v1/{path}"): (
            READ_JOBS
            if method == "GET"
            else SUBMIT
            if path in {"jobs", "jobs/batch"}
            else CHANGE_JOBS
        )
        for method, paths in {
            "GET": ("jobs", "jobs/{job_id}", "jobs/{job_id}/events", "queues", "schedules"),
            "POST": (
                "jobs",
                "jobs/batch",
                "jobs/retry",
                "jobs/cancel",
                "jobs/{job_id}/retry",
                "jobs/{job_id}/cancel",
                "jobs/{job_id}/run",
                "queues/{queue}/pause",
                "queues/{queue}/resume",
                "schedules/{task}/pause",
                "schedules/{task}/resume",
                "schedules/{task}/run",
            ),
            "DELETE": ("jobs/{job_id}",),
        }.items()
        for path in paths
    },
    **{
        ("GET", f"/api/docs{path}"): DOCUMENT
        for path in ("", "/openapi.json", "/{path}", "/page.css", "/page.js", "/rapidoc-min.js")
    },
}
NAMED = {
    "reader": "read",
    "operator": "operate",
    "owner": "admin,submit:*",
    "submitter": "submit:*",
    "watcher": "read:*",
    "dispatcher": "operate:*",
}
"""The names of TOKENS, and their rights."""
TOKENS = {
    # Production refuses words.
    name: hashlib.sha256(name.encode()).hexdigest()
    for name in ("management", "api", *NAMED)
}
CALLERS: Mapping[str, Mapping[str, str]] = {
    "none": {},
    "wrong": {"Authorization": "Bearer wrong"},
    **{name: {"Authorization": f"Bearer {secret}"} for name, secret in TOKENS.items()},
}
HAVE = {
    OPEN: {*CALLERS},
    SESSION: {*CALLERS},
    DETAILS: {"management", "reader", "operator", "owner"},
    EVENTS: {"management", "reader", "operator", "owner"},
    READ: {"management", "reader", "operator", "owner"},
    OPERATE: {"management", "operator", "owner"},
    ADMIN: {"management", "owner"},
    DOCUMENT: {*TOKENS},
    SUBMIT: {"api", "owner", "submitter"},
    READ_JOBS: {"api", "management", "reader", "operator", "owner", "watcher"},
    CHANGE_JOBS: {"api", "management", "operator", "owner", "dispatcher"},
}
"""The callers that have each right."""
BODIES = {
    "/api/v1/jobs": b'{"task": "nothing", "payload": null}',
    "/api/v1/jobs/batch": b'{"jobs": [{"task": "nothing", "payload": null}]}',
    "/api/v1/jobs/retry": b'{"task": "nothing"}',
    "/api/v1/jobs/cancel": b'{"task": "nothing"}',
}
"""Bodies that pass the validation, and change nothing."""
_IGNORED = {"HEAD", "OPTIONS"}
"""HEAD is GET, and OPTIONS lists methods."""


def settings_of(environment: str, host: str | None = None) -> Settings:
    """Return settings with both tokens."""
    return Settings(
        environment=environment,
        host=host,
        allow_memory_adapters=True,
        management_token=Secret(TOKENS["management"]),
        api_token=Secret(TOKENS["api"]),
        tokens=Secret("; ".join(f"{n} {rights} {TOKENS[n]}" for n, rights in NAMED.items())),
    )


def routes_of(app: Litestar, endpoints: OperationsEndpoints) -> Iterator[tuple[str, str]]:
    """Yield the methods and paths of the application and of its endpoints."""
    for route in app.routes:
        for method in getattr(route, "methods", ()):
            yield str(method), route.path_format or "/"
    for path in endpoints.endpoints:
        for method in ("GET", "POST", "PUT", "DELETE"):
            yield method, path


def routes_asked(app: Litestar, endpoints: OperationsEndpoints) -> list[tuple[str, str]]:
    """Return the methods and paths to ask, in a fixed order."""
    return [route for route in sorted(set(routes_of(app, endpoints))) if route[0] not in _IGNORED]


LOOPBACK, ELSEWHERE = "127.0.0.1", "192.0.2.7"


def asked_from(address: str | None, app: Litestar) -> Litestar:
    """Return the application as a client with an address finds it; None: at a Unix socket."""

    async def seen(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            scope["client"] = address and (address, 4711)
        await app(scope, receive, send)

    return cast("Litestar", seen)


async def answers(
    client: AsyncTestClient[Litestar], routes: Iterable[tuple[str, str]], caller: str
) -> dict[tuple[str, str], int]:
    """Ask each route that exists, and return the statuses."""
    found: dict[tuple[str, str], int] = {}
    for method, template in routes:
        path = template.replace("{name}", "root").replace("{check}", "nothing")
        path = path.replace("{", "").replace("}", "")
        if (method, template) == ("GET", "/health/events"):
            # Its answer has no end, and HEAD has the same rights.
            reply = await client.head(path, headers=dict(CALLERS[caller]))
        else:
            reply = await asked(client, method, path, caller)
        if reply.status_code != httpx.codes.METHOD_NOT_ALLOWED:
            found[method, template.rstrip("/") or "/"] = reply.status_code
    return found


async def asked(
    client: AsyncTestClient[Litestar], method: str, path: str, caller: str
) -> httpx.Response:
    """Send one request. Its body fits no route, so that an allowed one changes nothing."""
    headers = {**CALLERS[caller], "Content-Type": "application/json"}
    content = None if method in {"GET", "DELETE"} else BODIES.get(path, b"[]")
    return await client.request(method, path, headers=headers, content=content)


def expected(need: str, caller: str, *, closed: bool) -> int | None:
    """Return the status of a refusal; None if the caller gets an answer."""
    if caller in HAVE[need] or (need in {DETAILS, EVENTS, DOCUMENT} and not closed):
        return None
    return 403 if caller in TOKENS and need != EVENTS else 401


@pytest.mark.parametrize(
    ("environment", "host", "address", "closed"),
    [
        ("development", None, LOOPBACK, False),
        ("development", "0.0.0.0", LOOPBACK, False),  # noqa: S104 - no socket is bound
        ("development", "0.0.0.0", ELSEWHERE, True),  # noqa: S104 - no socket is bound
        ("production", None, LOOPBACK, True),
    ],
)
async def test_each_route_answers_the_callers_with_its_right(
    environment: str, host: str | None, address: str, *, closed: bool
) -> None:
    """Development and test are open to this machine, and no other; probes are open everywhere."""
    app = create_app(settings_of(environment, host))
    endpoints = app.plugins.get(OperationsPlugin).endpoints
    routes = routes_asked(app, endpoints)
    found: dict[tuple[str, str, str], int] = {}
    async with AsyncTestClient(asked_from(address, app), raise_server_exceptions=False) as client:
        for caller in CALLERS:
            endpoints.brake.release()  # wrong tokens need not wait
            client.cookies.clear()
            for (method, path), status in (await answers(client, routes, caller)).items():
                found[method, path, caller] = status

    assert set(found) ^ {(*route, caller) for route in NEEDS for caller in CALLERS} == set()
    wrong = {}
    for (method, path, caller), status in found.items():
        want = expected(NEEDS[method, path], caller, closed=closed)
        if status != want if want else status in {401, 403}:
            wrong[method, path, caller] = (status, want)
    assert wrong == {}


_OPEN_HERE = {
    "/health/detailed": 403,
    "/health/loggers": 403,
    "/metrics": 403,
    "/health/ui/data/status": 401,
    "/api/v1/jobs": 403,
    "/api/docs": 401,
}
"""Paths that are open on this machine, and the answers to others where no token is set."""
_WARNING = (
    "Caller beyond this machine refused: ENVIRONMENT=development opens details, metrics and jobs to"
    " this machine alone. Others need MANAGEMENT_TOKEN, for jobs API_TOKEN; HEALTH_DETAILS=always"
    " opens details and metrics to all, ALLOW_OPEN_API=true jobs as well"
)


async def statuses_of(
    app: Litestar, address: str | None, headers: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Ask for what is open on this machine, and return the statuses."""
    async with AsyncTestClient(asked_from(address, app)) as client:
        return {
            path: (await client.get(path, headers=dict(headers or {}))).status_code
            for path in _OPEN_HERE
        }


@pytest.mark.parametrize(
    ("settings", "address", "headers", "closed"),
    [
        (Settings(), LOOPBACK, {}, {*()}),
        (Settings(), "::1", {}, {*()}),
        (Settings(), None, {}, {*()}),
        (Settings(environment="test"), LOOPBACK, {}, {*()}),
        (Settings(), ELSEWHERE, {}, {*_OPEN_HERE}),
        (Settings(environment="test"), ELSEWHERE, {}, {*_OPEN_HERE}),
        (Settings(), LOOPBACK, {"X-Forwarded-For": LOOPBACK}, {*_OPEN_HERE}),
        (
            Settings(trusted_proxies=(ELSEWHERE,)),
            ELSEWHERE,
            {"X-Forwarded-For": LOOPBACK},
            {*_OPEN_HERE},
        ),
        (Settings(health_details="always"), ELSEWHERE, {}, {"/api/v1/jobs"}),
        (Settings(allow_open_api=True), ELSEWHERE, {}, {*()}),
    ],
)
async def test_openness_in_development_ends_at_the_machine(
    settings: Settings, address: str | None, headers: Mapping[str, str], closed: set[str]
) -> None:
    """Without any token a caller elsewhere gets none of it, unless a variable opens it."""
    found = await statuses_of(create_app(settings), address, headers)

    assert found == {path: _OPEN_HERE[path] if path in closed else 200 for path in _OPEN_HERE}


def warnings_of_access(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Return the warnings about callers; lines of requests have the same logger."""
    return [
        each
        for each in caplog.records
        if each.name == "viralfx.access" and each.levelno == logging.WARNING
    ]


@pytest.mark.parametrize("path", [*_OPEN_HERE])
async def test_one_warning_names_the_variables(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged once, whatever the first caller elsewhere asks; tokens and probes cause none."""
    app = create_app(Settings(management_token=Secret("planted")))
    async with AsyncTestClient(asked_from(ELSEWHERE, app)) as client:
        for open_or_always_closed in ("/health", "/health/ui", "/health/tasks", "/health/shutdown"):
            await client.get(open_or_always_closed)
        await client.get("/metrics", headers={"Authorization": "Bearer planted"})
        before = warnings_of_access(caplog)
        for each in (path, *_OPEN_HERE):
            await client.get(each)

    lines = warnings_of_access(caplog)
    assert before == []
    assert [each.getMessage() for each in lines] == [_WARNING]
    assert (lines[0].__dict__["client"], lines[0].__dict__["path"]) == (ELSEWHERE, path)


async def test_an_application_of_another_prefix_has_its_own_variables(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The warning names the variables as the environment has them."""
    plugin = OperationsPlugin(OperationsConfig(env_prefix="OPS_"))
    app = Litestar(plugins=[plugin], logging_config=None)
    async with AsyncTestClient(asked_from(ELSEWHERE, app)) as client:
        reply = await client.get("/health/detailed")

    assert reply.status_code == 403
    assert "OPS_ENVIRONMENT=development" in caplog.text
    assert "OPS_HEALTH_DETAILS=always" in caplog.text


SHOP = {"Authorization": "Bearer secret-of-the-shop"}
PATTERNS = Settings(
    api_token=Secret(TOKENS["api"]),
    tokens=Secret("shop submit:parcels.sh*,read:default,operate:default secret-of-the-shop"),
    task_modules=("tests.job_tasks",),
)


async def test_patterns_limit_tasks_and_queues() -> None:
    """A token submits to its tasks, and reads and changes the jobs of its queues, alone."""
    own = {"task": "parcels.ship", "payload": {"weight": 1}, "runAt": "2999-01-01T00:00:00Z"}
    foreign = {**own, "task": "parcels.echo"}
    async with AsyncTestClient(create_app(PATTERNS)) as client:

        async def ask(method: str, path: str, body: object = None) -> int:
            return (
                await client.request(method, f"/api/v1/{path}", json=body, headers=SHOP)
            ).status_code

        other = (
            await client.post("/api/v1/jobs", json=foreign, headers=dict(CALLERS["api"]))
        ).json()["id"]
        accepted = await client.post("/api/v1/jobs", json=own, headers=SHOP)
        mine = accepted.json()["id"]
        refused = await client.post("/api/v1/jobs", json=foreign, headers=SHOP)
        queues = (await client.get("/api/v1/queues", headers=SHOP)).json()
        statuses = {
            "batch": await ask("POST", "jobs/batch", {"jobs": [own, foreign]}),
            "own job": await ask("GET", f"jobs/{mine}"),
            "foreign job": await ask("GET", f"jobs/{other}"),
            "foreign events": await ask("GET", f"jobs/{other}/events"),
            "all jobs": await ask("GET", "jobs"),
            "own queue": await ask("GET", "jobs?queue=default"),
            "foreign queue": await ask("GET", "jobs?queue=analytics"),
            "schedules": await ask("GET", "schedules"),
            "pause own": await ask("POST", "queues/default/pause"),
            "pause foreign": await ask("POST", "queues/analytics/pause"),
            "resume foreign": await ask("POST", "queues/analytics/resume"),
            "cancel foreign": await ask("POST", f"jobs/{other}/cancel"),
            "delete foreign": await ask("DELETE", f"jobs/{other}"),
            "run foreign": await ask("POST", f"jobs/{other}/run"),
            "cancel all": await ask("POST", "jobs/cancel", {"task": "parcels.ship"}),
            "cancel all foreign": await ask("POST", "jobs/cancel", {"queue": "analytics"}),
            "cancel all own": await ask("POST", "jobs/cancel", {"queue": "default"}),
        }

    assert accepted.status_code == 202
    assert refused.status_code == 403
    assert refused.json()["detail"] == "This token has not the right submit:parcels.echo."
    assert [queue["name"] for queue in queues["items"]] == ["default"]
    allowed = {"own job", "own queue", "pause own", "cancel all own"}
    assert statuses == {name: 200 if name in allowed else 403 for name in statuses}


async def test_a_refusal_names_the_right() -> None:
    """At the operations endpoints the problem says which right the token lacks."""
    async with AsyncTestClient(create_app(settings_of("production"))) as client:
        reply = await client.post("/health/shutdown", headers=dict(CALLERS["operator"]))

    assert reply.status_code == 403
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.json()["detail"] == "This token has not the right admin."
