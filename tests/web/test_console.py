"""The console: its files, its sessions, the proof of origin, its data and its actions."""

import asyncio
import gzip
import json
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.servers.waiting import until

from viralfx import CircuitBreaker, OperationsConfig, OperationsPlugin, task
from viralfx.domain.fleet import CheckChange, FleetUnavailableError
from viralfx.domain.health.model import Observation, Status
from viralfx.domain.jobs.ledger import QueueCounts
from viralfx.domain.jobs.model import LedgerUnavailableError
from viralfx.settings import Secret, Settings
from viralfx.web.auth import AccessPolicy
from viralfx.web.console import data, feed
from viralfx.web.console.access import SESSION_SECONDS, ConsoleAccess
from viralfx.web.console.assets import Assets
from viralfx.web.error_log import is_logged
from viralfx.web.gate import Gate
from viralfx.web.responses import EventStream, Message

TOKEN = "a token of operators"
SETTINGS = Settings(management_token=Secret(TOKEN), health_check_interval=0.1)
MARKUP = "<img src=x onerror=alert(1)>"
SESSION = "ui/session"
OWN = {"origin": "http://console.test", "content-type": "application/json"}


class MarkedCheck:
    """A check with markup in its texts."""

    def __init__(self) -> None:
        self.status = Status.PASS
        self.message = MARKUP

    async def check(self) -> Observation:
        """Return the status."""
        return Observation(
            status=self.status, message=self.message, code=MARKUP, details={MARKUP: MARKUP}
        )


@dataclass
class Answer:
    """A response of the gate."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def json(self) -> Any:
        """Return the body."""
        return json.loads(self.body)

    def header(self, name: str) -> str:
        """Return a header."""
        return dict(self.headers)[name]


class Site:
    """A process with a console, asked through its gate."""

    def __init__(self, settings: Settings = SETTINGS, **config: Any) -> None:
        self.check = MarkedCheck()
        self.breaker = CircuitBreaker(name=MARKUP)
        self.plugin = OperationsPlugin(
            OperationsConfig(
                settings=settings,
                checks={"marked": self.check},
                breakers=[self.breaker],
                **config,
            )
        )
        self.gate = Gate(self.plugin.endpoints)

    async def ask(
        self,
        path: str,
        method: str = "GET",
        *,
        headers: Mapping[str, str] | None = None,
        body: object = None,
        query: str = "",
    ) -> Answer:
        """Send a request."""
        sent: list[Message] = []
        content = b"" if body is None else json.dumps(body).encode()

        async def receive() -> Message:
            return {"type": "http.request", "body": content, "more_body": False}

        async def send(message: Message) -> None:
            sent.append(message)

        given = {"host": "console.test", **(headers or {})}
        await self.gate(
            {
                "type": "http",
                "method": method,
                "path": f"/health/{path}",
                "query_string": query.encode(),
                "headers": [(k.encode(), v.encode("latin-1")) for k, v in given.items()],
                "client": ("127.0.0.1", 1),
            },
            receive,
            send,
        )
        return Answer(
            sent[0]["status"],
            [(k.decode(), v.decode()) for k, v in sent[0]["headers"]],
            b"".join(message.get("body", b"") for message in sent[1:]),
        )

    async def log_in(self, **more: str) -> dict[str, str]:
        """Log in, and return the headers of the console's own requests."""
        answer = await self.ask(SESSION, "POST", headers={**OWN, **more}, body={"token": TOKEN})
        assert answer.status == 204, answer.body
        return {**OWN, "cookie": answer.header("set-cookie").split(";")[0]}

    async def logged_in(self, headers: Mapping[str, str]) -> bool:
        """Return whether a request has a session."""
        state = (await self.ask(SESSION, headers=headers)).json()
        assert state["reads"] == ("all" if state["loggedIn"] else "status")
        return bool(state["loggedIn"])


def acted(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str, str, str]]:
    """Return the log lines of the actions: session, action, target and outcome."""
    lines = [each.__dict__ for each in caplog.records if each.msg == "Console action"]
    assert {line["peer"] for line in lines} <= {"127.0.0.1"}
    names = ("session", "action", "target", "outcome")
    return [tuple(line[name] for name in names) for line in lines]  # type: ignore[misc]


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    """Return a started process."""
    site = Site()
    await site.plugin.operations.start()
    yield site
    await site.plugin.operations.shutdown.run()


