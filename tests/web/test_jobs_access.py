"""Who may use the jobs API."""

import pytest
from litestar import Litestar
from litestar.testing import AsyncTestClient

from viralfx import OperationsPlugin
from viralfx.settings import Secret, Settings
from viralfx.web.app import create_app

JOBS = "/api/v1/jobs"
CALLS = [
    ("POST", JOBS),
    ("GET", JOBS),
    ("GET", f"{JOBS}/x"),
    ("DELETE", f"{JOBS}/x"),
    ("POST", f"{JOBS}/x/retry"),
    ("GET", f"{JOBS}/x/events"),
]
TOKEN = Settings(api_token=Secret(" planted "))


async def statuses(settings: Settings, **headers: str) -> list[tuple[int, str | None]]:
    """Make every call; return the statuses with what they challenge for."""
    async with AsyncTestClient(create_app(settings), raise_server_exceptions=False) as client:
        replies = [await client.request(method, path, headers=headers) for method, path in CALLS]
    return [(reply.status_code, reply.headers.get("www-authenticate")) for reply in replies]


@pytest.mark.parametrize(
    "authorization", [None, "planted", "Basic planted", "Bearer", "Bearer ", "Bearer plante"]
)
async def test_with_a_token_nobody_else_may(authorization: str | None) -> None:
    """401 with a challenge for each call, whatever else is wrong with it."""
    headers = {} if authorization is None else {"Authorization": authorization}

    assert await statuses(TOKEN, **headers) == [(401, "Bearer")] * len(CALLS)


@pytest.mark.parametrize("authorization", ["Bearer planted", "bearer planted", "Bearer  planted"])
async def test_who_has_the_token_may(authorization: str) -> None:
    """The calls are answered by what they ask for."""
    answered = [status for status, _ in await statuses(TOKEN, Authorization=authorization)]

    assert answered == [400, 200, 404, 404, 404, 404]


async def test_without_a_token_it_is_open_outside_of_production() -> None:
    """In production nobody may, should it ever be served without one."""
    everybody = [status for status, _ in await statuses(Settings())]
    nobody = await statuses(Settings(environment="production", allow_memory_adapters=True))

    assert everybody == [400, 200, 404, 404, 404, 404]
    assert nobody == [(403, None)] * len(CALLS)


async def test_the_token_is_not_for_operations() -> None:
    """Two tokens for two purposes: neither opens what the other guards."""
    settings = Settings(api_token=Secret("api"), management_token=Secret("management"))
    async with AsyncTestClient(create_app(settings)) as client:
        replies = [
            await client.get(path, headers={"Authorization": f"Bearer {token}"})
            for path, token in ((JOBS, "management"), ("/health/shutdown", "api"))
        ]

    assert [reply.status_code for reply in replies] == [401, 401]


async def test_an_application_of_somebody_else_has_no_jobs_api() -> None:
    """The plugin hands out the service, and adds no route for it."""
    plugin = OperationsPlugin()
    app = Litestar(plugins=[plugin], logging_config=None)
    async with AsyncTestClient(app) as client:
        reply = await client.get(JOBS)
        counts = await plugin.jobs.counts()

    assert reply.status_code == 404
    assert sorted(counts) == ["analytics", "default", "notifications"]
