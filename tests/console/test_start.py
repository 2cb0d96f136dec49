"""The start of the operations console while a file, the session or the process fails."""

import json
import re
import signal
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from playwright.sync_api import Browser, Route, expect
from tests.console.pages import APP, HIDDEN, QUICK, Console
from tests.servers.chromium import visiting
from tests.soak import SOAK
from tests.system.jobs import accept, until
from tests.system.service import Service, running

HEALTHY = "Healthy: all"
"""The beginning of the sentence of the moment."""


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """Return a service for all tests of this file."""
    with running(*APP, management=True, environment=QUICK) as started:
        yield started.wait_ready()


@pytest.fixture
def opened(browser: Browser, service: Service) -> Iterator[Console]:
    """Return an empty page; at its end it may have failed requests, and no other problem."""
    with visiting(browser) as visit:
        assert service.management_port is not None
        opened = Console(visit, service.management_port)
        yield opened
        opened.forgive("net::ERR_")
        opened.require_clean()


def go(opened: Console, view: str = "status") -> None:
    """Navigate without a wait for a heading."""
    opened.page.goto(f"http://127.0.0.1:{opened.port}/health/ui#/{view}")


def abort(route: Route) -> None:
    """Let a request fail as a lost connection does."""
    route.abort("connectionreset")


@pytest.mark.soak
@pytest.mark.parametrize(
    "name", ["app", "vendor/preact", "status", "parts", "live", "client"][: None if SOAK else 1]
)
def test_a_module_that_does_not_arrive(opened: Console, name: str) -> None:
    """The page says that it has not started, and then starts by itself."""
    opened.page.route(f"**/ui/{name}.js", abort)
    go(opened)
    expect(opened.sentence).to_have_text(re.compile("^Disconnected. The page has not started"))
    opened.page.unroute(f"**/ui/{name}.js")
    expect(opened.sentence).to_contain_text(HEALTHY)


def test_styles_that_do_not_arrive(opened: Console) -> None:
    """The page asks for them again."""
    opened.page.route("**/ui/console.css*", abort)
    go(opened)
    expect(opened.sentence).to_contain_text(HEALTHY)
    expect(opened.page.locator("header")).not_to_have_css("display", "flex")
    opened.page.unroute("**/ui/console.css*")
    expect(opened.page.locator("header")).to_have_css("display", "flex")


def test_a_view_that_does_not_arrive(opened: Console) -> None:
    """The view says so and arrives later; the other views work meanwhile."""
    opened.page.route("**/ui/stop.js*", abort)
    go(opened, "stop")
    expect(opened.page.get_by_role("heading", level=1)).to_have_text("Stop")
    expect(opened.main.locator(".notice.bad")).to_contain_text("No data")
    opened.page.get_by_role("link", name="Status").click()
    expect(opened.sentence).to_contain_text(HEALTHY)
    opened.page.get_by_role("link", name="Stop").click()
    expect(opened.main.locator(".notice.bad")).to_contain_text("No data")
    opened.page.unroute("**/ui/stop.js*")
    expect(opened.main.get_by_role("row").filter(has_text="drain")).to_contain_text("pending")


def test_a_session_that_does_not_arrive(opened: Console) -> None:
    """The page says so and asks again."""
    failed = []

    def refuse(route: Route) -> None:
        failed.append(route.request.url)
        abort(route)

    opened.page.route(re.compile("/ui/session"), refuse)
    go(opened)
    expect(opened.sentence).to_have_text(re.compile("^Disconnected. .* tries again"))
    opened.page.unroute(re.compile("/ui/session"))
    expect(opened.sentence).to_contain_text(HEALTHY)
    assert len(failed) > 1


@pytest.mark.soak
@pytest.mark.parametrize(
    "name",
    ["ui/start.js", "events", "ui/vendor/preact.js", "ui/session?start"][: None if SOAK else 1],
)
def test_a_process_that_is_suspended_meanwhile(
    opened: Console, service: Service, name: str
) -> None:
    """The page is not blank meanwhile, and completes once the process runs again."""
    held = []

    def suspend(route: Route) -> None:
        service.signal(signal.SIGSTOP)
        held.append(name)
        route.continue_()

    opened.page.route(re.compile(re.escape(f"/health/{name}")), suspend, times=1)
    try:
        opened.page.goto(f"http://127.0.0.1:{opened.port}/health/ui", wait_until="commit")
        expect(opened.page.get_by_role("heading", level=1)).to_be_visible()
        expect(opened.sentence).to_be_attached()
        while not held:
            opened.page.wait_for_timeout(10)
    finally:
        service.signal(signal.SIGCONT)
    expect(opened.sentence).to_contain_text(HEALTHY)