# -- files -------------------------------------------------------------------------------------


def folder(tmp_path: Path) -> Assets:
    """Return the files of a folder with a page and a file that is not served."""
    (tmp_path / "vendor").mkdir()
    (tmp_path / "index.html").write_text("<!doctype html>" + "x" * 1000)
    (tmp_path / "vendor" / "a.js").write_text("export {}")
    (tmp_path / "vendor.toml").write_text("secret")
    return Assets(tmp_path)


def test_files_are_compressed_and_checked_by_their_tag(tmp_path: Path) -> None:
    """A page that has the file gets 304; a client without gzip gets the plain bytes."""
    assets = folder(tmp_path)
    plain = assets.respond("index.html", "GET", [])
    zipped = assets.respond("index.html", "GET", [(b"accept-encoding", b"br, gzip;q=0.5")])
    refused = assets.respond("index.html", "GET", [(b"accept-encoding", b"gzip;q=0")])
    tag = dict(plain.headers)[b"etag"]
    again = assets.respond("index.html", "GET", [(b"if-none-match", b'"x", W/' + tag)])

    assert gzip.decompress(zipped.body) == plain.body == refused.body
    assert dict(zipped.headers)[b"content-encoding"] == b"gzip"
    assert (again.status, again.body) == (304, b"")
    assert dict(plain.headers)[b"cache-control"] == b"no-cache"


@pytest.mark.parametrize(
    "name", ["", "nothing.js", "vendor.toml", "../pyproject.toml", "vendor/../index.html", "/a.js"]
)
def test_nothing_but_files_of_the_page_is_served(tmp_path: Path, name: str) -> None:
    """A path is a key and never opens a file."""
    assert folder(tmp_path).respond(name, "GET", []).status == 404


async def test_no_other_page_may_frame_or_script_the_console(site: Site) -> None:
    """The headers stand on files, on the session and on the stream."""
    for path in ("ui", "ui/nothing.js", SESSION, "ui/data/jobs", "ui/data/nothing"):
        headers = dict((await site.ask(path)).headers)
        policy = headers["content-security-policy"]
        assert "frame-ancestors 'none'" in policy
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-frame-options"] == "DENY"
        assert headers["cross-origin-opener-policy"] == "same-origin"
        assert headers["x-content-type-options"] == "nosniff"


# -- sessions ----------------------------------------------------------------------------------


async def test_a_token_becomes_a_cookie_that_no_script_reads(site: Site) -> None:
    """It is for this path, this site and this browser session of eight hours."""
    answer = await site.ask(SESSION, "POST", headers=OWN, body={"token": TOKEN})
    cookie = answer.header("set-cookie")

    assert "; Path=/health; Max-Age=28800; " in cookie
    assert cookie.endswith("; HttpOnly; SameSite=Strict")
    assert TOKEN not in str(answer)
    over_tls = {**OWN, "origin": "https://console.test", "host": "console.test:443"}
    answer = await site.ask(SESSION, "POST", headers=over_tls, body={"token": TOKEN})
    assert answer.header("set-cookie").endswith("; Secure")


async def test_a_client_without_an_origin_logs_in(site: Site) -> None:
    """It is no browser; its actions need an Origin nevertheless."""
    headers = {"content-type": "application/json"}
    answer = await site.ask(SESSION, "POST", headers=headers, body={"token": TOKEN})
    assert answer.status == 204
    cookie = {"cookie": answer.header("set-cookie").split(";")[0]}
    assert (await site.ask("ui/data/jobs", headers=cookie)).status == 200
    path = "ui/data/status/checks/run"
    refused = await site.ask(path, "POST", headers={**headers, **cookie}, body={})
    assert refused.status == 403


