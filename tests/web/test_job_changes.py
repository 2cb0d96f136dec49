"""The jobs API: cancellation, changes of many jobs, past executions and progress."""

import inspect
from dataclasses import replace

import pytest
from tests.web.test_jobs import JOBS, Client, accept, client, ledger_of

from viralfx.core.ids import new_job_id
from viralfx.jobs.ledger import ProgressReport
from viralfx.jobs.model import Claim, JobDraft, JobError, failed
from viralfx.jobs.service import MAX_CHANGED, JobService

__all__ = ["client"]


async def claim(client: Client) -> Claim:
    """Claim the oldest waiting job, as a worker would."""
    ledger = ledger_of(client)
    await ledger.register("test", ["default"], 60.0)
    (claimed,) = await ledger.claim("default", "test", 1)
    return claimed


async def fail(client: Client, code: str = "error") -> None:
    """Fail the oldest waiting job."""
    error = JobError(code=code, message="planted", traceback="Traceback: planted")
    await ledger_of(client).settle([failed(await claim(client), error)])


async def test_a_waiting_job_is_cancelled_and_a_running_one_asked_to_end(client: Client) -> None:
    """With 200 and 202; a final job is a conflict. DELETE refuses a running one."""
    waiting = await accept(client)
    done = await client.post(f"{JOBS}/{waiting}/cancel")
    again = await client.post(f"{JOBS}/{waiting}/cancel")
    running = await accept(client)
    await claim(client)
    deleted = await client.delete(f"{JOBS}/{running}")
    asked = [await client.post(f"{JOBS}/{running}/cancel") for _ in range(2)]
    shown = (await client.get(f"{JOBS}/{running}")).json()
    missing = await client.post(f"{JOBS}/{running[:-1]}x/cancel")

    assert (done.status_code, done.json()["state"]) == (200, "cancelled")
    assert (again.status_code, deleted.status_code, missing.status_code) == (409, 409, 404)
    assert "is cancelled; only one that is waiting or active" in again.json()["detail"]
    assert [(each.status_code, each.json()["state"]) for each in asked] == [(202, "active")] * 2
    assert (shown["state"], shown["cancelRequested"]) == ("active", True)


async def test_a_job_shows_its_progress_and_its_failures(client: Client) -> None:
    """A list shows the progress alone."""
    job_id = await accept(client)
    claimed = await claim(client)
    report = b'{"current": 1, "total": 4, "message": null}'
    await ledger_of(client).report([ProgressReport(claim=claimed, progress=report)])
    error = JobError(code="timeout", message="late", traceback="Traceback: planted")
    await ledger_of(client).settle([failed(claimed, error)])
    job = (await client.get(f"{JOBS}/{job_id}")).json()
    (listed,) = (await client.get(JOBS)).json()["items"]
    (failure,) = job["failures"]

    assert job["progress"] == listed["progress"] == {"current": 1, "total": 4, "message": None}
    assert job["error"] == {"code": "timeout", "message": "late"}
    assert failure == {
        "number": 1,
        "startedAt": job["startedAt"],
        "endedAt": failure["endedAt"],
        "worker": "test",
        "code": "timeout",
        "message": "late",
        "traceback": "Traceback: planted",
    }
    assert job["startedAt"] <= failure["endedAt"] <= job["finishedAt"]
    assert "failures" not in listed


async def test_failed_jobs_are_retried_by_filter(client: Client) -> None:
    """Each field counts; the answer is how many."""
    ids = []
    for code in ("error", "timeout", "timeout"):
        ids.append(await accept(client))
        await fail(client, code)

    async def retry(**wanted: str) -> int:
        reply = await client.post(f"{JOBS}/retry", json=wanted)
        assert reply.status_code == 200, reply.text
        return int(reply.json()["count"])

    created = (await client.get(f"{JOBS}/{ids[0]}")).json()["createdAt"]
    assert await retry(code="unknown_task") == 0
    assert await retry(queue="analytics") == 0
    assert await retry(before=created) == 0
    assert await retry(before="0001-01-01T00:00:00+10:00") == 0
    assert await retry(code="timeout", before=ids[2]) == 1
    assert await retry(task="parcels.ship", queue="default", state="failed", code="timeout") == 1
    assert await retry(before="9999-12-31T23:59:59-10:00") == 1
    states = [(await client.get(f"{JOBS}/{job_id}")).json()["state"] for job_id in ids]
    assert states == ["waiting"] * 3


