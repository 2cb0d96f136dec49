"""The data and the actions of the console."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from tests.servers.waiting import until
from tests.web.console_site import (
    MARKUP,
    SESSION,
    Answer,
    Site,
    acted,
    audited,
    opened,
)

from viralfx import task
from viralfx.core.errors import LedgerUnavailableError
from viralfx.web.console import data

# -- actions -----------------------------------------------------------------------------------


async def test_actions_act_and_are_logged(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """One line each, with the first digits of the session."""
    headers = await site.log_in()
    digits = headers["cookie"].split(".")[2][:6]

    async def act(*path: str, **body: object) -> Answer:
        return await site.ask("/".join(("ui/data", *path)), "POST", headers=headers, body=body)

    opened = await act("circuits", MARKUP, "open")
    assert (opened.status, opened.json()["state"]) == (200, "OPEN")
    assert (await act("circuits", MARKUP, "close")).json()["state"] == "CLOSED"
    assert (await act("circuits", "a/b", "open")).status == 404
    assert (await act("queues", "default", "pause")).json()["paused"] is True
    assert (await act("queues", "default", "resume")).json()["paused"] is False
    assert (await act("queues", "nothing", "pause")).status == 404
    level = (await act("loggers", "viralfx.health", "level", level="debug", minutes=30)).json()
    assert (level["level"], level["returnsAt"] is not None) == ("debug", True)
    level = (await act("loggers", "viralfx.health", "level", level=None)).json()
    assert level["returnsAt"] is None
    assert (await act("loggers", "viralfx.health", "level", level="loud")).status == 400
    checked = (await act("status", "checks", "run")).json()
    assert "marked" in [each["name"] for each in checked["checks"]]
    assert (await act("stop", "another", "begin")).json()["code"] == "instance"
    own = site.plugin.operations.instance
    assert (await act("stop", own, "begin")).json()["code"] == "unstaged"
    assert (await act("status", "checks", "run", more=1)).status == 400

    unknown = "there is no queue 'nothing'; there are analytics, default, notifications"
    assert [each[1:] for each in acted(caplog)] == [
        ("circuit.open", MARKUP, "done", None),
        ("circuit.close", MARKUP, "done", None),
        ("circuit.open", "a/b", "refused", "there is no such circuit"),
        ("queue.pause", "default", "done", None),
        ("queue.resume", "default", "done", None),
        ("queue.pause", "nothing", "refused", unknown),
        ("logger.level", "viralfx.health", "done", "for 30 min"),
        ("logger.level", "viralfx.health", "done", None),
        ("checks.run", "checks", "done", None),
        ("process.stop", "another", "refused", "another instance"),
        ("process.stop", own, "refused", "this server handles its own stop"),
    ]
    assert {digits} == {each[0] for each in acted(caplog)}
    changes = {(each["action"], each.get("before"), each.get("after")) for each in audited(caplog)}
    assert {
        ("circuit.open", "CLOSED", "OPEN"),
        ("circuit.close", "OPEN", "CLOSED"),
        ("queue.pause", None, "paused"),
    } <= changes
    # The level of its parents is that of the run.
    assert ("logger.level", "debug") in {change[:2] for change in changes}


async def test_schedules_are_paused_resumed_and_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A run is a job of its own; a task without a schedule is unknown."""

    @task("console.yearly", cron="0 3 1 1 *")
    async def yearly(payload: object) -> None:
        pass

    site = Site(tasks=[yearly])
    headers = await site.log_in()

    async def act(name: str, verb: str) -> Answer:
        return await site.ask(f"ui/data/schedules/{name}/{verb}", "POST", headers=headers, body={})

    assert (await act("console.yearly", "pause")).json()["paused"] is True
    listed = (await site.ask("ui/data/schedules", headers=headers)).json()["items"]
    paused = {each["task"]: each["paused"] for each in listed}
    assert paused["console.yearly"] is True
    assert (await act("console.yearly", "resume")).json()["paused"] is False
    ran = await act("console.yearly", "run")
    assert (ran.status, ran.json()["task"], ran.json()["state"]) == (
        202,
        "console.yearly",
        "waiting",
    )
    assert (await act("console.monthly", "run")).status == 404
    assert [each[1:] for each in acted(caplog)] == [
        ("schedule.pause", "console.yearly", "done", None),
        ("schedule.resume", "console.yearly", "done", None),
        ("schedule.run", "console.yearly", "done", f"job {ran.json()['id']}"),
        ("schedule.run", "console.monthly", "refused", acted(caplog)[-1][-1]),
    ]