async def test_wrong_tokens_and_foreign_origins_get_no_session(site: Site) -> None:
    """Also with a form's content type, and from another site of the browser."""
    wrong: list[tuple[dict[str, str], str, int, str]] = [
        (OWN, "guess", 401, "token"),
        (OWN, "", 401, "token"),
        ({**OWN, "origin": "http://evil.test"}, TOKEN, 403, "origin"),
        ({**OWN, "origin": "null"}, TOKEN, 403, "origin"),
        ({**OWN, "content-type": "text/plain"}, TOKEN, 403, "origin"),
        ({"origin": OWN["origin"]}, TOKEN, 403, "origin"),
        ({**OWN, "sec-fetch-site": "same-site"}, TOKEN, 403, "origin"),
    ]
    for headers, token, status, code in wrong:
        answer = await site.ask(SESSION, "POST", headers=headers, body={"token": token})
        assert (answer.status, answer.json()["code"]) == (status, code), headers
        assert "set-cookie" not in dict(answer.headers)


async def test_a_log_in_makes_a_new_session(site: Site) -> None:
    """No value of the client survives in it: fixation has nothing to fix."""
    first = await site.log_in()
    second = await site.log_in(cookie=first["cookie"])
    planted = first["cookie"].partition("=")[0] + "=4102444800.000000000000000000000000.00"
    third = await site.log_in(cookie=planted)

    assert len({first["cookie"], second["cookie"], third["cookie"]}) == 3
    assert not await site.logged_in({"cookie": planted})
    assert await site.logged_in({"cookie": f"{planted}; {third['cookie']}"})


async def test_a_changed_cookie_is_no_session(site: Site) -> None:
    """Each byte is signed."""
    headers = await site.log_in()
    name, _, value = headers["cookie"].partition("=")
    end, number, mac = value.split(".")
    for forged in (
        f"{int(end) + 1}.{number}.{mac}",
        f"{end}.{'0' * len(number)}.{mac}",
        f"{end}.{number}.{'0' * len(mac)}",
        f"{end}.{number}",
        "",
        "....",
        "x" * 9000,
    ):
        assert not await site.logged_in({"cookie": f"{name}={forged}"}), forged


async def test_a_session_ends_after_eight_hours(site: Site) -> None:
    """The end is in the cookie, and the server's clock decides."""
    headers = await site.log_in()
    state = (await site.ask(SESSION, headers=headers)).json()
    ends = datetime.fromisoformat(state["expiresAt"])
    assert abs((ends - datetime.now(UTC)).total_seconds() - SESSION_SECONDS) < 60

    class Later:
        def now(self) -> datetime:
            return ends + timedelta(seconds=1)

        def monotonic(self) -> float:
            return 0.0

        async def sleep(self, seconds: float) -> None:
            await asyncio.sleep(seconds)

    policy = AccessPolicy.from_settings(SETTINGS)
    access = ConsoleAccess(policy, path="/health", clock=Later())
    assert access.session([(b"cookie", headers["cookie"].encode())]) is None


async def test_a_stream_ends_with_its_session(site: Site) -> None:
    """The page connects again, and must log in."""
    console = site.plugin.endpoints.console
    assert console is not None
    access = console._access
    value = access.make(int(datetime.now(UTC).timestamp()) + 2)
    cookie = b"%b=%b" % (access.name, value)
    stream = console.endpoints["/health/events"]("GET", b"", [(b"cookie", cookie)])
    assert isinstance(stream, EventStream)
    sent: list[Message] = []

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    async with asyncio.timeout(30):
        await stream.serve({"method": "GET"}, receive, send, (b"x", b"y"))
    assert sent[-1]["more_body"] is False
    answer = await site.ask("ui/data/jobs", headers={"cookie": cookie.decode()})
    assert (answer.status, answer.json()["code"]) == (401, "session")


async def test_another_token_ends_all_sessions(site: Site) -> None:
    """The key of a session is that of its token."""
    headers = await site.log_in()
    other = Site(msgspec.structs.replace(SETTINGS, management_token=Secret("the next one")))
    assert not await other.logged_in(headers)
    assert await Site().logged_in(headers)


async def test_a_log_out_removes_the_cookie(site: Site) -> None:
    """Not for a page of another origin."""
    headers = await site.log_in()
    foreign = {**headers, "origin": "http://evil.test"}
    assert (await site.ask(SESSION, "DELETE", headers=foreign)).status == 403
    for own in (headers, {"cookie": headers["cookie"]}):
        answer = await site.ask(SESSION, "DELETE", headers=own)
        assert answer.status == 204
        assert "Max-Age=0" in answer.header("set-cookie")


# -- who may what ------------------------------------------------------------------------------

