"""The jobs API: accepted and rejected requests, lists and pages, retry and cancel."""

import json
from collections.abc import AsyncIterator
from typing import Any, cast

import httpx
import pytest
from litestar import Litestar, Response
from litestar.testing import AsyncTestClient

from viralfx.adapters.codec import MsgspecCodec
from viralfx.core.errors import LedgerUnavailableError, NotMigratedError, UnstorableError
from viralfx.jobs.ledger import JobLedger, KeyHeldError
from viralfx.jobs.model import JobError, JobState, failed
from viralfx.jobs.service import JobService
from viralfx.settings import Settings
from viralfx.web.app import create_app
from viralfx.web.jobs.changes import jobs_router
from viralfx.web.layer import OperationsConfig
from viralfx.web.plugin import OperationsPlugin

JOBS = "/api/v1/jobs"
SETTINGS = Settings(task_modules=("tests.job_tasks",))
JSON = {"Content-Type": "application/json"}
PARCEL = {"task": "parcels.ship", "payload": {"weight": 3}}


def application() -> Litestar:
    """Return the service without a worker."""
    app = create_app(SETTINGS)
    app.plugins.get(OperationsPlugin).assembly.jobs.disable_worker()
    return app


@pytest.fixture
async def client() -> AsyncIterator[AsyncTestClient[Litestar]]:
    """Return a client of the service."""
    async with AsyncTestClient(application(), raise_server_exceptions=False) as test_client:
        yield test_client


Client = AsyncTestClient[Litestar]


def ledger_of(client: Client) -> JobLedger:
    """Return the job ledger of the service."""
    ledger: JobLedger = client.app.plugins.get(OperationsPlugin).assembly.jobs.ledger
    return ledger


async def accept(client: Client, **body: Any) -> str:
    """Submit a job and return its id."""
    reply = await client.post(JOBS, json={**PARCEL, **body})
    assert reply.status_code == 202, reply.text
    return str(reply.json()["id"])


async def fail(client: Client, queue: str = "default") -> None:
    """Fail the oldest waiting job, as a worker would."""
    ledger = ledger_of(client)
    await ledger.register("test", [queue], 60.0)
    (claim,) = await ledger.claim(queue, "test", 1)
    await ledger.settle([failed(claim, JobError(code="error", message="planted"))])


def assert_problem(reply: httpx.Response, status: int, text: str) -> None:
    """Assert that a response is a problem with this status and text."""
    body = reply.json()

    assert (reply.status_code, body["status"]) == (status, status), reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    assert body["correlationId"] == reply.headers["x-correlation-id"]
    assert text in body["detail"] + json.dumps(body.get("errors", "")), body


# -- accept ----------------------------------------------------------------------------------


async def test_a_job_is_accepted_and_found(client: Client) -> None:
    """The response is 202 with id, queue, state and links to the job."""
    reply = await client.post(JOBS, json=PARCEL, headers={"X-Correlation-ID": "order-17"})
    body = reply.json()
    job = (await client.get(body["links"]["self"])).json()

    assert reply.status_code == 202
    assert set(body) == {"id", "queue", "state", "links"}
    assert (body["queue"], body["state"]) == ("default", "waiting")
    assert body["links"] == {
        "self": f"{JOBS}/{body['id']}",
        "events": f"{JOBS}/{body['id']}/events",
    }
    assert reply.headers["location"] == body["links"]["self"]
    assert job == {
        **body,
        "task": "parcels.ship",
        "payload": {"weight": 3},
        "attempts": 0,
        "maxAttempts": None,
        "crashes": 0,
        "error": None,
        "result": None,
        "correlationId": "order-17",
        "userId": None,
        "priority": 0,
        "idempotencyKey": None,
        "keyOwner": None,
        "createdAt": job["createdAt"],
        "runAt": job["createdAt"],
        "startedAt": None,
        "finishedAt": None,
        "worker": None,
        "cancelRequested": False,
        "progress": None,
        "failures": [],
    }


