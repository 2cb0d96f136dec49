"""The start of the operations console while a file, the session or the process fails."""

import json
import re
import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from playwright.sync_api import Browser, Route, expect
from tests.console.pages import APP, QUICK, Console
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


@pytest.mark.parametrize("name", ["constructor", "__proto__", "stop/%E0%A4%A"])
def test_an_address_that_names_no_view(opened: Console, name: str) -> None:
    """Every word of the address is text."""
    go(opened, name)
    expect(opened.sentence).to_contain_text(HEALTHY)
    expect(opened.page.get_by_role("heading", level=1)).to_have_text(re.compile("Status|Stop"))
