"""Authorization of the jobs API, and the tasks that it offers."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import cache
from typing import Any, cast

import httpx
import pytest
from litestar import Litestar
from litestar.testing import AsyncTestClient
from tests.servers.waiting import until
from tests.web.console_site import audited

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
TIME = datetime(2999, 1, 1, tzinfo=UTC)
TOKEN = Settings(api_token=Secret(" planted "))


@cache
def service(settings: Settings) -> Litestar:
    """Return an application for tests that change nothing in it."""
    return create_app(settings)


async def statuses(settings: Settings, **headers: str) -> list[tuple[int, str | None]]:
    """Make every call; return the statuses and ``WWW-Authenticate`` headers."""
    async with AsyncTestClient(service(settings), raise_server_exceptions=False) as client:
        replies = [await client.request(method, path, headers=headers) for method, path in CALLS]
    return [(reply.status_code, reply.headers.get("www-authenticate")) for reply in replies]


@pytest.mark.parametrize(
    "authorization", [None, "planted", "Basic planted", "Bearer", "Bearer ", "Bearer plante"]
)
async def test_a_wrong_token_is_rejected(authorization: str | None) -> None:
    """Each call gets 401 with a challenge, before any other error."""
    headers = {} if authorization is None else {"Authorization": authorization}

    assert await statuses(TOKEN, **headers) == [(401, "Bearer")] * len(CALLS)


async def test_wrong_tokens_wait_and_the_right_one_does_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One line of the audit trail has the address; a request without a token is no guess."""
    app = create_app(TOKEN)
    endpoints = app.plugins.get(OperationsPlugin).endpoints
    async with AsyncTestClient(app):
        transport = httpx.ASGITransport(app=cast("Any", app), client=("192.0.2.7", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for _ in range(15):
                assert (await client.get(JOBS)).status_code == 401
            wrong = {"Authorization": "Bearer wrong"}
            asked = [asyncio.ensure_future(client.get(JOBS, headers=wrong)) for _ in range(11)]
            await until(lambda: endpoints.brake.waiting == 1)
            right = await client.get(JOBS, headers={"Authorization": "Bearer planted"})
            assert (right.status_code, endpoints.brake.waiting) == (200, 1)
            endpoints.brake.release()
            assert {(await each).status_code for each in asked} == {401}
        body, _ = app.plugins.get(OperationsPlugin).assembly.metrics.render("")
    assert b'viralfx_wrong_tokens_total{place="jobs"} 11.0' in body
    (event,) = audited(caplog)
    assert (event["address"], event["outcome"], event["detail"]) == ("192.0.2.7", "refused", "401")


@pytest.mark.parametrize("authorization", ["Bearer planted", "bearer planted", "Bearer  planted"])
async def test_the_token_is_accepted(authorization: str) -> None:
    """The calls reach their handlers."""
    responded = [status for status, _ in await statuses(TOKEN, Authorization=authorization)]

    assert responded == [400, 200, 404, 404, 404, 404]


async def test_without_a_token_it_is_open_outside_of_production() -> None:
    """In production, all calls get 403 without a configured token."""
    development = [status for status, _ in await statuses(Settings())]
    production = await statuses(Settings(environment="production", allow_memory_adapters=True))

    assert development == [400, 200, 404, 404, 404, 404]
    assert production == [(403, None)] * len(CALLS)


FOREIGN = ["http://evil.example", "null", "http://testserver.local:3001"]


@pytest.mark.parametrize("origin", FOREIGN)
async def test_without_a_token_a_page_of_another_host_changes_nothing(origin: str) -> None:
    """Each change gets 403, before any other error; reading is allowed."""
    headers = {"Origin": origin}
    responded = [status for status, _ in await statuses(Settings(), **headers)]

    assert responded == [403, 200, 404, 403, 403, 404]


async def test_without_a_token_a_page_of_this_host_is_allowed() -> None:
    """Clients that are not browsers send no origin and are allowed, too."""
    responded = [
        status for status, _ in await statuses(Settings(), Origin="https://testserver.local")
    ]

    assert responded == [400, 200, 404, 404, 404, 404]


async def test_the_token_is_accepted_from_any_origin() -> None:
    """A page of another host does not know the token."""
    headers = {"Origin": "http://evil.example", "Authorization": "Bearer planted"}
    responded = [status for status, _ in await statuses(TOKEN, **headers)]

    assert responded == [400, 200, 404, 404, 404, 404]


async def test_a_denied_page_gets_the_reason() -> None:
    """The problem names the difference and the remedy; no job is accepted."""
    job = {"task": "parcels.echo", "payload": None}
    async with AsyncTestClient(create_app(Settings(task_modules=("tests.job_tasks",)))) as client:
        reply = await client.post(JOBS, json=job, headers={"Origin": "null"})
        listed = (await client.get(f"{JOBS}?queue=analytics")).json()["items"]

    assert reply.headers["content-type"] == "application/problem+json"
    assert "Origin and Host differ. Set API_TOKEN" in reply.json()["detail"]
    assert listed == []


async def test_management_changes_need_a_token_from_any_origin() -> None:
    """The status is 403 with and without an origin."""
    async with AsyncTestClient(create_app(Settings())) as client:
        replies = [
            await client.request(method, path, json={"level": "debug"}, headers=headers)
            for headers in ({}, {"Origin": "http://testserver.local"}, {"Origin": "null"})
            for method, path in (("POST", "/health/shutdown"), ("PUT", "/health/loggers/root"))
        ]

    assert [reply.status_code for reply in replies] == [403] * 6


async def test_no_request_waits_for_a_thread() -> None:
    """Litestar would run a synchronous guard in a thread."""
    used: list[object] = []

    class RecordingExecutor(ThreadPoolExecutor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            used.append(fn)
            return super().submit(fn, *args, **kwargs)

    app = create_app(TOKEN)
    asyncio.get_running_loop().set_default_executor(RecordingExecutor(1))
    transport = httpx.ASGITransport(app=cast("Any", app))
    headers = {"Authorization": "Bearer planted"}
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        replies = [
            await client.request(method, path, headers=headers)
            for method, path in [*CALLS, ("GET", "/api/docs"), ("GET", "/api/docs/openapi.json")]
        ]

    assert [reply.status_code for reply in replies] == [400, 200, 404, 404, 404, 404, 200, 200]
    assert used == []


async def test_the_token_is_not_for_operations() -> None:
    """MANAGEMENT_TOKEN reads jobs, as in the console, and API_TOKEN does nothing there."""
    settings = Settings(
        api_token=Secret("api"),
        management_token=Secret("management"),
        task_modules=("tests.job_tasks",),
    )
    async with AsyncTestClient(create_app(settings)) as client:
        replies = [
            await client.get(path, headers={"Authorization": f"Bearer {token}"})
            for path, token in ((JOBS, "management"), ("/health/shutdown", "api"))
        ]
        job = {"task": "parcels.echo", "payload": None}
        submitted = await client.post(
            JOBS, json=job, headers={"Authorization": "Bearer management"}
        )

    assert [reply.status_code for reply in (*replies, submitted)] == [200, 403, 403]


async def test_another_application_has_no_jobs_api() -> None:
    """The plugin provides the job service but adds no routes for it."""
    plugin = OperationsPlugin()
    app = Litestar(plugins=[plugin], logging_config=None)
    async with AsyncTestClient(app) as client:
        reply = await client.get(JOBS)
        counts = await plugin.jobs.queues()

    assert reply.status_code == 404
    assert sorted(counts) == ["analytics", "default", "notifications"]


# -- tasks that the API does not offer ---------------------------------------------------------

BUILT_IN = ["notifications.webhook", "analytics.rollup_health", "default.prune"]
OFFERED = Settings(task_modules=("tests.offered_tasks",))
PAYLOADS = {"notifications.webhook": {"type": "health.changed", "data": {}, "alert": True}}


async def test_a_task_that_the_api_does_not_offer_is_refused() -> None:
    """Alone and in a batch, before its payload is read; the problem says what to do instead."""
    for task in (*BUILT_IN, "withheld.note"):
        job = {"task": task, "payload": PAYLOADS.get(task)}
        allowed = {"task": "offered.nothing"}
        async with AsyncTestClient(service(OFFERED)) as client:
            replies = [
                await client.post(JOBS, json=job),
                await client.post(f"{JOBS}/batch", json={"jobs": [allowed, job]}),
            ]
            jobs = (await client.get(JOBS)).json()["items"]

        for reply in replies:
            assert reply.status_code == 403
            assert reply.headers["content-type"] == "application/problem+json"
            assert reply.json()["detail"] == (
                f"Clients may not submit the task '{task}' over HTTP. Submit it in the process"
                " with `jobs.submit`, or with `viralfx jobs submit`; or declare a task that submits"
                " it, and send that one."
            )
        assert [each["task"] for each in jobs if each["task"] not in BUILT_IN[1:]] == []


async def test_a_task_may_submit_a_built_in_task_for_clients() -> None:
    """Its job has the correlation id of the request; the process submits all of its tasks."""
    app = create_app(OFFERED)
    jobs = app.plugins.get(OperationsPlugin).jobs
    async with AsyncTestClient(app) as client:
        body = {"task": "offered.webhook", "payload": "17"}
        sent = await client.post(JOBS, json=body, headers={"X-Correlation-ID": "order-17"})
        submitted = await jobs.wait(sent.json()["id"], timeout=30)
        webhook = await jobs.wait(json.loads(submitted.result or b"null"), timeout=30)
        noted = await jobs.wait((await jobs.submit("withheld.note", "x")).job.id, timeout=30)

    assert sent.status_code == 202
    assert (webhook.task, webhook.correlation_id) == ("notifications.webhook", "order-17")
    assert noted.result == b'"x"'


async def test_operators_repeat_and_run_what_clients_may_not_submit() -> None:
    """A failed job is retried and a schedule runs: these jobs are not of the caller's making."""
    app = create_app(OFFERED)
    jobs = app.plugins.get(OperationsPlugin).jobs
    message = {"url": "https://hooks.example/in", "type": "order.shipped", "data": {}}
    async with AsyncTestClient(app) as client:
        failed = await jobs.wait((await jobs.submit(BUILT_IN[0], message)).job.id, timeout=30)
        replies = [
            await client.post(f"{JOBS}/{failed.id}/retry"),
            await client.post(f"/api/v1/schedules/{BUILT_IN[1]}/run"),
        ]
        ran = [await jobs.wait(reply.json()["id"], timeout=30) for reply in replies]

    assert failed.state == "failed"
    assert [reply.status_code for reply in replies] == [202, 202]
    assert [job.state for job in ran] == ["failed", "completed"]


async def test_an_answer_names_no_task_that_the_caller_may_not_submit() -> None:
    """Without the right every name gets the same problem, and no suggestion leads elsewhere."""
    settings = Settings(
        api_token=Secret("api"),
        tokens=Secret("shop submit:offered.n*,submit:w* secret-of-the-shop"),
        task_modules=("tests.offered_tasks",),
    )
    headers = {"Authorization": "Bearer secret-of-the-shop"}
    async with AsyncTestClient(create_app(settings)) as client:

        async def ask(*tasks: str) -> tuple[int, str]:
            jobs = [{"task": task} for task in tasks]
            path, body = (JOBS, jobs[0]) if len(tasks) == 1 else (f"{JOBS}/batch", {"jobs": jobs})
            reply = await client.post(path, json=body, headers=headers)
            return reply.status_code, reply.json()["detail"]

        for task in ("offered.order", "default.prune", "default.prunes", "nothing.at.all"):
            assert await ask(task) == (403, f"This token has not the right submit:{task}.")
        unknown = await ask("offered.nothin")
        no_hint = [await ask("withheld.not"), await ask("webhook")]
        batch = await ask("offered.nothing", "offered.nothing", "offered.nothin")

    hint = "there is no task named 'offered.nothin' here; did you mean offered.nothing?"
    assert unknown == (422, f"T{hint[1:]}")
    assert batch == (422, f"The job at index 2: {hint}")
    assert no_hint == [
        (422, f"There is no task named {name!r} here.") for name in ("withheld.not", "webhook")
    ]


# -- idempotency keys --------------------------------------------------------------------------

OWNERS = Settings(
    api_token=Secret("api"),
    tokens=Secret(
        "ann submit:*,read:* ann-secret-1; bob submit:*,read:analytics bob-secret-2;"
        " eve submit:* eve-secret-3"
    ),
    task_modules=("tests.offered_tasks",),
)
SECRETS = {"ann": "ann-secret-1", "bob": "bob-secret-2", "eve": "eve-secret-3", "api": "api"}
LATER = "2999-01-01T00:00:00Z"
NOTHING = {"task": "offered.nothing", "runAt": LATER}


class Callers:
    """Clients of one service, by the names of their tokens."""

    def __init__(self, client: AsyncTestClient[Litestar]) -> None:
        self.client = client

    async def post(self, name: str, key: str, **job: object) -> httpx.Response:
        """Submit a job under a key."""
        headers = {"Authorization": f"Bearer {SECRETS[name]}", "Idempotency-Key": key}
        return await self.client.post(JOBS, json=job or NOTHING, headers=headers)

    async def batch(self, name: str, key: str, **job: object) -> httpx.Response:
        """Submit a job under a key, as the second one of a batch."""
        jobs = [NOTHING, {**(job or NOTHING), "key": key}]
        headers = {"Authorization": f"Bearer {SECRETS[name]}"}
        return await self.client.post(f"{JOBS}/batch", json={"jobs": jobs}, headers=headers)


async def test_each_name_has_idempotency_keys_of_its_own() -> None:
    """Two names and API_TOKEN use one text for three jobs; each gets its own again, in batches too.

    The key of API_TOKEN is stored as the application's own, as before.
    """
    app = create_app(OWNERS)
    service = app.plugins.get(OperationsPlugin).jobs
    async with AsyncTestClient(app) as client:
        callers = Callers(client)
        first = {name: await callers.post(name, "order-17") for name in SECRETS}
        again = {name: await callers.post(name, "order-17") for name in SECRETS}
        batched = {name: await callers.batch(name, "order-17") for name in SECRETS}
        ids = {name: reply.json()["id"] for name, reply in first.items()}
        headers = {"Authorization": "Bearer ann-secret-1"}
        shown = {
            name: (await client.get(f"{JOBS}/{job_id}", headers=headers)).json()
            for name, job_id in ids.items()
        }
        own = await service.submit("offered.nothing", None, key="order-17", run_at=TIME)
        stored = (await service.get(ids["ann"])).key

    assert [reply.status_code for reply in first.values()] == [202] * 4
    assert len(set(ids.values())) == 4
    assert {name: (r.status_code, r.json()["id"]) for name, r in again.items()} == {
        name: (200, job_id) for name, job_id in ids.items()
    }
    assert {name: reply.json()["jobs"][1]["id"] for name, reply in batched.items()} == ids
    assert {n: (job["idempotencyKey"], job["keyOwner"]) for n, job in shown.items()} == {
        name: ("order-17", None if name == "api" else name) for name in SECRETS
    }
    assert (own.created, own.job.id) == (False, ids["api"])
    assert stored == "@ann order-17"


async def test_no_client_can_write_the_key_of_a_name() -> None:
    """Neither the stored form, nor another spelling of it, finds the job of another name."""
    async with AsyncTestClient(create_app(OWNERS)) as client:
        callers = Callers(client)
        theirs = (await callers.post("ann", "order-17")).json()["id"]
        refused = [
            *[await callers.post(name, "@ann order-17") for name in ("api", "bob")],
            await callers.batch("api", "@ann order-17"),
        ]
        spelled = [
            await callers.post(name, key)
            for name in ("api", "bob")
            for key in ("@ann%20order-17", "@ann+order-17", "ann:order-17")
        ]

    assert [reply.status_code for reply in refused] == [400] * 3
    assert [reply.status_code for reply in spelled] == [202] * len(spelled)
    assert theirs not in {reply.json()["id"] for reply in spelled}


@pytest.mark.parametrize("queue", ["default", "analytics", None])
async def test_a_conflict_names_the_job_to_its_readers_alone(queue: str | None) -> None:
    """A caller that may not read the queue of its earlier job learns only that the key is in use.

    The same holds for a batch. The holder of API_TOKEN reads all queues.
    """
    async with AsyncTestClient(create_app(OWNERS)) as client:
        callers = Callers(client)
        named: dict[str, bool] = {}
        for name in SECRETS:
            job = {**NOTHING, "queue": queue}
            used = (await callers.post(name, "order-17", **job)).json()["id"]
            other = {**job, "runAt": "2998-01-01T00:00:00Z"}
            alone = await callers.post(name, "order-17", **other)
            batch = await callers.batch(name, "order-17", **other)
            assert {reply.status_code for reply in (alone, batch)} == {409}
            named[name] = used in alone.text
            which = f"job {used}" if named[name] else "another job"
            text = f"he idempotency key was used for {which}, which asks for something else."
            assert alone.json()["detail"] == f"T{text}"
            assert batch.json()["detail"] == f"The job at index 1: t{text}"

    reads = {"ann": True, "bob": queue == "analytics", "eve": False, "api": True}
    assert named == reads


async def test_a_conflict_with_a_job_of_the_application_names_no_other_key() -> None:
    """The application's job under the same text is no conflict for a name."""
    app = create_app(OWNERS)
    service = app.plugins.get(OperationsPlugin).jobs
    async with AsyncTestClient(app) as client:
        callers = Callers(client)
        theirs = await service.submit("withheld.note", "x", key="order-17", run_at=TIME)
        named = await callers.post("eve", "order-17")
        shared = await callers.post("api", "order-17")

    assert named.status_code == 202
    assert shared.status_code == 409
    assert theirs.job.id in shared.json()["detail"]