async def test_a_time_beyond_the_range_of_jobs_is_the_first_or_last_one(client: Client) -> None:
    """The document allows every date-time. A job of the past is due at once."""
    past = [
        await accept(client, runAt=time)
        for time in ("0001-01-01T00:00:00+10:00", "0001-01-01T00:00:00Z")
    ]
    last = [
        await accept(client, runAt=time)
        for time in ("9999-12-31T23:59:59-10:00", "9999-12-31T23:59:59.999999Z")
    ]
    jobs = {job["id"]: job for job in (await client.get(JOBS)).json()["items"]}

    assert [jobs[each]["runAt"] for each in past] == [jobs[each]["createdAt"] for each in past]
    assert [jobs[each]["runAt"] for each in last] == ["9999-12-30T00:00:00.000Z"] * 2


async def test_a_future_time_is_stored_in_utc(client: Client) -> None:
    """The time zone of the request is converted."""
    job_id = await accept(client, runAt="2030-01-01T12:00:00.5+02:00")
    job = (await client.get(f"{JOBS}/{job_id}")).json()

    assert (job["state"], job["runAt"]) == ("waiting", "2030-01-01T10:00:00.500Z")


async def test_a_repeated_key_returns_the_same_job(client: Client) -> None:
    """The status is 202, then 200; a different body with the same key is a conflict."""
    headers = {"Idempotency-Key": "order-17"}
    first = await client.post(JOBS, json=PARCEL, headers=headers)
    again = await client.post(JOBS, json=PARCEL, headers=headers)
    other = await client.post(JOBS, json={**PARCEL, "payload": {"weight": 4}}, headers=headers)
    later = await client.post(
        JOBS, json={**PARCEL, "runAt": "2030-01-01T00:00:00Z"}, headers=headers
    )
    task = await client.post(JOBS, json={"task": "parcels.echo"}, headers=headers)

    assert (first.status_code, again.status_code) == (202, 200)
    assert first.json() == again.json()
    for conflict in (other, later, task):
        assert_problem(conflict, 409, "he idempotency key was used")
    job = (await client.get(first.json()["links"]["self"])).json()
    assert job["idempotencyKey"] == "order-17"
    assert len((await client.get(JOBS)).json()["items"]) == 1


async def test_an_equal_payload_in_other_bytes_is_the_same_job(client: Client) -> None:
    """A client may serialize a repeated request again; the job keeps the first bytes."""
    headers = {"Idempotency-Key": "order-17", "Content-Type": "application/json"}
    replies = [
        await client.post(
            JOBS, content=b'{"task":"parcels.echo","payload":%s}' % payload, headers=headers
        )
        for payload in (b'{"a":[1, 2], "b":1}', b'{"b":1.0,"a":[1,2]}', b'{"a":[2,1],"b":1}')
    ]
    shown = await client.get(replies[0].json()["links"]["self"])

    assert [reply.status_code for reply in replies] == [202, 200, 409]
    assert replies[0].json() == replies[1].json()
    assert b'{"a":[1, 2], "b":1}' in shown.content


async def test_an_invalid_key_is_rejected(client: Client) -> None:
    """A key has 1 to 255 visible ASCII characters."""
    for key in ("", "x" * 256, "a b", "ä".encode("latin-1"), "\t", "a\x7f"):
        headers = [(b"Idempotency-Key", key.encode() if isinstance(key, str) else key)]

        assert_problem(
            await client.post(JOBS, json=PARCEL, headers=headers), 400, "Idempotency-Key"
        )


async def test_two_keys_are_rejected(client: Client) -> None:
    """It would be ambiguous which key counts. A key of 255 characters is accepted."""
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    longest = await client.post(JOBS, json=PARCEL, headers={"Idempotency-Key": "~" * 255})

    assert_problem(await client.post(JOBS, json=PARCEL, headers=headers), 400, "Idempotency-Key")
    assert longest.status_code == 202