def test_a_proxy_that_buffers_events(opened: Console) -> None:
    """The page says that no event arrives and why; the views with data of their own work."""
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    opened.page.route(re.compile("/health/events"), hold)
    go(opened)
    expect(opened.main.get_by_role("row").filter(has_text="supplier")).to_be_visible()
    expect(opened.sentence).to_contain_text("A proxy may hold events back")
    opened.log_in()
    opened.page.get_by_role("link", name="Queues").click()
    expect(opened.main.get_by_role("row").filter(has_text="notifications")).to_be_visible()
    assert held


def test_a_clock_that_is_two_hours_off(opened: Console, service: Service) -> None:
    """All times are by the clock of the server, also "the last hour" of a filter."""
    job = accept(service, "console.webhook", None)
    until(service, job, "failed")
    opened.page.clock.install(time=datetime.now(UTC) + timedelta(hours=2))
    opened.log_in()
    expect(opened.page.locator("header")).to_contain_text(re.compile(r"up \d+(\.\d)? s|up \d+ min"))
    opened.open("jobs")
    opened.page.get_by_role("button", name="Failed in the last hour").click()
    expect(opened.main.get_by_role("link", name=job[:8])).to_be_visible()
    opened.open("fleet")
    age = opened.main.get_by_role("row").filter(has_text="(this process)")
    expect(age).to_contain_text(re.compile(r"\b\d+(\.\d)? s ago"))


def test_a_view_that_fails(opened: Console) -> None:
    """A view whose data it cannot show has an error in its place, and the page works on."""

    def spoil(route: Route) -> None:
        session = route.fetch().json()
        # No other view needs it; each shows the sentence about the checks.
        session["start"]["snapshot"]["changes"] = None
        route.fulfill(body=json.dumps(session), content_type="application/json")

    opened.page.route("**/ui/session?start", spoil)
    go(opened)
    expect(opened.main.get_by_role("button", name="Try again")).to_be_visible()
    opened.page.get_by_role("link", name="Stop").click()
    expect(opened.main.get_by_role("row").filter(has_text="drain")).to_contain_text("pending")
    assert len(opened.visit.problems) == 1
    assert "TypeError" in opened.visit.problems.pop()


def spoiled(opened: Console, change: Callable[[dict[str, Any]], object]) -> None:
    """Let the first answer about the session be another one, and no event follow."""

    def spoil(route: Route) -> None:
        session = route.fetch().json()
        change(session)
        route.fulfill(body=json.dumps(session), content_type="application/json")

    opened.page.route("**/ui/session?start", spoil, times=1)
    go(opened)


def load_again(opened: Console) -> None:
    """Load the page by the button of a page that has failed."""
    opened.page.get_by_role("button", name="Load the page again").click()
    expect(opened.sentence).to_contain_text(HEALTHY)


def test_a_page_that_fails(opened: Console) -> None:
    """A page that cannot show the state of the process says so, and loads again by a button."""
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    opened.page.route("**/health/events*", hold)
    spoiled(opened, lambda session: session["start"]["snapshot"].pop("state"))
    expect(opened.sentence).to_contain_text("Disconnected: this page has failed")
    # Without events, as the next snapshot would end the failure by itself.
    load_again(opened)
    opened.page.unroute("**/health/events*")
    assert len(opened.visit.problems) >= 1
    opened.visit.problems.clear()


def test_an_event_that_the_page_cannot_read(opened: Console) -> None:
    """The data would be older than they look."""
    events = "event: checks\ndata: {}\n\nevent: beat\ndata: {}\n\n"
    opened.page.route(
        "**/health/events*",
        lambda route: route.fulfill(body=events, content_type="text/event-stream"),
    )
    go(opened)
    expect(opened.sentence).to_contain_text("Disconnected: this page cannot read the data")
    expect(opened.page.get_by_role("button", name="Load the page again")).to_be_visible()
    opened.page.unroute("**/health/events*")
    opened.page.reload()
    expect(opened.sentence).to_contain_text(HEALTHY)
    assert len(opened.visit.problems) >= 1
    opened.visit.problems.clear()


FAIL_ONCE = """() => {
  const before = String.prototype.toLowerCase;
  String.prototype.toLowerCase = () => {
    String.prototype.toLowerCase = before;
    throw new Error("planted");
  };
}"""
"""Lets the next word with a sign fail, as in the head of the page."""


