"""Sessions of the console: their keys, ports and ends, and the brake on wrong tokens."""

import asyncio
import hashlib
import hmac
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
from tests.servers.waiting import until
from tests.web.console_site import OWN, SESSION, SETTINGS, TOKEN, Site

from viralfx.server.interface import Message
from viralfx.settings import Secret, Settings, read_settings
from viralfx.web import sessions
from viralfx.web.gate import Gate
from viralfx.web.responses import EventStream

STRONG = "kQ4Tz0pLk9vRw2Ym-c0a8e1f5"


def with_token(token: str, **more: object) -> Settings:
    """Return settings with a management token."""
    return msgspec.structs.replace(SETTINGS, management_token=Secret(token), **more)


def site_at(site: Site, *, management: bool) -> Site:
    """Return a process, asked at one of its ports."""
    other = object.__new__(Site)
    other.__dict__ |= site.__dict__
    endpoints = site.plugin.endpoints
    other.gate = Gate(
        endpoints.at_management_port(site.plugin.settings) if management else endpoints
    )
    return other


async def test_an_anonymous_client_gets_nothing_that_depends_on_the_token() -> None:
    """Neither a log-out nor any other response: offline guesses need a session."""
    answers = []
    for token in (TOKEN, "another-token-of-operators"):
        site = Site(with_token(token))
        asked = [
            await site.ask(SESSION, "DELETE"),
            await site.ask(SESSION, "DELETE", headers={"cookie": "viralfx_session=2.1.1.x.y"}),
            await site.ask(SESSION, "POST", headers=OWN, body={"token": "wrong"}),
        ]
        answers.append([each.header("set-cookie") for each in asked[:2]])
        assert "set-cookie" not in dict(asked[2].headers)
    assert answers[0] == answers[1]


async def test_the_name_of_the_cookie_has_the_port(site: Site) -> None:
    """Cookies ignore ports; over https the prefix binds the cookie to the host."""
    for host, scheme, name in (
        ("localhost:3000", "http", "viralfx_session_3000"),
        ("localhost:3001", "http", "viralfx_session_3001"),
        ("[::1]:3000", "http", "viralfx_session_3000"),
        ("console.test", "https", "__Host-viralfx_session"),
    ):
        headers = {**OWN, "host": host, "origin": f"{scheme}://{host}"}
        answer = await site.ask(SESSION, "POST", headers=headers, body={"token": TOKEN})
        cookie = answer.header("set-cookie")
        assert cookie.startswith(f"{name}=2."), cookie
        assert "; Path=/;" in cookie
        assert cookie.endswith("; Secure") == (scheme == "https")
        assert await site.logged_in({**headers, "cookie": cookie.split(";")[0]})


async def test_a_session_is_good_at_its_port_alone(site: Site) -> None:
    """Whether the browser, or the application on the other port, sends its cookie there."""
    api, management = (site_at(site, management=each) for each in (False, True))
    for own, other in ((api, management), (management, api)):
        headers = await own.log_in()
        assert await own.logged_in(headers)
        assert not await other.logged_in(headers)