async def test_an_invalid_body_is_rejected(client: Client) -> None:
    """The 400 names the problem and its place."""
    for body, text in (
        (b"", "The body is empty; send a JSON object."),
        (b"{", "truncated"),
        (b"null", "Expected `object`, got `null`"),
        (b"[]", "Expected `object`, got `array`"),
        (b'{"payload":1}', "missing required field `task`"),
        (b'{"task":""}', "`$.task`"),
        (b'{"task":1}', "`$.task`"),
        (b'{"task":"%s"}' % (b"x" * 201), "`$.task`"),
        (b'{"task":"parcels.ship","payload":{"weight":1},"delay":"1"}', "`delay`"),
        (b'{"task":"parcels.ship","payload":{"weight":1},"run_at":null}', "`run_at`"),
        (b'{"task":"parcels.ship","payload":{"weight":1}}}', "trailing"),
        (b'{"task":"parcels.ship","payload":{"weight":NaN}}', "malformed"),
        (b'{"task":"parcels.ship","payload":{weight:1}}', "malformed"),
        (b'{"task":"parcels.ship","payload":"\xff"}', "not UTF-8"),
        (b'\xef\xbb\xbf{"task":"parcels.ship"}', "malformed"),
        (b'{"task":"x","runAt":"2030-01-01T12:00:00"}', "`$.runAt`"),
        (b'{"task":"x","runAt":"2030-01-01"}', "`$.runAt`"),
        (b'{"task":"x","runAt":"tomorrow"}', "`$.runAt`"),
        (b'{"task":"x","runAt":1767225600}', "`$.runAt`"),
        (b'{"task":"x","payload":' + b"[" * 500 + b"]" * 500 + b"}", "more than 500 levels"),
    ):
        headers = {"Content-Type": "application/json"}

        assert_problem(await client.post(JOBS, content=body, headers=headers), 400, text)


async def test_an_unknown_task_or_invalid_payload_is_rejected(client: Client) -> None:
    """The 422 names the path in the payload, and no job is stored."""
    for body, text in (
        (
            {"task": "parcels.shipp"},
            "There is no task named 'parcels.shipp' here; did you mean parcels.ship?",
        ),
        ({"task": "zzz"}, "There is no task named 'zzz' here."),
        ({"task": "parcels.ship"}, "Expected `object`, got `null`"),
        ({"task": "parcels.ship", "payload": {}}, "missing required field `weight`"),
        ({"task": "parcels.ship", "payload": {"weight": "3"}}, "`$.weight`"),
        ({"task": "parcels.ship", "payload": {"weight": 1, "to": ["a", 2]}}, "`$.to[1]`"),
        ({"task": "parcels.ship", "payload": {"weight": 1, "x": 2}}, "unknown field `x`"),
    ):
        assert_problem(await client.post(JOBS, json=body), 422, text)
        assert (await client.get(JOBS)).json()["items"] == []


async def test_a_large_body_is_rejected(client: Client) -> None:
    """The limit is 64 KiB, with and without a Content-Length."""
    payload_size = 64 * 1024 - len('{"task":"parcels.echo","payload":""}')
    fits, too_large = (
        b'{"task":"parcels.echo","payload":"%s"}' % (b"x" * size)
        for size in (payload_size, payload_size + 1)
    )

    async def chunks(body: bytes) -> AsyncIterator[bytes]:
        yield body[:1000]
        yield body[1000:]

    transport = httpx.ASGITransport(app=cast("Any", client.app))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as streaming:
        replies = [
            await streaming.post(JOBS, content=content, headers=JSON)
            for content in (fits, chunks(fits), too_large, chunks(too_large))
        ]

    assert [reply.status_code for reply in replies] == [202, 202, 413, 413]
    for rejected in replies[2:]:
        assert_problem(rejected, 413, "The body is over 64 KiB.")
        assert rejected.headers["connection"] == "close"


async def test_a_body_of_another_type_is_rejected(client: Client) -> None:
    """So a page of another host cannot submit jobs with a form or without a Content-Type."""
    body = json.dumps(PARCEL).encode()
    for rejected in (
        {},
        {"Content-Type": ""},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "multipart/form-data; boundary=application/json"},
        {"Content-Type": "text/plain; application/json"},
        {"Content-Type": "text/json"},
        {"Content-Type": "application/jsonp"},
        {"Content-Type": "+json"},
        {"Content-Type": "application/vnd.viralfx+json"},
        [("Content-Type", "application/json"), ("Content-Type", "text/plain")],
    ):
        reply = await client.post(JOBS, content=body, headers=rejected)

        assert_problem(reply, 415, "application/json")
    for media_type in (
        "application/json",
        "application/json; charset=utf-8",
        "Application/JSON",
    ):
        headers = {"Content-Type": media_type}

        assert (await client.post(JOBS, content=body, headers=headers)).status_code == 202