ACTIONS = [
    "status/checks/run",
    "stop/this/begin",
    "jobs/1/retry",
    "jobs/1/run",
    "jobs/all/cancel",
    "queues/default/pause",
    "schedules/default.prune/run",
    "circuits/supplier/open",
    "loggers/root/level",
    "settings/doctor/run",
]


@pytest.mark.parametrize("action", ACTIONS)
async def test_an_action_needs_a_session_and_the_console_itself(
    site: Site, action: str, caplog: pytest.LogCaptureFixture
) -> None:
    """No refused request is logged as an action."""
    own = await site.log_in()
    for headers, status, code in (
        (OWN, 401, "session"),
        ({**OWN, "authorization": f"Bearer {TOKEN}"}, 401, "session"),
        ({**own, "origin": "http://evil.test"}, 403, "origin"),
        ({**own, "origin": "null"}, 403, "origin"),
        ({k: v for k, v in own.items() if k != "origin"}, 403, "origin"),
        ({k: v for k, v in own.items() if k != "content-type"}, 403, "origin"),
        ({**own, "content-type": "text/plain"}, 403, "origin"),
        ({**own, "sec-fetch-site": "cross-site"}, 403, "origin"),
    ):
        answer = await site.ask(f"ui/data/{action}", "POST", headers=headers, body={})
        assert (answer.status, answer.json()["code"]) == (status, code), headers
    reading = await site.ask(f"ui/data/{action}", headers=own)
    assert (reading.status, reading.header("allow")) == (405, "POST")
    assert acted(caplog) == []


@pytest.mark.parametrize(
    "path", ["", "nothing", "jobs/1/2/3", "checks/all/run", "status/other/run", "queues//pause"]
)
async def test_unknown_views_and_actions(site: Site, path: str) -> None:
    """Neither a view nor an action has another path; a job that there is not is 404, too."""
    headers = await site.log_in()
    assert (await site.ask(f"ui/data/{path}", headers=headers)).status == 404
    acting = await site.ask(f"ui/data/{path}", "POST", headers=headers, body={})
    assert acting.status == (405 if path.startswith("jobs/") else 404)


async def test_a_cookie_opens_nothing_but_the_console(site: Site) -> None:
    """The shutdown and the loggers want the bearer token, as before."""
    headers = await site.log_in()
    for path, method in (("shutdown", "POST"), ("shutdown", "GET"), ("loggers/root", "PUT")):
        assert (await site.ask(path, method, headers=headers, body={})).status == 401
    assert not site.plugin.operations.shutdown.triggered


STATUS_VIEWS = ["status", "status/history", "stop", "circuits"]
SESSION_VIEWS = [
    "fleet",
    "fleet/changes",
    "jobs",
    "jobs/all",
    "jobs/1",
    "queues",
    "schedules",
    "loggers",
    "settings",
    "settings/doctor",
]


async def test_reading_obeys_health_details(site: Site) -> None:
    """Status, stop and circuits follow the setting; the other views always need a session."""
    strict = Site(msgspec.structs.replace(SETTINGS, health_details="authorized"))
    bearer = {"authorization": f"Bearer {TOKEN}"}
    for view in STATUS_VIEWS:
        assert (await site.ask(f"ui/data/{view}")).json()["available"] is True
        assert (await strict.ask(f"ui/data/{view}")).status == 401
        assert (await strict.ask(f"ui/data/{view}", headers=bearer)).status == 200
    for view in SESSION_VIEWS:
        for headers in ({}, bearer):
            answer = await site.ask(f"ui/data/{view}", headers=headers)
            assert (answer.status, answer.json()["code"]) == (401, "session")
    assert (await strict.ask("events")).status == 401
    state = (await strict.ask(SESSION, query="start")).json()
    assert (state["reads"], state["start"]) == ("none", None)
    assert (await site.ask(SESSION)).json()["start"] is None
    own = await site.log_in()
    for view in {*STATUS_VIEWS, *SESSION_VIEWS} - {"jobs/1", "jobs/all"}:
        assert (await site.ask(f"ui/data/{view}", headers=own)).json()["available"] is True
    shown = await site.ask("ui/data/settings", headers=own)
    assert TOKEN not in shown.body.decode()


