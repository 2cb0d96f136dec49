"""Callers with names: those that an application names, and sessions of named tokens."""

import base64
import importlib
import logging
from collections.abc import Mapping

import pytest
from litestar import Litestar
from litestar.testing import AsyncTestClient
from tests.web.console_site import OWN, SESSION, TOKEN, Site, acted, audited

from viralfx import OperationsConfig, OperationsPlugin, Principal, Right
from viralfx.core.errors import ConfigurationError
from viralfx.settings import Secret, Settings

NAMES = ("reader", "operator", "owner", "shop")
TOKENS = Settings(
    management_token=Secret(TOKEN),
    tokens=Secret(
        "reader read secret-of-reader; operator operate secret-of-operator;"
        " owner admin secret-of-owner; shop submit:* secret-of-shop"
    ),
    health_details="authorized",
)
PAUSE = "ui/data/queues/default/pause"


def named(headers: Mapping[str, str]) -> Principal | None:
    """Return the caller that the header `x-caller` describes; `fail` is an exception."""
    name, _, right = headers.get("x-caller", "").partition(":")
    if name == "fail":
        raise OSError("planted")
    return Principal(name=name, right=Right[right]) if name else None


async def session_of(site: Site, name: str) -> dict[str, str]:
    """Log in with the token of a name, and return the headers of the session."""
    token = f"secret-of-{name}"
    answer = await site.ask(SESSION, "POST", headers=OWN, body={"token": token})
    assert answer.status == 204, answer.body
    return {**OWN, "cookie": answer.header("set-cookie").split(";")[0]}


async def outcomes(site: Site, headers: Mapping[str, str]) -> dict[str, int]:
    """Return the statuses of two views and two actions."""
    return {
        "jobs": (await site.ask("ui/data/jobs", headers=headers)).status,
        "settings": (await site.ask("ui/data/settings", headers=headers)).status,
        "pause": (await site.ask(PAUSE, "POST", headers=headers, body={})).status,
        "doctor": (
            await site.ask("ui/data/settings/doctor/run", "POST", headers=headers, body=[])
        ).status,
    }


EXPECTED = {
    "reader": {"jobs": 200, "settings": 403, "pause": 403, "doctor": 403},
    "operator": {"jobs": 200, "settings": 403, "pause": 200, "doctor": 403},
    # The body is wrong, so that the doctor does not run.
    "owner": {"jobs": 200, "settings": 200, "pause": 200, "doctor": 400},
}


