"""The events of requests: at the operations endpoints, in the console, and in the jobs API."""

import logging
from typing import Any

import pytest
from litestar import Litestar
from litestar.testing import AsyncTestClient
from tests.servers.waiting import until
from tests.web.console_site import OWN, SESSION, Site, acted, audited

from viralfx import OperationsPlugin
from viralfx.settings import Secret, Settings
from viralfx.web.app import create_app

BEARER = {"authorization": "Bearer a-token-of-operators", "host": "console.test"}
WRONG = {"authorization": "Bearer guessed"}
API = {"Authorization": "Bearer planted"}
JOBS = "/api/v1/jobs"
LATER = "2099-01-01T00:00:00Z"


def found(caplog: pytest.LogCaptureFixture) -> list[tuple[Any, ...]]:
    """Return actor, action, target and outcome of each event."""
    names = ("actor", "action", "target", "outcome")
    return [tuple(each[name] for name in names) for each in audited(caplog)]


async def test_a_raised_level_hides_neither_itself_nor_the_stop(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each has actor and address; the level has the value before and after."""
    site = Site()
    site.plugin.operations.staged = True
    root = logging.getLogger()
    before = root.level
    caplog.set_level(logging.INFO)
    try:
        raised = await site.ask("loggers/root", "PUT", headers=BEARER, body={"level": "error"})
        stopped = [await site.ask("shutdown", "POST", headers=BEARER) for _ in range(2)]
    finally:
        root.setLevel(before)
    own = site.plugin.operations.instance

    assert (raised.status, [each.status for each in stopped]) == (200, [202, 200])
    assert found(caplog) == [
        ("management", "logger.level", "root", "done"),
        ("management", "process.stop", own, "done"),
        ("management", "process.stop", own, "done"),
    ]
    (level, first, second) = audited(caplog)
    assert (level["before"], level["after"], level["address"]) == ("log", "error", "127.0.0.1")
    assert ("detail" in first, second["detail"]) == (False, "it had begun")


async def test_a_refused_level_and_stop_are_events(caplog: pytest.LogCaptureFixture) -> None:
    """The level of the trail itself, and a stop that the server handles."""
    site = Site()
    await site.ask("loggers/audit", "PUT", headers=BEARER, body={"level": "error"})
    await site.ask("shutdown", "POST", headers=BEARER)

    assert [(each[1], each[3]) for each in found(caplog)] == [
        ("logger.level", "refused"),
        ("process.stop", "refused"),
    ]


async def test_a_session_has_a_beginning_and_an_end(caplog: pytest.LogCaptureFixture) -> None:
    """Both with the digits that its actions have; a log-out without a session is no event."""
    site = Site()
    headers = await site.log_in()
    await site.ask("ui/data/status/checks/run", "POST", headers=headers, body={})
    await site.ask(SESSION, "DELETE", headers=headers)
    await site.ask(SESSION, "DELETE", headers=OWN)
    actors = {each[0] for each in found(caplog)}

    assert [each[1] for each in found(caplog)] == ["session.begin", "checks.run", "session.end"]
    assert actors == {f"console {acted(caplog)[0][0]}"}
    assert len(actors) == 1


async def test_a_wrong_token_is_an_event_and_a_reader_without_one_is_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Guesses are one event a minute; the event has no part of the token."""
    site = Site(
        Settings(management_token=Secret("a-token-of-operators"), health_details="authorized")
    )
    site.plugin.endpoints.brake.release()
    for _ in range(3):
        assert (await site.ask("detailed")).status == 401
        assert (await site.ask("ui/data/jobs")).status == 401
    assert found(caplog) == []
    for _ in range(20):
        assert (await site.ask("detailed", headers=WRONG)).status == 401
    assert found(caplog) == [("anonymous", "access", "GET /health/detailed", "refused")]
    assert "guessed" not in str(audited(caplog))


async def test_refusals_of_others_do_not_hide_one(caplog: pytest.LogCaptureFixture) -> None:
    """Of another caller at the same address, and of strangers at a hundred addresses."""
    site = Site(
        Settings(
            tokens=Secret("ann read a-token-of-ann;bob submit:x a-token-of-bob"),
            trusted_proxies=("127.0.0.1",),
        )
    )
    for number in range(100):
        await site.ask("shutdown", "POST", headers={"x-forwarded-for": f"192.0.2.{number}"})
    for name in ("ann", "bob", "bob"):
        headers = {"authorization": f"Bearer a-token-of-{name}", "x-forwarded-for": "192.0.2.0"}
        assert (await site.ask("shutdown", "POST", headers=headers)).status == 403

    assert [each[0] for each in found(caplog)] == [*["anonymous"] * 60, "ann", "bob"]


async def test_a_log_in_is_not_hidden_by_another_refusal(caplog: pytest.LogCaptureFixture) -> None:
    """A filter by the action finds it."""
    site = Site()
    await site.ask("shutdown", "POST", headers=OWN)
    await site.ask(SESSION, "POST", headers=OWN, body={"token": "guessed"})

    assert [each[1] for each in found(caplog)] == ["access", "session.begin"]


@pytest.mark.parametrize(
    ("path", "method", "body", "action"),
    [
        (SESSION, "POST", {"token": "guessed"}, "session.begin"),
        ("shutdown", "POST", None, "access"),
        ("ui/data/queues/default/pause", "POST", {}, "access"),
    ],
    ids=["a log-in", "a stop", "an action of the console"],
)
async def test_a_refused_change_is_an_event(
    caplog: pytest.LogCaptureFixture, path: str, method: str, body: object, action: str
) -> None:
    """Also without a token."""
    answer = await Site().ask(path, method, headers=OWN, body=body)

    assert answer.status == 401
    assert found(caplog) == [("anonymous", action, f"{method} /health/{path}", "refused")]
    assert audited(caplog)[0]["address"] == "127.0.0.1"


@pytest.mark.parametrize("token", [True, False], ids=["with a token", "open"])
async def test_changes_of_the_jobs_api_are_events(
    caplog: pytest.LogCaptureFixture, *, token: bool
) -> None:
    """Of jobs, queues and schedules; a submission and a read are none."""
    settings = Settings(
        task_modules=("tests.job_tasks",), api_token=Secret("planted") if token else None
    )
    app = create_app(settings)
    plugin = app.plugins.get(OperationsPlugin)
    plugin.assembly.jobs.disable_worker()
    async with AsyncTestClient(app, raise_server_exceptions=False) as client:
        job = await _submitted(client)
        other = await _submitted(client)
        posts = (
            *(f"{JOBS}/{job}/run", f"{JOBS}/{job}/cancel", f"{JOBS}/{job}/retry"),
            *("/api/v1/queues/default/pause", "/api/v1/queues/default/resume"),
            *("/api/v1/queues/nothing/pause", "/api/v1/schedules/default.prune/pause"),
            "/api/v1/schedules/default.prune/resume",
        )
        for path in posts:
            await client.post(path, headers=API)
        await client.post(f"{JOBS}/cancel", headers=API, json={"task": "parcels.ship"})
        await client.delete(f"{JOBS}/{other}", headers=API)
        await client.get(JOBS, headers=API)
        trail = plugin.operations.audit
        assert trail.store is not None
        await until(lambda: not trail.waiting)
        stored = await trail.store.read()

    schedule = "default.prune"
    assert [each[1:] for each in found(caplog)] == [
        ("job.run", job, "done"),
        ("job.cancel", job, "done"),
        ("job.retry", job, "refused"),
        ("queue.pause", "default", "done"),
        ("queue.resume", "default", "done"),
        ("queue.pause", "nothing", "refused"),
        ("schedule.pause", schedule, "done"),
        ("schedule.resume", schedule, "done"),
        ("jobs.cancel", "task=parcels.ship", "done"),
        ("job.cancel", other, "refused"),
    ]
    assert {each[0] for each in found(caplog)} == {"api" if token else "anonymous"}
    assert [each.action for each in reversed(stored)] == [each[1] for each in found(caplog)]
    assert {each.correlation_id for each in stored} != {None}
    assert [each.detail for each in stored if each.action == "jobs.cancel"] == ["1 job"]


async def _submitted(client: AsyncTestClient[Litestar]) -> str:
    body = {"task": "parcels.ship", "payload": {"weight": 3}, "runAt": LATER}
    reply = await client.post(JOBS, json=body, headers=API)
    assert reply.status_code == 202, reply.text
    return str(reply.json()["id"])


async def test_a_wrong_api_token_is_an_event(caplog: pytest.LogCaptureFixture) -> None:
    """The jobs API shares the limit of the other endpoints."""
    app = create_app(Settings(api_token=Secret("planted")))
    async with AsyncTestClient(app, raise_server_exceptions=False) as client:
        for _ in range(3):
            assert (await client.get(JOBS, headers=WRONG)).status_code == 401

    assert found(caplog) == [("anonymous", "access", f"GET {JOBS}", "refused")]


async def test_the_view_has_pages_and_filters() -> None:
    """Of this process without a database; a wrong query is the client's error."""
    site = Site()
    await site.plugin.operations.start()
    headers = await site.log_in()
    for verb in ("open", "close", "open"):
        path = f"ui/data/circuits/<img src=x onerror=alert(1)>/{verb}"
        await site.ask(path, "POST", headers=headers, body={})
    trail = site.plugin.operations.audit
    await until(lambda: not trail.waiting)

    async def ask(query: str = "") -> Any:
        return (await site.ask("ui/data/audit", headers=headers, query=query)).json()

    first = await ask("limit=3")
    last = await ask(f"limit=3&before={first['nextCursor']}")
    found = [each["action"] for each in (*first["items"], *last["items"])]
    assert found == ["circuit.open", "circuit.close", "circuit.open", "session.begin"]
    assert (first["kept"], last["nextCursor"], "circuit.open" in first["actions"]) == (
        "memory",
        None,
        True,
    )
    assert len((await ask("action=circuit.open&outcome=done"))["items"]) == 2
    assert (await ask("actor=other"))["items"] == []
    assert (await ask("since=2099-01-01T00:00:00Z"))["items"] == []
    for query in ("limit=0", "limit=1000", "before=x", "since=yesterday", "colour=red"):
        answer = await site.ask("ui/data/audit", headers=headers, query=query)
        assert answer.status == 400, query
    await site.plugin.operations.shutdown.run()