async def test_a_pause_is_shown_at_once(site: Site) -> None:
    """Pages share the counts of the queues for a second, also those of a read before the pause."""
    headers = await site.log_in()
    service = site.plugin.assembly.jobs.service
    pages = site.plugin.endpoints.console.feed  # type: ignore[union-attr]
    (page,) = await opened(pages, 1, everything=True)

    async def act(verb: str) -> bool:
        path = f"ui/data/queues/default/{verb}"
        return bool((await site.ask(path, "POST", headers=headers, body={})).json()["paused"])

    async def shown() -> bool:
        items = (await site.ask("ui/data/queues", headers=headers)).json()["items"]
        return "default" in [each["name"] for each in items if each["paused"]]

    assert await shown() is False
    assert await act("pause") is True
    assert await shown() is True
    await until(lambda: b'"paused":true' in b"".join(page.messages))

    counts, release = service.queues, asyncio.Event()

    async def slow() -> Any:
        found = await counts()
        await release.wait()
        return found

    console = site.plugin.endpoints.console
    assert console is not None
    console._data.queue_counts.forget()
    console._data.queue_counts._load = slow
    early = asyncio.ensure_future(shown())
    await until(lambda: bool(console._data.queue_counts._flight._flights))
    console._data.queue_counts._load = counts
    assert await act("resume") is False
    release.set()
    assert await early is True
    assert await shown() is False
    page.task.cancel()


async def test_two_tabs_cannot_act_twice_on_one_job(site: Site) -> None:
    """The second one gets 409, and a larger number of matching jobs than was seen gets it, too."""
    service = site.plugin.assembly.jobs.service
    later = datetime.now(UTC) + timedelta(hours=1)
    ids = [
        (await service.submit("default.prune", None, run_at=later, key=str(n))).job.id
        for n in range(4)
    ]
    headers = await site.log_in()

    async def act(path: str, **body: object) -> Answer:
        return await site.ask(f"ui/data/jobs/{path}", "POST", headers=headers, body=body)

    run = await act(f"{ids[0]}/run")
    assert (run.status, run.json()["state"]) == (200, "waiting")
    assert datetime.fromisoformat(run.json()["runAt"]) < later
    one = await act(f"{ids[0]}/cancel")
    assert (one.status, one.json()["state"]) == (200, "cancelled")
    for verb in ("cancel", "run"):
        again = await act(f"{ids[0]}/{verb}")
        assert (again.status, again.json()["code"]) == (409, "state")
    assert (await act("no id/retry")).status == 404

    query = "action=cancel&task=default.prune"
    counted = await site.ask("ui/data/jobs/all", headers=headers, query=query)
    assert counted.json() == {"available": True, "count": 3, "atLeast": False}
    grown = await act("all/cancel", filter={"task": "default.prune"}, count=2)
    assert (grown.status, grown.json()["errors"]) == (409, [{"count": 3}])
    assert (await act("all/cancel", filter={}, count=9)).status == 400
    since = {"since": "2999-01-01T00:00:00Z"}
    assert (await act("all/cancel", filter=since, count=0)).json() == {"count": 0}
    since = {"task": "default.prune", "since": "2020-01-01T00:00:00Z"}
    assert (await act("all/cancel", filter=since, count=3)).json() == {"count": 3}
    listed = await site.ask("ui/data/jobs", headers=headers, query="state=cancelled&limit=3")
    assert len(listed.json()["items"]) == 3