async def test_a_request_without_a_body_needs_no_content_type(client: Client) -> None:
    """A new job needs a body; a retry needs none, and rejects a body of another type."""
    job_id = await accept(client)
    await fail(client)
    empty = await client.post(JOBS)
    typed = await client.post(
        f"{JOBS}/{job_id}/retry", content=b"x", headers={"Content-Type": "text/plain"}
    )
    retried = await client.post(f"{JOBS}/{job_id}/retry")

    assert_problem(empty, 400, "The body is empty")
    assert_problem(typed, 415, "application/json")
    assert retried.status_code == 202


async def test_a_payload_keeps_its_bytes(client: Client) -> None:
    """Numbers beyond a float's precision, repeated names and spaces are preserved."""
    payload = b'{ "n": 123456789012345678901234567890.5, "n":2,  "s":"\\u00fc" }'
    body = b'{"task":"parcels.echo","payload":%s}' % payload
    reply = await client.post(JOBS, content=body, headers=JSON)
    shown = await client.get(reply.json()["links"]["self"])

    assert payload in shown.content


# -- lists -----------------------------------------------------------------------------------


async def test_pages_have_every_job_once(client: Client) -> None:
    """The newest job is first; new jobs between two pages do not matter."""
    ids = [await accept(client) for _ in range(7)]
    seen, cursor = [], None
    while True:
        query = {"limit": 3, **({"cursor": cursor} if cursor else {})}
        page = (await client.get(JOBS, params=query)).json()
        seen += [job["id"] for job in page["items"]]
        cursor = page["nextCursor"]
        if cursor is None:
            break
        await accept(client)

    assert seen == ids[::-1]


async def test_the_last_full_page_has_no_cursor(client: Client) -> None:
    """A client need not request an empty page."""
    for _ in range(2):
        await accept(client)

    page = (await client.get(JOBS, params={"limit": 2})).json()

    assert (len(page["items"]), page["nextCursor"]) == (2, None)


async def test_lists_filter_by_queue_and_state(client: Client) -> None:
    """The filters work alone and together; items have neither payload nor result."""
    shipped, echoed = await accept(client), await accept(client, task="parcels.echo")
    gone = await accept(client)
    await client.delete(f"{JOBS}/{gone}")

    async def listed(**query: str) -> list[str]:
        return [job["id"] for job in (await client.get(JOBS, params=query)).json()["items"]]

    assert await listed() == [gone, echoed, shipped]
    assert await listed(queue="default") == [gone, shipped]
    assert await listed(state="waiting") == [echoed, shipped]
    assert await listed(state="waiting", queue="default") == [shipped]
    assert await listed(state="active") == []
    assert await listed(task="parcels.echo") == [echoed]
    assert await listed(task="parcels.ship", state="waiting", queue="default") == [shipped]
    assert await listed(code="timeout") == []
    (item,) = (await client.get(JOBS, params={"queue": "analytics"})).json()["items"]
    assert {"payload", "result", "failures"}.isdisjoint(item)


async def test_a_list_filters_by_correlation_id(client: Client) -> None:
    """The filter works across pages and with the other filters."""
    headers = {"X-Correlation-ID": "order-17"}
    ids = []
    for task in ("parcels.ship", "parcels.echo", "parcels.ship"):
        reply = await client.post(JOBS, json={**PARCEL, "task": task}, headers=headers)
        ids.append(reply.json()["id"])
        await accept(client)

    async def found(**query: str | int) -> tuple[list[str], str | None]:
        page = (await client.get(JOBS, params={"correlationId": "order-17", **query})).json()
        assert {job["correlationId"] for job in page["items"]} <= {"order-17"}
        return [job["id"] for job in page["items"]], page["nextCursor"]

    first, cursor = await found(limit=2)

    assert await found() == (ids[::-1], None)
    assert first == ids[:0:-1]
    assert cursor is not None
    assert await found(limit=2, cursor=cursor) == (ids[:1], None)
    assert await found(queue="default", state="waiting") == ([ids[2], ids[0]], None)
    assert await found(state="active") == ([], None)