async def test_a_change_of_many_jobs_has_a_bound(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer says that others may be left; the next request takes them."""
    for method in (JobService.retry_all, JobService.cancel_all):
        monkeypatch.setattr(inspect.unwrap(method), "__kwdefaults__", {"most": 100})
    ledger = ledger_of(client)
    draft = JobDraft(id="", queue="default", task="parcels.ship", payload=b"1")
    drafts = [replace(draft, id=new_job_id()) for _ in range(250)]
    await ledger.accept(drafts)
    await ledger.register("test", ["default"], 60.0)
    claims = await ledger.claim("default", "test", 250)
    await ledger.settle(
        [failed(each, JobError(code="error", message="planted")) for each in claims]
    )
    for change in ("retry", "cancel"):
        replies = [
            await client.post(f"{JOBS}/{change}", json={"task": "parcels.ship"}) for _ in range(3)
        ]
        assert [reply.json() for reply in replies] == [
            {"count": 100, "more": True},
            {"count": 100, "more": True},
            {"count": 50, "more": False},
        ]

    assert MAX_CHANGED == 100_000


async def test_a_waiting_job_is_run_now(client: Client) -> None:
    """With 202; a job in another state is a conflict."""
    job_id = await accept(client, runAt="2999-01-01T00:00:00Z")
    reply = await client.post(f"{JOBS}/{job_id}/run")
    await claim(client)
    again = await client.post(f"{JOBS}/{job_id}/run")
    missing = await client.post(f"{JOBS}/{job_id[:-1]}x/run")
    job = (await client.get(f"{JOBS}/{job_id}")).json()

    assert (reply.status_code, reply.json()["state"]) == (202, "waiting")
    assert (again.status_code, missing.status_code) == (409, 404)
    assert "is active; only one that is waiting can be run now" in again.json()["detail"]
    assert job["runAt"] <= job["startedAt"]


async def test_a_queue_that_only_the_ledger_knows_is_no_mistake(client: Client) -> None:
    """Workers of another configuration consume it."""
    await ledger_of(client).register("elsewhere", ["reports"], 10.0)
    page = await client.get(f"{JOBS}?queue=reports")
    retried = await client.post(f"{JOBS}/retry", json={"queue": "reports"})

    assert (page.status_code, page.json()["items"]) == (200, [])
    assert (retried.status_code, retried.json()) == (200, {"count": 0, "more": False})


async def test_jobs_are_cancelled_by_filter(client: Client) -> None:
    """The waiting ones at once, and the running ones as by a request for each."""
    running = await accept(client)
    await claim(client)
    waiting = await accept(client)
    reply = await client.post(f"{JOBS}/cancel", json={"task": "parcels.ship"})
    again = await client.post(f"{JOBS}/cancel", json={"state": "active"})

    assert (reply.status_code, reply.json()) == (200, {"count": 2, "more": False})
    assert again.json() == {"count": 0, "more": False}
    assert (await client.get(f"{JOBS}/{running}")).json()["cancelRequested"]
    assert (await client.get(f"{JOBS}/{waiting}")).json()["state"] == "cancelled"


async def test_an_invalid_change_of_many_jobs_is_rejected(client: Client) -> None:
    """No job is changed by a misspelt filter."""
    for change, body, status, text in (
        ("retry", {}, 400, "needs at least one field"),
        ("cancel", {}, 400, "needs at least one field"),
        ("retry", [], 400, "Expected `object`, got `array`"),
        ("retry", {"tasks": "a"}, 400, "unknown field `tasks`"),
        ("retry", {"task": None}, 400, "`$.task`"),
        ("retry", {"task": ""}, 400, "`$.task`"),
        ("retry", {"state": "done"}, 400, "`$.state`"),
        ("retry", {"state": "waiting"}, 400, "Only jobs that are failed can be retried"),
        ("cancel", {"state": "failed"}, 400, "Only jobs that are waiting or active can be"),
        ("retry", {"before": "tomorrow"}, 400, "`$.before` must be a time with a time zone"),
        ("retry", {"before": "2026"}, 400, "`$.before` must be a time"),
        ("retry", {"before": "2026-01-01T00:00:00"}, 400, "`$.before` must be a time"),
        ("retry", {"queue": "nothing"}, 422, "There is no queue 'nothing'"),
    ):
        reply = await client.post(f"{JOBS}/{change}", json=body)

        assert reply.status_code == status, reply.text
        assert text in reply.json()["detail"]


async def test_a_change_without_a_body_is_rejected(client: Client) -> None:
    """As one with a body of another type."""
    empty = await client.post(f"{JOBS}/retry")
    typed = await client.post(
        f"{JOBS}/cancel", content=b"{}", headers={"Content-Type": "text/plain"}
    )

    assert (empty.status_code, typed.status_code) == (400, 415)