async def test_queues_and_jobs_in_flight_are_for_sessions(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the snapshots and in the events; the numbers of requests and jobs are for all."""
    console = site.plugin.endpoints.console
    assert console is not None
    monkeypatch.setattr(feed, "BEAT_SECONDS", 0.05)
    job = {"id": "a job", "task": "a task"}
    console.feed._in_flight = lambda: {"requests": 2, "jobCount": 1, "jobs": [job]}
    headers = await site.log_in()
    with_session = OpenPage(console.feed, ends_at=datetime.now(UTC) + timedelta(hours=1))
    without = OpenPage(console.feed)
    await until(lambda: bool(with_session.messages and without.messages))
    console.feed.on_counted({"secret": QueueCounts(waiting=3)})
    for each in (with_session, without):
        await until(lambda each=each: b"event: beat" in b"".join(each.messages))  # type: ignore[misc]
        each.task.cancel()
    public, private = b"".join(without.messages), b"".join(with_session.messages)
    assert b'"requests":2,"jobCount":1,"jobs":[]' in public
    for secret in (b"a job", b"secret"):
        assert secret not in public
        assert secret in private
    for own, number in ((headers, 1), ({}, 0)):
        snapshot = (await site.ask("ui/data/status", headers=own)).json()
        start = (await site.ask(SESSION, query="start", headers=own)).json()["start"]["snapshot"]
        assert [len(each["inFlight"]["jobs"]) for each in (snapshot, start)] == [number, number]
        assert [each["queues"] is None for each in (snapshot, start)] == [not number] * 2


async def test_views_without_a_token_take_few_connections(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal requests share one read, and others wait: the pool is for the application."""
    fleet, done = site.plugin.assembly.fleet, asyncio.Event()
    began: list[int] = []
    ended = 0

    async def history(_names: object, since: datetime) -> list[CheckChange]:
        nonlocal ended
        began.append(round((datetime.now(UTC) - since).total_seconds() / 3600))
        await done.wait()
        ended += 1
        return []

    monkeypatch.setattr(fleet, "history", history)
    asked = [
        asyncio.ensure_future(site.ask("ui/data/status/history", query=f"hours={hours}"))
        for hours in (1, 1, 1, 1, 2, 3, 4, 5, 6)
    ]
    await until(lambda: len(began) > 1)
    for _ in range(20):
        await asyncio.sleep(0)
    assert began == [1, 2]
    done.set()
    assert {(await each).status for each in asked} == {200}
    assert (began, ended) == ([1, 2, 3, 4, 5, 6], 6)


async def test_a_backend_without_an_answer_is_no_error_of_the_request(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A browser writes a line about each error status, as long as the fault lasts."""

    async def failing(*_: object, **__: object) -> Any:
        raise LedgerUnavailableError("the connection is lost")

    async def silent(*_: object, **__: object) -> Any:
        raise FleetUnavailableError("the database does not answer in time")

    assembly = site.plugin.assembly
    for name in ("search", "get", "queues", "schedules"):
        monkeypatch.setattr(assembly.jobs.service, name, failing)
    monkeypatch.setattr(site.plugin.endpoints.console._data.queue_counts, "_load", failing)  # type: ignore[union-attr]
    monkeypatch.setattr(site.plugin.endpoints.console._data._instances, "_load", silent)  # type: ignore[union-attr]
    monkeypatch.setattr(assembly.fleet, "changes", silent)
    headers = await site.log_in()
    views = ["jobs", "jobs/1", "queues", "schedules", "fleet", "fleet/changes", "status/history"]
    for view in views:
        answer = await site.ask(f"ui/data/{view}", headers=headers)
        detail = answer.json().pop("detail")
        assert (answer.status, answer.json()["code"]) == (200, "ledger"), view
        assert answer.json()["available"] is False
        assert detail in {"The connection is lost", "The database does not answer in time"}


async def test_the_page_knows_the_address_of_the_runbook() -> None:
    """Without one, it names the headings and links nothing."""
    assert (await Site().ask(SESSION)).json()["runbook"] is None
    there = Site(msgspec.structs.replace(SETTINGS, runbook_url="https://docs.example/runbook"))
    assert (await there.ask(SESSION)).json()["runbook"] == "https://docs.example/runbook"


async def test_the_console_can_be_off() -> None:
    """By CONSOLE=false, and in production without a token."""
    off = Site(msgspec.structs.replace(SETTINGS, console=False))
    production = Site(
        Settings(environment="production", allow_memory_adapters=True, api_token=Secret("x" * 40))
    )
    for site in (off, production):
        for path in ("ui", "events", SESSION, "ui/data/status", "ui/data/fleet"):
            assert (await site.ask(path)).status == 404


async def test_without_a_token_nothing_more_than_the_health_is_shown() -> None:
    """As in development: no session can be begun, and the answers name the variable."""
    site = Site(Settings())
    assert (await site.ask("ui/data/status")).status == 200
    refused = await site.ask("ui/data/jobs")
    assert (refused.status, refused.json()["code"]) == (401, "no_token")
    assert "MANAGEMENT_TOKEN" in refused.json()["detail"]
    acting = await site.ask("ui/data/status/checks/run", "POST", headers=OWN, body={})
    assert acting.status == 401
    log_in = await site.ask(SESSION, "POST", headers=OWN, body={"token": ""})
    assert (log_in.status, log_in.json()["code"]) == (403, "no_token")


@pytest.mark.parametrize("name", ["ui", "events"])
def test_a_check_cannot_have_a_name_of_the_console(name: str) -> None:
    """It would be hidden."""
    with pytest.raises(Exception, match=f"'{name}' cannot be a check's name"):
        OperationsPlugin(OperationsConfig(settings=SETTINGS, checks={name: MarkedCheck()}))


# -- actions -----------------------------------------------------------------------------------


async def test_actions_act_and_are_logged(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """One line each, with the first digits of the session."""
    headers = await site.log_in()
    digits = headers["cookie"].split(".")[1][:6]

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

    assert [each[1:] for each in acted(caplog)] == [
        ("open circuit", MARKUP, "ok"),
        ("close circuit", MARKUP, "ok"),
        ("open circuit", "a/b", "unknown"),
        ("pause queue", "default", "ok"),
        ("resume queue", "default", "ok"),
        ("pause queue", "nothing", "unknown"),
        ("logger level", "viralfx.health debug", "ok"),
        ("logger level", "viralfx.health back", "ok"),
        ("check now", "checks", "ok"),
        ("begin stop", "another", "refused"),
        ("begin stop", own, "refused"),
    ]
    assert {digits} == {each[0] for each in acted(caplog)}


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
        ("pause schedule", "console.yearly", "ok"),
        ("resume schedule", "console.yearly", "ok"),
        ("run schedule", "console.yearly", f"ok: job {ran.json()['id']}"),
        ("run schedule", "console.monthly", "unknown"),
    ]


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
    assert answer.json()["detail"] == "1 jobs were changed; then the connection is lost"
    assert [each[1:] for each in acted(caplog)] == [("cancel jobs", f"since={since}", "no answer")]


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
        ("cancel job", "a job", "error: CancelledError")
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


@pytest.mark.parametrize("view", ["fleet/changes", "jobs", "jobs/all", "status/history"])
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


async def test_the_stream_begins_with_a_snapshot_and_resumes_without_a_gap(site: Site) -> None:
    """A reconnect gets the missed frames; after a time without pages, a new snapshot."""
    feed = site.plugin.endpoints.console.feed  # type: ignore[union-attr]

    class Page:
        def __init__(self, last: str = "") -> None:
            self.frames: list[str] = []
            self.leave = asyncio.Event()
            self.task = asyncio.ensure_future(
                feed.stream(last, {"method": "GET"}, self.receive, self.send)
            )

        async def receive(self) -> Message:
            await self.leave.wait()
            return {"type": "http.disconnect"}

        async def send(self, message: Message) -> None:
            self.frames += [f for f in message.get("body", b"").decode().split("\n\n") if f]

        def events(self) -> list[str]:
            return [
                line[7:] for f in self.frames for line in f.split("\n") if line[:7] == "event: "
            ]

        def has_seen_the_failure(self) -> bool:
            return any("event: change" in f and '"new":"fail"' in f for f in self.frames)

        def last_id(self) -> str:
            return [line[4:] for f in self.frames for line in f.split("\n") if line[:4] == "id: "][
                -1
            ]

    first, other = Page(), Page()
    await until(lambda: "snapshot" in first.events() and "snapshot" in other.events())
    assert first.frames[0] == "retry: 1000"
    seen = first.last_id()
    first.leave.set()
    await first.task
    site.check.status = Status.FAIL
    await until(other.has_seen_the_failure)

    resumed = Page(seen)
    await until(resumed.has_seen_the_failure)
    assert "snapshot" not in resumed.events()
    data = [
        json.loads(line[6:])
        for f in resumed.frames
        for line in f.split("\n")
        if line[:6] == "data: "
    ]
    assert MARKUP in [each.get("message") for each in data]

    for page in (other, resumed):
        page.leave.set()
        await page.task
    assert feed.pages == 0
    site.check.status = Status.PASS
    await until(lambda: feed._missed)
    late = Page(resumed.last_id())
    await until(lambda: late.events() != [])
    assert late.events()[0] == "snapshot"
    late.leave.set()
    await late.task

    # A page that began with the snapshot of its session needs none, unless it missed something.
    frames: list[str] = []
    start: dict[str, Any] = {}
    for _ in range(10):  # The check may run just between the two.
        start = (await site.ask(SESSION, query="start")).json()["start"]
        begun = Page(start["id"])
        await until(lambda begun=begun: begun.frames != [])  # type: ignore[misc]
        begun.leave.set()
        await begun.task
        frames = begun.frames
        if frames == ["retry: 1000"]:
            break
    assert frames == ["retry: 1000"]
    assert start["snapshot"]["checks"][0]["status"] == "pass"
    await until(lambda: feed._missed)
    again = Page(start["id"])
    await until(lambda: again.events() != [])
    assert again.events()[0] == "snapshot"
    again.leave.set()
    await again.task


async def test_a_text_that_is_no_unicode_reaches_the_page(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the name of a file in the message of a check; the page goes on to get beats."""
    monkeypatch.setattr(feed, "BEAT_SECONDS", 0.05)
    site.check.message = "no file a\udcff"
    pages = site.plugin.endpoints.console.feed  # type: ignore[union-attr]
    body = b""

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        nonlocal body
        body += message.get("body", b"")

    stream = asyncio.ensure_future(pages.stream("", {"method": "GET"}, receive, send))
    await until(lambda: body.count(b"event: beat") > 2 and b"a\\\\udcff" in body)
    detailed = await site.ask("detailed")
    assert detailed.json()["checks"]["marked"]["message"] == "no file a\\udcff"
    stream.cancel()


async def test_a_view_that_raises_does_not_end_the_beats(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Pages would say that the process does not answer; and an uncaught error could end it."""
    caught: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: caught.append(context))
    monkeypatch.setattr(feed, "BEAT_SECONDS", 0.05)
    pages = site.plugin.endpoints.console.feed  # type: ignore[union-attr]
    body = b""

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        nonlocal body
        body += message.get("body", b"")

    stream = asyncio.ensure_future(pages.stream("", {"method": "GET"}, receive, send))
    await until(lambda: b"event: beat" in body)
    in_flight = pages._in_flight

    def failing() -> dict[str, Any]:
        raise RuntimeError("no view")

    pages._in_flight = failing
    await until(lambda: "Event of the console failed" in caplog.messages)
    pages._in_flight = in_flight
    seen = body.count(b"event: beat")
    await until(lambda: body.count(b"event: beat") > seen)
    stream.cancel()
    assert caught == []


async def test_a_query_with_many_fields_gets_400(site: Site) -> None:
    """As at the other paths."""
    assert (await site.ask("events", query="a=1&" * 25)).status == 400


async def test_pages_are_limited_and_do_not_cost_memory() -> None:
    """The page above the limit gets 503; one that does not read holds nothing but its position."""
    small = Site(msgspec.structs.replace(SETTINGS, console_max_streams=1))
    feed = small.plugin.endpoints.console.feed  # type: ignore[union-attr]
    blocked = asyncio.Event()

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await blocked.wait()

    stream = asyncio.ensure_future(feed.stream("", {"method": "GET"}, receive, send))
    await until(lambda: feed.pages == 1)
    answer = await small.ask("events")
    assert (answer.status, answer.header("retry-after")) == (503, "5")
    for _ in range(2000):
        feed._publish("change", {})
    assert len(feed._recent) <= 256
    await feed.end(0.01)
    stream.cancel()


class OpenPage:
    """A page that keeps each message of its stream; a blocked one takes none after the first."""

    def __init__(
        self, feed: feed.Feed, *, blocked: bool = False, ends_at: datetime | None = None
    ) -> None:
        self.messages: list[bytes] = []
        self.ended = False
        self.error: BaseException | None = None
        self._blocked = blocked
        self._ends_at = ends_at
        self.task = asyncio.ensure_future(self._run(feed))

    async def _run(self, feed: feed.Feed) -> None:
        try:
            await feed.stream(
                "", {"method": "GET"}, self._receive, self._send, ends_at=self._ends_at
            )
        except asyncio.CancelledError as error:
            self.error = error

    async def _receive(self) -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            if self._blocked and self.messages:
                await asyncio.Event().wait()
            self.messages.append(message["body"])
            self.ended = not message["more_body"]


async def opened(pages: feed.Feed, count: int, *, blocked: bool = False) -> list[OpenPage]:
    """Open some pages that have got their snapshot."""
    made = [OpenPage(pages, blocked=blocked) for _ in range(count)]
    await until(lambda: all(each.messages for each in made))
    return made


@pytest.mark.parametrize(("count", "writes"), [(3, 3), (60, 1)])
async def test_many_pages_get_events_in_one_write(site: Site, count: int, writes: int) -> None:
    """With few pages each event goes at once."""
    pages = site.plugin.endpoints.console.feed  # type: ignore[union-attr]
    made = await opened(pages, count)
    # The first results of the checks are events, too.
    await until(
        lambda: all(b".%d\nevent: " % pages._last in b"".join(each.messages) for each in made)
    )
    before = [len(each.messages) for each in made]
    for name in ("one", "two", "three"):
        pages._publish("change", {"check": name})
        await asyncio.sleep(0)
    await until(lambda: all(b'"three"' in b"".join(each.messages) for each in made))
    for each, seen in zip(made, before, strict=True):
        # The service's own events may come between them.
        got = [m for m in each.messages[seen:] if re.search(rb'"(one|two|three)"', m)]
        assert len(got) == writes
        assert [name for name in (b'"one"', b'"two"', b'"three"') if name in b"".join(got)] == [
            b'"one"',
            b'"two"',
            b'"three"',
        ]
        each.task.cancel()


def test_pages_of_a_second_event_loop_get_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    """One plugin may serve several applications, each in a loop of its own."""
    pages = Site().plugin.endpoints.console.feed  # type: ignore[union-attr]

    async def visit(*, wait: bool) -> None:
        (page,) = await opened(pages, 1)
        if wait:
            await until(lambda: b"event: beat" in page.messages[-1])
        page.task.cancel()
        await page.task

    monkeypatch.setattr(feed, "BEAT_SECONDS", 3600.0)
    asyncio.run(visit(wait=False))
    monkeypatch.setattr(feed, "BEAT_SECONDS", 0.05)
    asyncio.run(visit(wait=True))


async def test_the_stop_waits_for_no_page(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page gets the last event and its end in one write, except a page that does not read."""
    monkeypatch.setattr(feed, "LAST_EVENT_SECONDS", 3600.0)
    pages = site.plugin.endpoints.console.feed  # type: ignore[union-attr]
    blocked = (await opened(pages, 1, blocked=True))[0]
    pages._publish("change", {})
    await asyncio.sleep(0)
    made = await opened(pages, 60)
    async with asyncio.timeout(30):
        await pages.end(3600.0)
    for each in made:
        assert each.ended
        assert b"event: bye" in each.messages[-1]
        assert each.task.done()
    assert pages.pages == 1
    blocked.task.cancel()
    await blocked.task
    assert blocked.error is not None
    assert is_logged(blocked.error)  # the server writes no traceback for it


async def test_the_stop_has_a_time_for_all_pages(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pages beyond it are left to the close of the server; the first ones are served always."""
    monkeypatch.setattr(feed, "LAST_EVENT_SECONDS", 0.0)
    pages = site.plugin.endpoints.console.feed  # type: ignore[union-attr]
    made = await opened(pages, 60)
    await pages.end(3600.0)
    assert sum(each.ended for each in made) == feed._WOKEN_AT_ONCE
    for each in made:
        each.task.cancel()