async def test_an_invalid_filter_is_rejected(client: Client) -> None:
    """A misspelt filter does not list all jobs."""
    for query, status, text in (
        ("queue=nothing", 422, "There is no queue 'nothing'; there are analytics, default,"),
        ("state=done", 400, "state must be one of waiting, active, completed, failed, cancelled"),
        ("queue=", 422, "There is no queue ''"),
        ("state=", 400, "state must be one of waiting, active, completed, failed, cancelled"),
        ("cursor=x", 400, "cursor must be the nextCursor"),
        ("cursor=", 400, "cursor must be the nextCursor"),
        ("correlationId=", 400, "correlationId must be 1 to 128 of A-Z"),
        ("correlationId=order%2017", 400, "correlationId must be 1 to 128 of A-Z"),
        ("correlationId=order-17&queue=nothing", 422, "There is no queue 'nothing'"),
        ("correlationid=order-17", 400, "There is no parameter 'correlationid'"),
        ("task=", 400, "task must have 1 to 200 characters"),
        ("code=" + "x" * 201, 400, "code must have 1 to 200 characters"),
        ("task=parcels.ship&queue=nothing", 422, "There is no queue 'nothing'"),
        ("limit=0", 400, "limit"),
        ("limit=101", 400, "limit"),
        ("limit=x", 400, "limit"),
        ("sate=failed", 400, "There is no parameter 'sate'"),
    ):
        assert_problem(await client.get(f"{JOBS}?{query}"), status, text)


# -- one job ---------------------------------------------------------------------------------


async def test_a_failed_job_shows_its_error_and_can_be_retried(client: Client) -> None:
    """A retry sets the job to waiting and its attempts to 0."""
    job_id = await accept(client)
    await fail(client)
    job = (await client.get(f"{JOBS}/{job_id}")).json()
    reply = await client.post(f"{JOBS}/{job_id}/retry")
    again = (await client.get(f"{JOBS}/{job_id}")).json()

    assert (job["state"], job["attempts"]) == ("failed", 1)
    assert job["error"] == {"code": "error", "message": "planted"}
    assert job["finishedAt"] >= job["startedAt"] >= job["createdAt"]
    assert (reply.status_code, reply.json()["id"], reply.json()["state"]) == (
        202,
        job_id,
        "waiting",
    )
    assert (again["state"], again["attempts"], again["finishedAt"]) == ("waiting", 0, None)


async def test_a_completed_job_shows_its_result(client: Client) -> None:
    """The result is JSON; a running job counts its attempt."""
    job_id = await accept(client)
    ledger = ledger_of(client)
    await ledger.register("test", ["default"], 60.0)
    (claim,) = await ledger.claim("default", "test", 1)
    running = (await client.get(f"{JOBS}/{job_id}")).json()
    await ledger.settle_with_effect(claim, _result)
    job = (await client.get(f"{JOBS}/{job_id}")).json()

    assert (running["state"], running["attempts"], running["worker"]) == ("active", 1, "test")
    assert (job["state"], job["attempts"], job["result"]) == ("completed", 1, {"done": [1.50]})


async def _result(_: object) -> bytes:
    return b'{"done":[1.50]}'


async def test_a_waiting_job_can_be_cancelled(client: Client) -> None:
    """The response is 204; the job stays in the list as cancelled."""
    job_id = await accept(client)
    reply = await client.delete(f"{JOBS}/{job_id}")
    job = (await client.get(f"{JOBS}/{job_id}")).json()

    assert (reply.status_code, reply.content) == (204, b"")
    assert job["state"] == "cancelled"
    assert job["finishedAt"] is not None


async def test_a_change_in_the_wrong_state_is_a_conflict(client: Client) -> None:
    """Only a failed job can be retried, and only a waiting one cancelled."""
    waiting = await accept(client)
    retried = await client.post(f"{JOBS}/{waiting}/retry")
    await fail(client)
    cancelled = await client.delete(f"{JOBS}/{waiting}")

    assert_problem(retried, 409, "is waiting; only one that is failed can be retried")
    assert_problem(cancelled, 409, "is failed; only one that is waiting can be cancelled")


async def test_an_unknown_job_is_not_found(client: Client) -> None:
    """This holds for valid and invalid ids."""
    for job_id in ("01991f3c-5a0e-7c3b-8a52-6f5d7c0e9b11", "x", "x" * 5000, "%00"):
        for method, path in (
            ("GET", ""),
            ("DELETE", ""),
            ("POST", "/retry"),
            ("POST", "/run"),
            ("GET", "/events"),
        ):
            assert_problem(await client.request(method, f"{JOBS}/{job_id}{path}"), 404, "no job")