def test_a_part_of_the_page_that_fails(opened: Console) -> None:
    """The page says so, and the error is in the log of the browser, with its place."""
    go(opened, "login")
    expect(opened.page.locator("header .word")).to_have_text("✓ ready")
    opened.page.evaluate(FAIL_ONCE)
    expect(opened.sentence).to_contain_text("Disconnected: this page has failed (planted)")
    (problem,) = opened.visit.problems
    assert "parts.js" in problem
    opened.visit.problems.clear()


def test_a_process_that_answers_with_errors(opened: Console) -> None:
    """It is there, so the page does not say that nothing answers."""
    go(opened)
    expect(opened.sentence).to_contain_text(HEALTHY)
    opened.page.route(re.compile("/health/(events|ui/session)"), lambda r: r.fulfill(status=500))
    for hidden in (True, False):
        opened.page.evaluate(HIDDEN, hidden)
    expect(opened.sentence).to_contain_text("Disconnected: no event since")
    expect(opened.sentence).to_contain_text("The process answered 500.")
    opened.page.unroute(re.compile("/health/(events|ui/session)"))
    expect(opened.sentence).to_contain_text(HEALTHY)
    opened.forgive("500")


def test_a_process_of_another_version(opened: Console) -> None:
    """The page stays open over an upgrade, and says that it is of the version before."""
    spoiled(opened, lambda session: session.update(version="0.0.1"))
    expect(opened.main).to_contain_text("This page is of version 0.0.1, and the process of")
    expect(opened.sentence).to_contain_text(HEALTHY)
    load_again(opened)
    expect(opened.main).not_to_contain_text("This page is of version")


def test_a_proxy_that_answers_in_place_of_the_process(opened: Console) -> None:
    """A view is not blank after a page of a proxy with status 200."""
    opened.log_in()
    page = {"body": "<html>Moved.</html>", "content_type": "text/html"}
    opened.page.route("**/ui/data/queues*", lambda route: route.fulfill(**page))
    opened.page.get_by_role("link", name="Queues").click()
    expect(opened.main.locator(".notice.bad")).to_contain_text("is not one of the process")
    opened.page.unroute("**/ui/data/queues*")
    opened.page.get_by_role("button", name="Try again").click()
    expect(opened.main.get_by_role("row").filter(has_text="notifications")).to_be_visible()


def test_an_action_whose_result_cannot_be_shown(opened: Console) -> None:
    """The page says so, and the view goes on."""
    opened.log_in()
    opened.page.get_by_role("link", name="Settings").click()
    opened.page.route(
        "**/ui/data/settings/doctor/run",
        lambda route: route.fulfill(body="{}", content_type="application/json"),
    )
    opened.page.get_by_role("button", name="Run the doctor").click()
    expect(opened.main.locator(".toast")).to_contain_text("The page cannot show the result")
    expect(opened.page.get_by_role("button", name="Run the doctor")).to_be_enabled()
    opened.page.unroute("**/ui/data/settings/doctor/run")
    assert "TypeError" in opened.visit.problems.pop()


def test_an_action_without_an_answer(opened: Console) -> None:
    """It may have had its effect, so the page says that."""
    opened.log_in()
    opened.page.get_by_role("link", name="Queues").click()
    opened.page.route("**/queues/default/pause", abort)
    opened.page.get_by_role("button", name="Pause queue default").click()
    expect(opened.main.locator(".toast.bad")).to_contain_text("may have had its effect")
    opened.page.unroute("**/queues/default/pause")


def test_a_proxy_that_refuses_the_stream(opened: Console) -> None:
    """The page asks instead; it does not blame the number of streams."""
    opened.page.route("**/health/events*", lambda route: route.fulfill(status=502))
    go(opened)
    expect(opened.main).to_contain_text("No stream of events reaches this page")
    expect(opened.sentence).to_contain_text(HEALTHY)
    opened.page.unroute("**/health/events*")
    expect(opened.main).not_to_contain_text("No stream of events reaches this page")
    opened.forgive("502")


@pytest.mark.parametrize("name", ["constructor", "__proto__", "stop/%E0%A4%A"])
def test_an_address_that_names_no_view(opened: Console, name: str) -> None:
    """Every word of the address is text."""
    go(opened, name)
    expect(opened.sentence).to_contain_text(HEALTHY)
    expect(opened.page.get_by_role("heading", level=1)).to_have_text(re.compile("Status|Stop"))