@pytest.mark.parametrize("name", EXPECTED)
async def test_a_session_has_the_rights_of_its_token(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The page learns them, and the audit trail has the name of the token."""
    site = Site(TOKENS)
    headers = await session_of(site, name)
    state = (await site.ask(SESSION, headers=headers)).json()
    right = {"reader": "read", "operator": "operate", "owner": "admin"}[name]

    assert (state["loggedIn"], state["name"], state["right"]) == (True, name, right)
    assert state["reads"] == ("settings" if name == "owner" else "all")
    assert await outcomes(site, headers) == EXPECTED[name]
    begun = [each for each in audited(caplog) if each["action"] == "session.begin"]
    assert [each["actor"].partition(" ")[0] for each in begun] == [f"{name},"]
    assert {each["actor"] for each in audited(caplog)} == {begun[0]["actor"]}
    refused = any(each["outcome"] == "refused" for each in audited(caplog))
    assert refused == (name != "owner")


async def test_a_token_without_the_right_to_read_does_not_log_in(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is no wrong token, so it does not wait."""
    site = Site(TOKENS)
    answer = await site.ask(SESSION, "POST", headers=OWN, body={"token": "secret-of-shop"})

    assert (answer.status, answer.json()["code"]) == (403, "right")
    assert site.plugin.endpoints.brake.addresses == 0
    assert [(each["actor"], each["action"]) for each in audited(caplog)] == [
        ("shop", "session.begin")
    ]


async def test_the_application_names_the_callers(caplog: pytest.LogCaptureFixture) -> None:
    """At the operations endpoints and in the console, by headers and without a session."""
    site = Site(Settings(environment="production", allow_memory_adapters=True), authorize=named)
    found = {}
    for right in ("none", "READ", "OPERATE", "ADMIN"):
        headers = {**OWN, "x-caller": "" if right == "none" else f"ann:{right}"}
        found[right] = [
            (await site.ask(path, headers=headers)).status for path in ("info", "tasks")
        ]
        found[right] += (await outcomes(site, headers)).values()
    state = (await site.ask(SESSION, headers={"x-caller": "ann:OPERATE"})).json()
    foreign = {**OWN, "origin": "http://evil.test", "x-caller": "ann:ADMIN"}

    assert found == {
        "none": [401, 401, 401, 401, 401, 401],
        "READ": [200, 200, 200, 403, 403, 403],
        "OPERATE": [200, 200, 200, 403, 200, 403],
        "ADMIN": [200, 200, 200, 200, 200, 400],
    }
    assert {key: state[key] for key in ("loggedIn", "login", "name", "right")} == {
        "loggedIn": False,
        "login": False,
        "name": "ann",
        "right": "operate",
    }
    assert {each[0] for each in acted(caplog)} == {"ann"}
    assert (await site.ask(PAUSE, "POST", headers=foreign, body={})).status == 401


@pytest.mark.parametrize("origin", ["http://evil.test", "null", "http://console.test:81"])
async def test_a_page_of_another_origin_has_no_caller(origin: str) -> None:
    """A gateway names the user of each request of a browser, also of a foreign page's form."""
    site = Site(Settings(), authorize=named)
    headers = {"x-caller": "ann:ADMIN", "origin": origin}
    for path, method in (("shutdown", "POST"), ("loggers/root", "PUT"), ("tasks", "GET")):
        assert (await site.ask(path, method, headers=headers, body={})).status == 401
    app = Litestar(plugins=[OperationsPlugin(OperationsConfig(authorize=named, jobs_api=True))])
    async with AsyncTestClient(app, base_url="http://console.test") as client:
        sent = await client.post("/api/v1/queues/default/pause", headers=headers)
        assert sent.status_code == 401
        own = {**headers, "origin": "http://console.test"}
        assert (await client.post("/api/v1/queues/default/pause", headers=own)).status_code == 200


@pytest.mark.parametrize(
    ("caller", "reason"),
    [
        ("fail:READ", "OSError: planted"),
        ("ann:WRITE", "KeyError: 'WRITE'"),
        ("API:ADMIN", "the name api of a caller is reserved"),
        ("management:READ", "the name management of a caller is reserved"),
        ("an\x1bn:ADMIN", "printable characters"),
        ("a" * 129 + ":ADMIN", "printable characters"),
    ],
)
async def test_a_failing_function_names_no_caller(
    caller: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller is anonymous, and the log has one error a minute."""
    site = Site(Settings(health_details="authorized"), authorize=named)
    for _ in range(3):
        assert (await site.ask("detailed", headers={"x-caller": caller})).status == 401
    (line,) = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert reason in (line.exc_text or "")


async def test_a_token_comes_before_the_function_of_the_application() -> None:
    """A session, too."""
    site = Site(TOKENS, authorize=lambda _: Principal(name="ann", right=Right.ADMIN))
    bearer = {"authorization": "Bearer secret-of-reader", "host": "console.test"}
    session = await session_of(site, "reader")

    assert (await site.ask("shutdown", "POST", headers=bearer)).status == 403
    assert (await site.ask(PAUSE, "POST", headers=session, body={})).status == 403
    assert (await site.ask(PAUSE, "POST", headers=OWN, body={})).status == 200


async def test_values_of_one_header_are_joined() -> None:
    """A header that the client adds does not take the place of the proxy's."""
    seen: list[Mapping[str, str]] = []

    def authorize(headers: Mapping[str, str]) -> None:
        seen.append(headers)

    policy = Site(Settings(), authorize=authorize).plugin.endpoints.access
    policy.named([(b"x-user", b"ann"), (b"host", b"h"), (b"x-user", b"root")])

    assert seen == [{"x-user": "ann, root", "host": "h"}]


def test_an_asynchronous_function_is_refused() -> None:
    """Endpoints answer without waiting."""

    async def authorize(_: Mapping[str, str]) -> Principal | None:
        return None

    with pytest.raises(TypeError, match="without async"):
        OperationsConfig(authorize=authorize)  # type: ignore[arg-type]  # the error


def test_production_needs_a_token_or_a_function() -> None:
    """The jobs API of an application in production has callers."""
    settings = Settings(environment="production", allow_memory_adapters=True)
    with pytest.raises(ConfigurationError, match="without a token"):
        OperationsPlugin(OperationsConfig(settings=settings, jobs_api=True))
    OperationsPlugin(OperationsConfig(settings=settings, jobs_api=True, authorize=named))


def example(name: str) -> Litestar:
    """Return the application of an example of the documentation."""
    app: Litestar = importlib.import_module(f"docs.examples.{name}").app
    return app


async def test_the_example_of_a_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    """The groups of oauth2-proxy decide; headers without its password are nothing."""
    monkeypatch.setenv("GATEWAY_PASSWORD", "shared-by-the-gateway")
    monkeypatch.setenv("ENVIRONMENT", "production")
    async with AsyncTestClient(example("gateway")) as client:

        async def status(method: str, path: str, password: str, groups: str) -> int:
            basic = base64.b64encode(f"ann@example.com:{password}".encode()).decode()
            headers = {"Authorization": f"Basic {basic}", "X-Forwarded-Groups": groups}
            return (await client.request(method, path, headers=headers)).status_code

        right = "shared-by-the-gateway"
        assert await status("GET", "/metrics", right, "staff,tea") == 200
        assert await status("PUT", "/health/loggers/root", right, "staff") == 403
        assert await status("PUT", "/health/loggers/root", right, "operators") == 400
        assert await status("GET", "/metrics", right, "tea") == 403
        assert await status("GET", "/metrics", "guessed", "on-call") == 401
        headers = {"Authorization": "Basic not-base-64"}
        assert (await client.get("/metrics", headers=headers)).status_code == 401
        assert (await client.get("/health/live")).status_code == 200


async def test_the_example_of_a_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """One function decides for a route of the application, the endpoints and the jobs API."""
    monkeypatch.setenv("ENVIRONMENT", "production")
    monkeypatch.setenv("ALLOW_MEMORY_ADAPTERS", "true")
    async with AsyncTestClient(example("guarded")) as client:
        found = {
            key: [
                (await client.get(path, headers={"X-API-Key": key})).status_code
                for path in ("/backlog", "/metrics", "/api/v1/jobs", "/health/shutdown")
            ]
            for key in ("", "guessed", "key-of-ann")
        }
        job = {"task": "reports.build", "payload": None}
        sent = await client.post("/api/v1/jobs", json=job, headers={"X-API-Key": "key-of-ann"})
        other = await client.post(
            "/api/v1/jobs", json={**job, "task": "x"}, headers={"X-API-Key": "key-of-ann"}
        )

    assert found == {"": [401] * 4, "guessed": [401] * 4, "key-of-ann": [200] * 4}
    assert (sent.status_code, other.status_code) == (422, 403)  # no such task; not its task