async def test_a_key_is_stretched_once_and_off_the_event_loop(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop runs meanwhile, and requests at the same time share the work."""
    headers = await site.log_in()
    calls: list[bytes] = []

    def stretch(secret: bytes) -> bytes:
        calls.append(secret)
        # As long as it takes until the loop has run.
        deadline = time.monotonic() + 20
        while len(turns) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        return hashlib.sha256(secret).digest()

    turns: list[int] = []
    monkeypatch.setattr(sessions, "stretch", stretch)
    monkeypatch.setattr(sessions.KEYS, "_keys", {})
    asked = [asyncio.ensure_future(site.ask(SESSION, headers=headers)) for _ in range(5)]
    await until(lambda: bool(calls))
    for turn in range(3):
        await asyncio.sleep(0)
        turns.append(turn)
    # The key is another one here, so the session is not valid; the request is answered.
    assert [(await each).json()["loggedIn"] for each in asked] == [False] * 5
    assert calls == [TOKEN.encode()]


def test_guesses_of_a_key_are_expensive() -> None:
    """A signature was tried in microseconds before; scrypt needs memory for each guess."""
    before = time.process_time()
    sessions.stretch(b"guess")
    assert time.process_time() - before > 0.01


# -- the end of a session ----------------------------------------------------------------------


async def events_of(site: Site, cookie: str) -> tuple[asyncio.Task[None], list[Message]]:
    """Open the stream of a session, and return it with its messages."""
    console = site.plugin.endpoints.console
    assert console is not None
    given = [(b"cookie", cookie.encode()), (b"host", b"console.test")]
    stream = console.endpoints["/health/events"]("GET", b"", given)
    assert isinstance(stream, EventStream)
    sent: list[Message] = []

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    async def serve() -> None:
        await stream.serve({"method": "GET"}, receive, send, (b"x", b"y"))

    task = asyncio.ensure_future(serve())
    await until(lambda: len(sent) > 1)
    return task, sent


async def test_a_log_out_ends_the_session_and_its_streams(site: Site) -> None:
    """Also for another holder of the cookie; other sessions go on."""
    headers, other = await site.log_in(), await site.log_in()
    stream, sent = await events_of(site, headers["cookie"])
    stays, _ = await events_of(site, other["cookie"])
    assert (await site.ask(SESSION, "DELETE", headers=headers)).status == 204
    async with asyncio.timeout(20):
        await stream
    assert sent[-1]["more_body"] is False
    assert not await site.logged_in(headers)
    assert await site.logged_in(other)
    assert not stays.done()
    stays.cancel()


async def test_a_removed_token_ends_its_sessions(tmp_path: Path) -> None:
    """During a rotation both tokens have sessions; the file is read without a restart."""
    path = tmp_path / "token"
    path.write_text(TOKEN)
    environ = {"MANAGEMENT_TOKEN_FILE": str(path)}
    site = Site(read_settings(environ))
    tokens = site.plugin.endpoints.access.tokens
    headers = await site.log_in()

    def read_again() -> None:
        tokens._read_at = float("-inf")

    path.write_text(f"the-next-token {TOKEN}")
    read_again()
    assert await site.logged_in(headers)
    stream, _ = await events_of(site, headers["cookie"])
    path.write_text("the-next-token")
    read_again()
    assert not await site.logged_in(headers)
    async with asyncio.timeout(30):
        await stream  # at the next beat


def signed(content: bytes, token: str = TOKEN) -> dict[str, str]:
    """Return the headers of a cookie that the holder of a token has signed itself."""
    key = sessions.KEYS.get(token.encode(), sessions.ServingPort.API)
    assert key is not None
    mac = hmac.new(key, content, "sha256").hexdigest()
    cookie = b"viralfx_session=" + content + b"." + mac.encode()
    return {**OWN, "host": "console.test", "cookie": cookie.decode("latin-1")}


async def has_session(site: Site, headers: Mapping[str, str]) -> bool:
    """Return whether a request has a session of any token."""
    return bool((await site.ask(SESSION, headers=headers)).json()["loggedIn"])


async def test_an_ended_session_stays_ended() -> None:
    """Whatever the holders of other tokens end, and of its own: 10 000 log-outs of made-up ones."""
    tokens = "ann read the-token-of-ann; bob read the-token-of-bob"
    site = Site(msgspec.structs.replace(SETTINGS, tokens=Secret(tokens)))
    admin, ended = await site.log_in(), await site.log_in()
    own = {**OWN, "host": "console.test"}
    cookies = {}
    for name in ("ann", "bob"):
        answer = await site.ask(
            SESSION, "POST", headers=own, body={"token": f"the-token-of-{name}"}
        )
        cookies[name] = {**own, "cookie": answer.header("set-cookie").split(";")[0]}
    assert (await site.ask(SESSION, "DELETE", headers=ended)).status == 204
    assert (await site.ask(SESSION, "DELETE", headers=cookies["ann"])).status == 204
    later = int(time.time()) + sessions.SESSION_SECONDS
    for number in range(10_050):
        made_up = signed(b"2.%d.%d.ann" % (later, number), "the-token-of-ann")
        assert (await site.ask(SESSION, "DELETE", headers=made_up)).status == 204

    assert not await has_session(site, ended)
    assert not await has_session(site, cookies["ann"])
    assert not await has_session(site, signed(b"2.%d.0.ann" % later, "the-token-of-ann"))
    assert await has_session(site, admin)
    assert await has_session(site, cookies["bob"])
    # The name may log in again, and its new session ends like each other one.
    answer = await site.ask(SESSION, "POST", headers=own, body={"token": "the-token-of-ann"})
    again = {**own, "cookie": answer.header("set-cookie").split(";")[0]}
    assert await has_session(site, again)
    assert (await site.ask(SESSION, "DELETE", headers=again)).status == 204
    assert not await has_session(site, again)


@pytest.mark.parametrize(
    "content",
    [
        b"2.%d.\xff\xfe.management",
        b"2.%d.\xc3\xa4.management",
        b"2.%d..management",
        b"2.%d." + b"a" * 65 + b".management",
        b"2.%d.a b.management",
        b"2.1e9.ab.management",
        b"2.-1.ab.management",
        b"2.+%d.ab.management",
        b"2. %d.ab.management",
        b"2.1_000.ab.management",
        b"2.NaN.ab.management",
        b"2.\xd9\xa1.ab.management",
        b"2." + b"9" * 5000 + b".ab.management",
        b"2.99999999999.ab.management",
        b"2..ab.management",
        b"3.%d.ab.management",
        b"2.%d.ab",
        b"2.%d.ab.\xff",
        b"",
    ],
)
async def test_a_signed_cookie_of_another_form_is_no_session(site: Site, content: bytes) -> None:
    """The holder of a token can sign any bytes: each of them is 401, and a log-out of it is 204."""
    await site.log_in()  # makes the key
    later = b"%d" % (int(time.time()) + 600)
    headers = signed(content.replace(b"%d", later))

    assert (await site.ask("ui/data/jobs", headers=headers)).status == 401
    assert (await site.ask(SESSION, "DELETE", headers=headers)).status == 204
    assert not await site.logged_in(headers)
    assert await site.logged_in(signed(b"2.%b.ab.management" % later))


# -- a fleet of two versions -------------------------------------------------------------------


def former_cookie(token: str, ends: int) -> str:
    """Return a cookie as version 0.2 made it."""
    key = hmac.digest(token.encode(), b"viralfx console session", "sha256")
    content = f"{ends}.{'ab' * 12}"
    mac = hmac.new(key, content.encode(), "sha256").hexdigest()
    return f"viralfx_{hashlib.sha256(key).hexdigest()[:6]}={content}.{mac}"


async def test_a_session_of_the_former_version_goes_on() -> None:
    """With a token that cannot be guessed, since its key is not stretched; a log-out ends it."""
    site, soon = Site(with_token(STRONG)), int(time.time()) + 600
    cookie = {"cookie": former_cookie(STRONG, soon)}
    assert await site.logged_in(cookie)
    assert not await site.logged_in({"cookie": former_cookie("another", soon)})
    assert not await site.logged_in({"cookie": former_cookie(STRONG, soon - 1200)})
    assert (await site.ask(SESSION, "DELETE", headers=cookie)).status == 204
    assert not await site.logged_in(cookie)
    weak = Site(with_token(TOKEN))
    assert not await weak.logged_in({"cookie": former_cookie(TOKEN, soon)})


# -- wrong tokens ------------------------------------------------------------------------------


async def test_wrong_log_ins_wait_and_the_right_token_does_not(site: Site) -> None:
    """All from one address: a guesser cannot keep the operator out."""
    brake = site.plugin.endpoints.brake
    wrong = [
        asyncio.ensure_future(site.ask(SESSION, "POST", headers=OWN, body={"token": "wrong"}))
        for _ in range(120)
    ]
    await until(lambda: brake.waiting == 100)
    headers = await site.log_in()
    assert await site.logged_in(headers)
    bearer = {"authorization": f"Bearer {TOKEN}"}
    assert (await site.ask("tasks", headers=bearer)).status == 200
    assert brake.waiting == 100
    ended = [each.result() for each in wrong if each.done()]
    assert [each.status for each in ended] == [401] * 20
    # Ten were free, and ten did not wait; each of these costs a connection.
    assert [dict(each.headers).get("connection") for each in ended].count("close") == 10
    brake.release()
    assert {(await each).status for each in wrong} == {401}
    body, _ = site.plugin.assembly.metrics.render("")
    assert b'viralfx_wrong_tokens_total{place="console"} 120.0' in body


async def test_wrong_bearer_tokens_wait_and_requests_without_one_do_not(site: Site) -> None:
    """A browser or a scraper without a token is no guesser."""
    brake = site.plugin.endpoints.brake
    for _ in range(30):
        assert (await site.ask("tasks")).status == 401
    wrong = {"authorization": "Bearer wrong"}
    asked = [asyncio.ensure_future(site.ask("tasks", headers=wrong)) for _ in range(11)]
    await until(lambda: brake.waiting == 1)
    assert sum(each.done() for each in asked) == 10
    brake.release()
    assert {(await each).status for each in asked} == {401}
    body, _ = site.plugin.assembly.metrics.render("")
    assert b'viralfx_wrong_tokens_total{place="operations"} 11.0' in body


@pytest.mark.parametrize("path", ["ui/data/status", "events"])
async def test_the_console_slows_down_guesses_of_bearer_tokens(path: str) -> None:
    """With HEALTH_DETAILS=authorized its views and events take tokens. A right one never waits."""
    site = Site(with_token(TOKEN, health_details="authorized"))
    brake = site.plugin.endpoints.brake
    wrong = {"authorization": "Bearer wrong"}
    asked = [asyncio.ensure_future(site.ask(path, headers=wrong)) for _ in range(11)]
    await until(lambda: brake.waiting == 1 or all(each.done() for each in asked))
    assert brake.waiting == 1
    right = {"authorization": f"Bearer {TOKEN}"}
    assert (await site.ask(path)).status == 401
    assert (await site.ask("ui/data/jobs", headers=right)).status == 401
    assert brake.waiting == 1
    brake.release()
    assert {(await each).json()["code"] for each in asked} == {"session"}


async def test_the_state_of_a_session_tells_nothing_about_a_bearer_token() -> None:
    """Its response does not wait, so it must be no oracle for guesses."""
    site = Site(with_token(TOKEN, health_details="authorized"))
    states = [
        (await site.ask(SESSION, headers={"authorization": f"Bearer {token}"})).json()
        for token in (TOKEN, "wrong")
    ]
    assert states[0] == states[1]
    assert states[0]["reads"] == "none"


# -- the place of the console ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "api", "management"),
    [
        ({}, 200, 200),
        ({"CONSOLE": "true"}, 200, 200),
        ({"CONSOLE": "false"}, 404, 404),
        ({"CONSOLE": "management"}, 404, 200),
        ({"MANAGEMENT_PORT": "3001"}, 200, 200),
        ({"ENVIRONMENT": "production"}, 200, 200),
        ({"ENVIRONMENT": "production", "MANAGEMENT_PORT": "3001"}, 404, 200),
        ({"ENVIRONMENT": "production", "MANAGEMENT_PORT": "3001", "CONSOLE": "true"}, 200, 200),
        ({"ENVIRONMENT": "production", "MANAGEMENT_TOKEN": ""}, 404, 404),
    ],
)
async def test_the_console_has_a_place(environ: dict[str, str], api: int, management: int) -> None:
    """In production a script on a page of the application cannot reach it, if it has a port."""
    given = {"MANAGEMENT_TOKEN": STRONG, "ALLOW_MEMORY_ADAPTERS": "true", **environ}
    site = Site(read_settings(given))
    for port, status in ((False, api), (True, management)):
        asked = site_at(site, management=port)
        for path in ("ui", SESSION, "ui/data/status", "ui/start.js"):
            found = (await asked.ask(path)).status
            assert (200 if found == 401 else found) == status, (port, path)
        events = await asked.ask("events", "POST")
        assert events.status == (405 if status == 200 else 404)
