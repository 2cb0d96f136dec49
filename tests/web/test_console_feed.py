"""The stream of events of the console."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.servers.waiting import until
from tests.web.console_site import (
    MARKUP,
    SESSION,
    SETTINGS,
    Site,
    opened,
)

from viralfx import CircuitOpenError
from viralfx.domain.health.model import MAX_MESSAGE_CHARACTERS, Observation, Status
from viralfx.server.interface import Message, is_logged
from viralfx.web.console import feed


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


async def test_changes_with_huge_messages_do_not_make_a_snapshot_huge(site: Site) -> None:
    """Each page begins with the last changes, and all of them share one snapshot."""
    console = site.plugin.endpoints.console
    assert console is not None
    site.check.message = "m" * 1_000_000
    report = site.plugin.operations.monitor.report
    for status in (Status.FAIL, Status.PASS, Status.FAIL):
        site.check.status = status
        await until(lambda status=status: report().checks["marked"].status is status)  # type: ignore[misc]

    started = await site.ask(SESSION, query="start")
    changed = started.json()["start"]["snapshot"]["changes"]
    assert [each["new"] for each in changed if each["check"] == "marked"][-1] == "fail"
    assert len(started.body) < 50_000


def test_the_document_of_the_console_has_the_limit_of_a_message() -> None:
    """A message that is cut ends with dots, which count."""
    text = Observation(status=Status.PASS, message="x" * (MAX_MESSAGE_CHARACTERS + 1)).message
    kept = text.removesuffix("...")
    document = Path(__file__).parents[2].joinpath("docs/console.md").read_text(encoding="utf-8")

    assert (
        f"| {len(text)} characters; of a longer one the first {len(kept)} and `...` |" in document
    )


async def test_the_calls_that_an_open_circuit_rejects_are_shown_with_each_beat(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state does not change meanwhile, so there is no event of the circuit."""
    monkeypatch.setattr(feed, "BEAT_SECONDS", 0.05)
    pages = site.plugin.endpoints.console.feed  # type: ignore[union-attr]
    (page,) = await opened(pages, 1)
    site.breaker.open()
    await until(lambda: b"event: circuit" in b"".join(page.messages))
    for _ in range(3):
        with pytest.raises(CircuitOpenError):
            site.breaker.admit("call")
    await until(lambda: b'"rejected":3' in b"".join(page.messages))
    page.task.cancel()


async def test_a_call_that_is_rejected_during_a_beat_is_shown_with_the_next(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is rejected in another thread, at any moment of the beat."""
    monkeypatch.setattr(feed, "BEAT_SECONDS", 0.05)
    pages = site.plugin.endpoints.console.feed  # type: ignore[union-attr]

    class Racing(dict[str, None]):
        """Lets one call be rejected after the names are read, before they are removed."""

        raced = False

        def __iter__(self) -> Iterator[str]:
            names = list(self.keys())
            if site.breaker.state == "OPEN" and not self.raced:
                self.raced = True
                with pytest.raises(CircuitOpenError):
                    site.breaker.admit("call")
            return iter(names)

    monkeypatch.setattr(pages, "_rejecting", Racing())
    (page,) = await opened(pages, 1)
    site.breaker.open()
    await until(lambda: b'"rejected":1' in b"".join(page.messages))
    page.task.cancel()


async def test_a_circuit_that_is_open_is_opened_by_hand(site: Site) -> None:
    """No event tells it; the page would go on to show the time of the next probe."""
    headers = await site.log_in()
    pages = site.plugin.endpoints.console.feed  # type: ignore[union-attr]
    for _ in range(5):
        site.breaker.failed(site.breaker.admit("call"), OSError("away"))
    (page,) = await opened(pages, 1)
    (circuit,) = (await site.ask("ui/data/circuits")).json()["items"]
    assert circuit["probeAt"] > circuit["since"]
    path = f"ui/data/circuits/{MARKUP}/open"
    assert (await site.ask(path, "POST", headers=headers, body={})).status == 200
    await until(lambda: b"event: circuit" in b"".join(page.messages))
    assert b'"probeAt":null' in b"".join(page.messages).partition(b"event: circuit")[2]
    page.task.cancel()


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
    assert (await small.ask(SESSION)).json()["full"] is True
    answer = await small.ask("events")
    assert (answer.status, answer.header("retry-after")) == (503, "5")
    for _ in range(2000):
        feed._publish("change", {})
    assert len(feed.frames._recent) <= 256
    await feed.end(0.01)
    stream.cancel()


async def test_pages_that_do_not_read_share_large_events(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anonymous clients may open streams at an old position: the buffer is of a limited size.

    A page gets large frames in pieces. One that reads again after a time gets a snapshot.
    """
    monkeypatch.setattr(feed, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(feed, "_STALLED_SECONDS", 0.0)
    pages = site.plugin.endpoints.console.feed  # type: ignore[union-attr]
    site.check.details = {"text": "x" * 100_000}
    report = site.plugin.operations.monitor.report
    await until(lambda: report().checks["marked"].details == site.check.details)
    (reader,) = await opened(pages, 1)
    first = re.findall(rb"id: (\S+)", b"".join(reader.messages))[0].decode()
    for number in range(40):
        pages._publish("change", {"number": number, "text": "x" * 100_000})
        await asyncio.sleep(0)
    assert pages.frames.size <= 1024 * 1024
    await until(lambda: b'"number":39' in b"".join(reader.messages))

    reading = asyncio.Event()
    got: list[bytes] = []

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            got.append(message["body"])
            await reading.wait()

    late = asyncio.ensure_future(pages.stream(first, {"method": "GET"}, receive, send))
    blocked = await opened(pages, 10, blocked=True)
    assert sum(map(len, got)) + sum(len(each.messages[0]) for each in blocked) < 11 * 20_000
    await until(lambda: not any(each.rest for each in pages._pages))
    reading.set()
    await until(lambda: b"event: beat" in b"".join(got))
    events = b"".join(got).split(b"\n\n")
    # An event that no page listens to, and again a snapshot that is whole.
    assert events[1].startswith(b"id: ")
    assert events[1].endswith(b"\nevent: cut")
    whole = json.loads(events[2].partition(b"data: ")[2])
    assert site.check.details in [each["details"] for each in whole["checks"]]
    assert max(map(len, got)) < 20_000
    for task in (late, reader.task, *(each.task for each in blocked)):
        task.cancel()


@pytest.mark.parametrize(("count", "writes"), [(3, 3), (60, 1)])
async def test_many_pages_get_events_in_one_write(site: Site, count: int, writes: int) -> None:
    """With few pages each event goes at once."""
    pages = site.plugin.endpoints.console.feed  # type: ignore[union-attr]
    made = await opened(pages, count)
    # The first results of the checks are events, too.
    await until(
        lambda: all(b".%d\nevent: " % pages.frames.last in b"".join(each.messages) for each in made)
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