# -- without the ledger -----------------------------------------------------------------------


class FailingLedger:
    """A ledger that fails every call."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, _: str) -> Any:
        """Return a method that fails."""

        async def call(*_: object, **__: object) -> None:
            raise self._error

        return call


async def test_without_its_ledger_the_api_returns_503(client: Client) -> None:
    """The response has ``Retry-After``, the code of the problem and no text of the error."""
    for error, text, code in (
        (LedgerUnavailableError("planted secret"), "The job ledger is unavailable.", None),
        (LedgerUnavailableError("planted secret", "tls"), "The job ledger is unavailable.", "tls"),
        (NotMigratedError("planted secret"), "run `viralfx migrate`", None),
        (UnstorableError("planted secret", "42501"), "The job ledger refuses the job", None),
        (KeyHeldError([]), "An open transaction holds the same", "key_held"),
    ):
        jobs = client.app.plugins.get(OperationsPlugin).assembly.jobs
        away = JobService(
            ledger=cast("JobLedger", FailingLedger(error)),
            tasks=jobs.tasks,
            codec=MsgspecCodec(),
            queues=SETTINGS.queues,
        )
        jobs.service = away
        for method, path, body in (
            ("POST", "", PARCEL),
            ("GET", "", None),
            ("GET", "/x", None),
            ("DELETE", "/x", None),
            ("POST", "/x/retry", None),
            ("POST", "/x/run", None),
            ("GET", "/x/events", None),
        ):
            reply = await client.request(method, f"{JOBS}{path}", json=body)

            assert_problem(reply, 503, text)
            # Only the response to a new job mentions the key.
            accepts = (method, path) == ("POST", "") and type(error) is LedgerUnavailableError
            assert ("Idempotency-Key" in reply.text) is accepts
            assert reply.headers["retry-after"] == "1"
            assert reply.json().get("code") == code
            assert "planted" not in reply.text


# -- the document ------------------------------------------------------------------------------


async def test_the_api_is_documented(client: Client) -> None:
    """The document has every operation with its responses and examples."""
    document = (await client.get("/api/docs/openapi.json")).json()
    paths = {p: item for p, item in document["paths"].items() if p.startswith(JOBS)}
    operations = [o for item in paths.values() for o in item.values() if "operationId" in o]
    post = paths[JOBS]["post"]
    (example,) = post["responses"]["202"]["content"]["application/json"]["examples"].values()

    assert sorted(o["operationId"] for o in operations) == [
        "job",
        "jobAccept",
        "jobAcceptBatch",
        "jobCancel",
        "jobCancelAll",
        "jobCancelWaiting",
        "jobEvents",
        "jobList",
        "jobRetry",
        "jobRetryAll",
        "jobRun",
    ]
    assert {"200", "202", "400", "401", "403", "409", "413", "415", "422", "503"} == set(
        post["responses"]
    )
    assert set(example["value"]) == {"id", "queue", "state", "links"}
    schema = post["requestBody"]["content"]["application/json"]["schema"]
    assert (schema["required"], schema["additionalProperties"]) == (["task"], False)
    assert [p["name"] for p in post["parameters"]] == ["Idempotency-Key"]


async def test_the_five_states() -> None:
    """Clients depend on these names."""
    assert [str(s) for s in JobState] == ["waiting", "active", "completed", "failed", "cancelled"]


async def test_hooks_of_the_application_change_the_response() -> None:
    """Headers and cookies that a hook adds are sent beside those of an accepted job."""

    async def add(response: Response[object]) -> Response[object]:
        response.headers["X-Added"] = "by a hook"
        response.set_cookie("seen", "yes")
        return response

    plugin = OperationsPlugin(OperationsConfig(settings=SETTINGS))
    app = Litestar([jobs_router(plugin)], plugins=[plugin], after_request=add, logging_config=None)
    async with AsyncTestClient(app) as test_client:
        reply = await test_client.post(JOBS, json=PARCEL)

    assert reply.status_code == 202
    assert reply.headers["location"] == reply.json()["links"]["self"]
    assert (reply.headers["x-added"], reply.cookies["seen"]) == ("by a hook", "yes")
