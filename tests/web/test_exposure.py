"""The exposure of each route: its answer to each caller, in each environment.

Routes come from the application and its endpoints. A route without an entry in `NEEDS` fails.
"""

from collections.abc import Iterator, Mapping

import httpx
import pytest
from litestar import Litestar
from litestar.testing import AsyncTestClient

from viralfx import OperationsPlugin
from viralfx.settings import Secret, Settings
from viralfx.web.app import create_app
from viralfx.web.gate import Gate

OPEN, DETAILS, READ, OPERATE, ADMIN, SESSION = (
    "open",
    "details",
    "read",
    "operate",
    "admin",
    "session",
)
JOBS = "the jobs API"
DOCUMENT = "document"
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
    ("GET", "/health/events"): DETAILS,
    **{
        (method, f"/api/v1/{path}"): JOBS
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
MANAGEMENT, API = "management-token-of-32-characters", "api-token-of-at-least-16-characters"
CALLERS: Mapping[str, Mapping[str, str]] = {
    "none": {},
    "wrong": {"Authorization": "Bearer wrong"},
    "management": {"Authorization": f"Bearer {MANAGEMENT}"},
    "api": {"Authorization": f"Bearer {API}"},
}
_IGNORED = {"HEAD", "OPTIONS"}
"""HEAD is GET, and OPTIONS lists methods."""


def settings_of(environment: str, host: str | None = None) -> Settings:
    """Return settings with both tokens."""
    return Settings(
        environment=environment,
        host=host,
        allow_memory_adapters=True,
        management_token=Secret(MANAGEMENT),
        api_token=Secret(API),
    )


def routes_of(app: Litestar, gate: Gate) -> Iterator[tuple[str, str]]:
    """Yield the methods and paths of the application and of its endpoints."""
    for route in app.routes:
        for method in getattr(route, "methods", ()):
            yield str(method), route.path_format or "/"
    for path in gate.probes:
        for method in ("GET", "POST", "PUT", "DELETE"):
            yield method, path.decode()


async def answers(
    app: Litestar, plugin: OperationsPlugin, caller: str
) -> dict[tuple[str, str], int]:
    """Ask each route that exists, and return the statuses."""
    found: dict[tuple[str, str], int] = {}
    gate = Gate(plugin.endpoints)
    async with AsyncTestClient(app, raise_server_exceptions=False) as client:
        for method, template in sorted(set(routes_of(app, gate))):
            if method in _IGNORED:
                continue
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
    content = None if method in {"GET", "DELETE"} else b"[]"
    return await client.request(method, path, headers=headers, content=content)


def expected(need: str, caller: str, *, production: bool) -> int | None:
    """Return the status of a refusal; None if the caller gets an answer."""
    allowed = {
        OPEN: True,
        SESSION: True,
        DETAILS: not production or caller == "management",
        DOCUMENT: not production or caller in {"management", "api"},
        JOBS: caller == "api",
        READ: caller == "management",
        OPERATE: caller == "management",
        ADMIN: caller == "management",
    }[need]
    return None if allowed else 401


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize(
    ("environment", "host"),
    [
        ("development", "127.0.0.1"),
        ("development", "0.0.0.0"),  # noqa: S104 - no socket is bound
        ("staging", None),
        ("production", None),
    ],
)
async def test_each_route_answers_the_callers_with_its_right(
    environment: str, host: str | None, caller: str
) -> None:
    """Every environment but development and test is production; probes are open everywhere."""
    settings = settings_of(environment, host)
    app = create_app(settings)
    plugin = app.plugins.get(OperationsPlugin)
    found = await answers(app, plugin, caller)

    assert (set(found) - set(NEEDS), set(NEEDS) - set(found)) == (set(), set())
    production = environment in {"staging", "production"}
    wrong = {}
    for (method, path), status in found.items():
        want = expected(NEEDS[method, path], caller, production=production)
        if status != want if want else status in {401, 403}:
            wrong[method, path] = (status, want)
    assert wrong == {}
