"""The console: its files, its sessions, the proof of origin, and the rights to read and to act."""

import asyncio
import gzip
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.servers.waiting import until
from tests.web.console_site import (
    OWN,
    SESSION,
    SETTINGS,
    TOKEN,
    MarkedCheck,
    OpenPage,
    Site,
    acted,
    session_of_an_hour,
)

from viralfx import OperationsConfig, OperationsPlugin
from viralfx.core.errors import LedgerUnavailableError
from viralfx.domain.doctor import Area
from viralfx.domain.fleet import CheckChange, FleetUnavailableError
from viralfx.jobs.ledger import QueueCounts
from viralfx.server.interface import Message
from viralfx.settings import Secret, Settings
from viralfx.web.auth import AccessPolicy
from viralfx.web.console import Assets, feed
from viralfx.web.responses import EventStream
from viralfx.web.sessions import SESSION_SECONDS, ConsoleAccess, cookie_name

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
    """It is for this site and eight hours, and any path: a proxy may show the page at another."""
    answer = await site.ask(SESSION, "POST", headers=OWN, body={"token": TOKEN})
    cookie = answer.header("set-cookie")

    assert "; Path=/; Max-Age=28800; " in cookie
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
    form, end, number, holder, mac = value.split(".")
    for forged in (
        f"{form}.{int(end) + 1}.{number}.{holder}.{mac}",
        f"{form}.{end}.{'0' * len(number)}.{holder}.{mac}",
        f"{form}.{end}.{number}.{holder}.{'0' * len(mac)}",
        f"{form}.{end}.{number}.api.{mac}",
        f"{form}.{end}.{number}.{holder}",
        f"{end}.{number}.{mac}",
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
    access = ConsoleAccess(policy, clock=Later())
    assert (
        access.session([(b"cookie", headers["cookie"].encode()), (b"host", b"console.test")])
        is None
    )


async def cookie_that_ends_in(site: Site, seconds: int) -> bytes:
    """Return a signed cookie whose session ends so many seconds from now."""
    console = site.plugin.endpoints.console
    assert console is not None
    token = console._access.identify(TOKEN)
    assert token is not None
    await console._access._keys.make(token)
    value = console._access.make(token, int(datetime.now(UTC).timestamp()) + seconds)
    return b"%b=%b" % (cookie_name([(b"host", b"console.test")]), value)


async def test_a_stream_ends_with_its_session(site: Site) -> None:
    """The page connects again, and must log in."""
    console = site.plugin.endpoints.console
    assert console is not None
    cookie = await cookie_that_ends_in(site, 2)
    stream = console.endpoints["/health/events"](
        "GET", b"", [(b"cookie", cookie), (b"host", b"console.test")]
    )
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
    other = Site(msgspec.structs.replace(SETTINGS, management_token=Secret("the-next-one")))
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
    ended = {**OWN, "cookie": (await cookie_that_ends_in(site, -1)).decode()}
    forged = {**own, "cookie": own["cookie"][:-4] + "AAAA"}
    for headers, status, code in (
        (OWN, 401, "session"),
        (ended, 401, "session"),
        (forged, 401, "session"),
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
    "audit",
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
    console.feed.before_beat = lambda: None  # the session below has no cookie
    with_session = OpenPage(console.feed, session=session_of_an_hour())
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
    for name in ("_fleet_view", "_runs"):
        monkeypatch.setattr(getattr(site.plugin.endpoints.console._data, name), "_load", silent)  # type: ignore[union-attr]
    monkeypatch.setattr(assembly.fleet, "changes", silent)
    monkeypatch.setattr(assembly.operations.audit.store, "read", silent)
    headers = await site.log_in()
    views = ["jobs", "jobs/1", "queues", "schedules", "fleet", "fleet/changes", "status/history"]
    views += ["audit"]
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


async def test_settings_and_doctor_know_the_prefix_and_the_callables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A variable without the prefix is that of another program."""
    variables = {
        "OPS_POOL_PROFILE": "large",
        "OPS_SHUTDOWN_DRAIN_TIMEOUT": "20000",
        "OPS_JOB_MEMORY_MAX_JOBS": "100",
        "OPS_DATABASE_URL": "postgresql://user@nowhere.invalid/shop",
        "OPS_REDIS_HOST": "nowhere.invalid",
        "DB_POOL_MAX": "9",
        "SHUTDOWN_DRAIN_TIMEOUT": "9",
        "REDIS_USERNAME": "other",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    plugin = OperationsPlugin(
        OperationsConfig(
            env_prefix="OPS_",
            database_password=lambda: "of the database",
            redis_credentials=lambda: "of redis",
        )
    )
    console = plugin.endpoints.console
    assert console is not None
    items = {each["name"]: each for each in (await console._data.all_settings({}))["items"]}
    shown = {name: (each["value"], each["source"]) for name, each in items.items()}
    source = plugin.assembly.source
    checks = dict(source.doctor_checks(plugin.settings))
    found = [one.found for one in await checks[Area.ENVIRONMENT].check()]
    database: Any = checks[Area.DATABASE]
    redis: Any = checks[Area.REDIS]

    assert all(name.startswith("OPS_") for name in shown)
    assert shown["OPS_SHUTDOWN_DRAIN_TIMEOUT"] == ("20000", "environment")
    assert shown["OPS_DB_POOL_MAX"][1] == "OPS_POOL_PROFILE"
    assert shown["OPS_REDIS_USERNAME"][1] == "default"
    assert [line for line in found if "JOB_MEMORY_MAX_JOBS" in line]
    assert [line for line in found if "5 variables are set" in line]
    assert await database._find_callable() is plugin.config.database_password
    assert await redis._find_credentials() is plugin.config.redis_credentials


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