async def test_a_change_of_many_jobs_changes_no_more_than_were_confirmed(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if further jobs match between the count and the change; "at least" has no limit."""
    service, headers = site.plugin.assembly.jobs.service, await site.log_in()
    console = site.plugin.endpoints.console
    assert console is not None
    matching, later = console._data.matching, datetime.now(UTC) + timedelta(hours=1)

    async def submit(count: int) -> None:
        for _ in range(count):
            await service.submit("default.prune", None, run_at=later)

    async def then_more(query: Any, action: str) -> list[str]:
        found = await matching(query, action)
        await submit(2)
        return found

    async def cancel(count: int) -> Any:
        body = {"filter": {"task": "default.prune"}, "count": count}
        answer = await site.ask("ui/data/jobs/all/cancel", "POST", headers=headers, body=body)
        return answer.json()

    monkeypatch.setattr(console._data, "matching", then_more)
    await submit(3)
    assert await cancel(3) == {"count": 3}
    assert await cancel(data.MAX_COUNTED) == {"count": 4}


async def test_a_failing_ledger_ends_a_change_of_many_jobs(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The answer and the log say so, and the answer says how many jobs were changed."""
    headers = await site.log_in()
    service = site.plugin.assembly.jobs.service
    since, later = "2026-01-01T00:00:00Z", datetime.now(UTC) + timedelta(hours=1)
    for number in range(3):
        await service.submit("default.prune", None, run_at=later, key=str(number))
    cancel, calls = service.cancel, 0

    async def fails_later(job_id: str) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise LedgerUnavailableError("the connection is lost")
        return await cancel(job_id)

    monkeypatch.setattr(service, "cancel", fails_later)
    body = {"filter": {"since": since}, "count": 3}
    answer = await site.ask("ui/data/jobs/all/cancel", "POST", headers=headers, body=body)
    assert (answer.status, answer.json()["code"]) == (503, "ledger")
    assert answer.json()["detail"] == "1 job was changed; then the connection is lost"
    detail = "1 job was changed; then the connection is lost"
    assert [each[1:] for each in acted(caplog)] == [
        ("jobs.cancel", f"since={since}", "failed", detail)
    ]


async def test_an_action_is_logged_if_its_client_left(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Some servers cancel the request then; the action goes on."""
    began = asyncio.Event()

    async def hanging(_: str) -> None:
        began.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(site.plugin.assembly.jobs.service, "cancel", hanging)
    headers = await site.log_in()
    cancel = site.ask("ui/data/jobs/a job/cancel", "POST", headers=headers, body={})
    request = asyncio.ensure_future(cancel)
    await began.wait()
    request.cancel()
    await until(lambda: acted(caplog))
    assert [each[1:] for each in acted(caplog)] == [
        ("job.cancel", "a job", "failed", "CancelledError")
    ]


async def test_a_search_for_an_action_ends(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would read a large ledger to its end, for a page that has long gone."""
    monkeypatch.setattr(data, "_SEARCH_SECONDS", -1.0)
    service = site.plugin.assembly.jobs.service
    later = datetime.now(UTC) + timedelta(hours=1)
    for number in range(150):
        await service.submit("default.prune", None, run_at=later, key=str(number))
    headers = await site.log_in()
    query = "action=cancel&task=default.prune"
    answer = await site.ask("ui/data/jobs/all", headers=headers, query=query)

    assert answer.json()["available"] is False
    assert "narrow the filter" in answer.json()["detail"]


async def test_payloads_are_hidden_unless_the_application_shows_them(site: Site) -> None:
    """A large text is cut, and its size is shown."""
    shown = Site(show_payload=lambda task, content: f"{task}: {content.decode()}")
    content = {"text": MARKUP + "x" * 100_000}
    for each, hidden in ((site, True), (shown, False)):
        service = each.plugin.assembly.jobs.service
        job = (await service.submit("default.prune", None)).job
        ledger = each.plugin.assembly.jobs.ledger
        stored = msgspec.json.encode(content)
        ledger._jobs[job.id] = replace(job, payload=stored)  # type: ignore[attr-defined]
        headers = await each.log_in()
        view = (await each.ask(f"ui/data/jobs/{job.id}", headers=headers)).json()
        assert (view["payload"] is None, view["payloadHidden"]) == (hidden, hidden)
        assert view["payloadBytes"] == len(stored)
        assert view["cut"] is not hidden


async def test_a_failing_show_payload_hides_the_payload_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The rest of the job is shown, and one log line names the error, without its message."""

    def fail(_task: str, _content: bytes) -> str:
        raise KeyError("card")

    broken = Site(show_payload=fail)
    job = (await broken.plugin.assembly.jobs.service.submit("default.prune", None)).job
    headers = await broken.log_in()
    for _ in range(3):
        view = (await broken.ask(f"ui/data/jobs/{job.id}", headers=headers)).json()
        assert (view["payload"], view["payloadHidden"], view["task"]) == (None, True, job.task)
    lines = [r for r in caplog.records if r.getMessage().startswith("Payload is hidden")]
    assert [line.__dict__["reason"] for line in lines] == ["KeyError"]


async def test_a_level_that_was_changed_elsewhere_does_not_return(site: Site) -> None:
    """The console's timer undoes its own change, not a later one by ``PUT /loggers/{name}``."""
    headers = await site.log_in()
    name, soon = "viralfx.health", 0.05 / 60
    levels = site.plugin.endpoints.console._data.levels  # type: ignore[union-attr]

    async def lower() -> object:
        path, body = f"ui/data/loggers/{name}/level", {"level": "debug", "minutes": soon}
        answer = await site.ask(path, "POST", headers=headers, body=body)
        return answer.json()["returnsAt"]

    assert await lower() is not None
    await until(lambda: levels.get(name).level is None)
    assert await lower() is not None
    levels.set(name, "error")
    shown = (await site.ask("ui/data/loggers", headers=headers)).json()["items"]
    assert [each["returnsAt"] for each in shown if each["name"] == name] == [None]
    timer = site.plugin.endpoints.console._data._returning  # type: ignore[union-attr]
    await until(lambda: name not in timer)
    assert levels.get(name).level == "error"
    levels.set(name, None)


@pytest.mark.parametrize("view", ["audit", "fleet/changes", "jobs", "jobs/all", "status/history"])
async def test_a_nul_in_a_query_is_the_client_s_error(site: Site, view: str) -> None:
    """Postgres stores no NUL; without this the page would say that the database is down."""
    headers = await site.log_in()
    query = "action=retry&check=%00&task=%00&hours=%00"
    assert (await site.ask(f"ui/data/{view}", headers=headers, query=query)).status == 400
    body = {"filter": {"task": "\0"}, "count": 1}
    answer = await site.ask("ui/data/jobs/all/retry", "POST", headers=headers, body=body)
    assert answer.status == 400
    assert (await site.ask("ui/data/jobs/\0", headers=headers)).status == 404


async def test_every_response_has_the_security_headers(site: Site) -> None:
    """Data, actions and errors as well as files: no sniffing, no other origin may embed them."""
    headers = await site.log_in()
    answers = [
        await site.ask("ui/data/status"),
        await site.ask("ui/data/jobs"),
        await site.ask("ui/data/jobs/1", headers=headers),
        await site.ask("ui/data/status/checks/run", "POST", headers=headers, body={}),
        await site.ask("ui/data/status/checks/run", "POST", headers=headers, body={"more": 1}),
        await site.ask("ui/data/status/checks/run"),
        await site.ask("ui/data/nothing"),
        await site.ask(SESSION),
        await site.ask(SESSION, "PUT"),
        await site.ask(SESSION, "DELETE"),
        await site.ask("events", "POST"),
        await site.ask("ui/data/fleet", "POST", headers=headers),
        await site.ask("ui/app.js", "POST"),
        await site.ask("ui/none.js"),
    ]
    for answer in answers:
        assert answer.header("x-content-type-options") == "nosniff"
        assert answer.header("cross-origin-resource-policy") == "same-origin"
