"""Each view of the operations console in a browser, on memory and on Postgres with Redis."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from itertools import product
from urllib.parse import quote

import pytest
from playwright.sync_api import Browser, Locator, Route, expect
from tests.console.console_app import PLANTED, REVERSED
from tests.console.pages import APP, QUICK, VIEWS, Console, console
from tests.servers.postgres import PostgresServer
from tests.servers.redis import RedisServer
from tests.soak import SOAK, Record
from tests.system.jobs import JOBS, accept, until
from tests.system.service import Service, running
from tests.system.workers import environment_of

AXE = files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
FAILED = 3
WIDTHS = (320, 360, 768, 1100, 1280, 1920)
"""Pixels: from a phone to a wide screen."""
STORAGES = ["memory", "postgres and redis"] if SOAK else ["postgres and redis"]
"""The adapters of jobs keep the same contract."""
APPEARANCES = [*product((False, True), WIDTHS)] if SOAK else [(False, 1280), (True, 360)]
"""Whether the page is dark, and its width."""
FEW_ROWS = {} if SOAK else {"loggers": "markup", "settings": "TOKEN"}
"""The filter of each view with a hundred equal rows, of which axe-core reads few in a usual run."""
MAX_ROWS = 20


class Scene:
    """A service with jobs in each state, and a page of it with a log-in."""

    def __init__(self, service: Service, page: Console, *, stored: bool) -> None:
        self.service, self.console, self.stored = service, page, stored
        self.failed = [accept(service, "console.webhook", PLANTED) for _ in range(FAILED)]
        self.done = accept(service, "console.webhook", 7)
        self.long = accept(service, "console.long", 600)
        for job in self.failed:
            until(service, job, "failed")
        until(service, self.done, "completed")
        until(service, self.long, "active")

    @property
    def main(self) -> Locator:
        """The part of the page below the names of the views."""
        return self.console.main

    def row(self, text: str) -> Locator:
        """Return the row of a table that has this text first."""
        first = self.console.page.get_by_role("rowheader", name=text)
        return self.main.get_by_role("row").filter(has=first)

    def button(self, name: str) -> Locator:
        """Return a button of the page."""
        return self.console.page.get_by_role("button", name=name, exact=True)


@pytest.fixture(scope="module", params=STORAGES)
def scene(request: pytest.FixtureRequest, browser: Browser) -> Iterator[Scene]:
    """Return a service on each kind of storage, for all tests of this file."""
    stored = request.param != "memory"
    environment = QUICK
    with ExitStack() as stack:
        if stored:
            postgres: PostgresServer = request.getfixturevalue("postgres")
            redis: RedisServer = request.getfixturevalue("shared_redis")
            name = postgres.create_database()
            stack.callback(postgres.drop_database, name)
            addresses = {"DATABASE_URL": postgres.url(name), "REDIS_URL": redis.url()}
            environment = environment_of(postgres, **{**QUICK, **addresses})
        service = stack.enter_context(running(*APP, management=True, environment=environment))
        for _ in range(2 if stored else 0):
            worker = running(*APP, program="worker", management=True, environment=environment)
            stack.enter_context(worker).wait_ready()
        page = stack.enter_context(console(browser, service.wait_ready()))
        yield Scene(service, page, stored=stored)


@pytest.fixture(autouse=True)
def _clean(scene: Scene) -> Iterator[None]:
    """Require that no view asks another host, breaks the policy, logs an error or runs a text."""
    yield
    scene.console.require_clean()


def test_status(scene: Scene) -> None:
    """The sentence on top, the checks, and one check with its history as a table."""
    scene.console.open("status")
    expect(scene.console.sentence).to_have_text(re.compile("^Healthy: all"))
    supplier = scene.row("supplier")
    expect(supplier).to_contain_text(f"The supplier answers {PLANTED}")
    expect(supplier.get_by_role("img")).to_have_accessible_name(
        re.compile("Last 24 hours of supplier: ")
    )
    scene.button("supplier").click()
    expect(scene.main.locator("pre")).to_contain_text("document.body.id")
    expect(scene.main.get_by_role("table", name=re.compile("last 24 hours"))).to_be_visible()
    scene.button("Check now").click()
    expect(scene.main).to_contain_text("All checks have run")


def test_stop(scene: Scene) -> None:
    """The stages with their budgets, and the work in flight; the stop asks for the name."""
    scene.console.open("stop")
    for stage in ("stop accepting", "drain", "save state", "close connections"):
        expect(scene.row(stage)).to_contain_text("pending")
    if not scene.stored:
        expect(scene.main.get_by_role("table", name="Running jobs")).to_contain_text("console.long")
    scene.button("Begin the stop …").click()
    expect(scene.button("Begin the stop")).to_be_disabled()
    scene.console.page.get_by_role("textbox").fill("another process")
    expect(scene.button("Begin the stop")).to_be_disabled()
    scene.button("Keep as it is").click()
    expect(scene.button("Begin the stop …")).to_be_focused()


def test_fleet(scene: Scene) -> None:
    """Every process; without a database it is this one only, and the view says so."""
    scene.console.open("fleet")
    expect(scene.main).to_contain_text("3 instances" if scene.stored else "1 instance")
    expect(scene.main.get_by_role("row").filter(has_text="(this process)")).to_contain_text("api")
    if scene.stored:
        scene.main.get_by_label("Role").select_option("worker")
        expect(scene.main.get_by_role("rowheader")).to_have_count(2)
        assert "role=worker" in scene.console.page.url
    else:
        expect(scene.main).to_contain_text("this process only")


def test_jobs(scene: Scene) -> None:
    """Filters in the address, the detail with its attempts, a retry, a cancellation."""
    page = scene.console.page
    scene.console.open("jobs?state=failed&queue=notifications")
    expect(scene.main.get_by_role("rowheader")).to_have_count(FAILED)
    expect(scene.main.get_by_role("row").last).to_contain_text("the receiver is away")
    expect(scene.main.get_by_label("State")).to_have_value("failed")
    scene.main.get_by_label("State").select_option("completed")
    expect(scene.main.get_by_role("rowheader")).to_have_count(1)
    assert "state=completed" in page.url

    scene.console.open(f"jobs/{scene.failed[0]}")
    expect(scene.main).to_contain_text(f"the receiver is away {PLANTED}")
    page.get_by_text("Traceback of execution 1").click()
    expect(scene.main.locator("pre").first).to_contain_text("Traceback")
    scene.button(f"Retry job {scene.failed[0]}").click()
    expect(scene.main).to_contain_text("is waiting again")
    expect(scene.main.get_by_text("#2")).to_be_visible()

    scene.console.open(f"jobs/{scene.long}")
    scene.button(f"Cancel job {scene.long}").click()
    scene.button("Cancel the job").click()
    expect(scene.main.locator("dl")).to_contain_text("cancelled")
    scene.console.open("jobs/00000000-0000-7000-8000-000000000000")
    expect(scene.main).to_contain_text("There is no such job")
    scene.console.forgive("404")


def holding(scene: Scene, address: str, *, times: int | None = None) -> list[Route]:
    """Hold the requests to an address, and return them."""
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    scene.console.page.route(address, hold, times=times)
    return held


def test_rows_of_another_filter_are_not_shown(scene: Scene) -> None:
    """Also while the process does not answer: the caption has the new filter."""
    page = scene.console.page
    scene.console.open("jobs?state=failed")
    expect(scene.main.get_by_role("rowheader").first).to_be_visible()
    held = holding(scene, "**/ui/data/jobs?*")
    scene.main.get_by_label("State").select_option("completed")
    expect(scene.main.locator(".loading")).to_be_visible()
    expect(scene.main.get_by_role("rowheader")).to_have_count(0)
    for route in held:
        route.continue_()
    page.unroute("**/ui/data/jobs?*")
    expect(scene.main.get_by_role("rowheader").first).to_be_visible()


def test_an_answer_from_before_an_action_is_not_shown(scene: Scene) -> None:
    """A view that loads while its operator acts asks again."""
    page = scene.console.page
    scene.console.open("queues")
    expect(scene.row("default")).to_contain_text("running")
    held = holding(scene, "**/ui/data/queues", times=1)
    while not held:
        page.wait_for_timeout(10)
    scene.button("Pause queue default").click()
    expect(scene.row("default")).to_contain_text("paused")
    assert held[0].request.failure is None  # it has not reached its time limit
    held[0].continue_()
    scene.button("Undo").click()
    expect(scene.row("default")).to_contain_text("running")


def test_queues(scene: Scene) -> None:
    """A queue is paused, and the pause is undone."""
    scene.console.open("queues")
    scene.button("Pause queue notifications").click()
    expect(scene.row("notifications")).to_contain_text("paused")
    scene.button("Undo").click()
    expect(scene.row("notifications")).to_contain_text("running")
    expect(scene.row("notifications").get_by_role("link", name=str(FAILED))).to_be_visible()


def test_loggers(scene: Scene) -> None:
    """A level returns after a time, and a change is undone; a name is shown as text."""
    scene.console.open("loggers")
    scene.main.get_by_label("Find a logger").fill("markup")
    expect(scene.main.get_by_role("rowheader")).to_contain_text([PLANTED])
    assert "find=markup" in scene.console.page.url
    level = scene.main.get_by_label(f"Own level of markup.{PLANTED}")
    level.select_option("debug")
    expect(scene.main).to_contain_text("the original level returns in 30 min")
    expect(level).to_have_value("debug")
    scene.button("Undo").click()
    expect(level).to_have_value("")


def test_a_level_that_is_refused(scene: Scene) -> None:
    """The view goes on to show the level of the process."""
    page = scene.console.page
    scene.console.open("loggers?find=markup")
    level = scene.main.get_by_label(f"Own level of markup.{PLANTED}")
    page.route("**/level", lambda route: route.fulfill(status=503, body="{}"))
    level.select_option("debug")
    expect(scene.main.locator(".toast.bad")).to_be_visible()
    expect(level).to_have_value("")
    page.unroute("**/level")
    scene.console.forgive("503")


def test_settings(scene: Scene) -> None:
    """Secrets are masked, and the doctor runs."""
    scene.console.open("settings")
    scene.main.get_by_label("Find a setting").fill("MANAGEMENT_TOKEN")
    expect(scene.row("MANAGEMENT_TOKEN").first).to_contain_text("***")
    scene.button("Run the doctor").click()
    expect(scene.main.get_by_role("table", name="Findings of the doctor")).to_be_visible()


def test_audit(scene: Scene) -> None:
    """An action is there a moment later, with its actor; filters are in the address."""
    scene.console.open("circuits")
    scene.row("carrier").get_by_role("button", name="Open circuit carrier").click()
    scene.button("Undo").click()
    scene.console.open("audit")
    scene.main.get_by_label("Action").select_option("circuit.open")
    assert "action=circuit.open" in scene.console.page.url
    opened = scene.main.get_by_role("row").filter(has_text="CLOSED → OPEN").first
    expect(opened).to_contain_text(re.compile("console [0-9a-f]{6}"))
    expect(opened).to_contain_text("127.0.0.1")
    expect(scene.main.get_by_role("row").filter(has_text="circuit.close")).to_have_count(0)
    expect(scene.main).to_contain_text("in Postgres" if scene.stored else "of this process")
    scene.main.get_by_label("Outcome").select_option("failed")
    expect(scene.main).to_contain_text("No event matches.")


def test_circuits(scene: Scene) -> None:
    """A circuit is opened by hand, and the page follows by the stream; "Undo" closes it."""
    scene.console.open("circuits")
    circuit = scene.row("carrier")
    circuit.get_by_role("button", name="Open circuit carrier").click()
    expect(circuit).to_contain_text("none: opened by hand")
    expect(scene.main.locator(".toast")).to_contain_text("rejected until you close it")
    expect(circuit.get_by_role("button", name="Close circuit carrier")).to_be_visible()
    scene.button("Undo").click()
    expect(circuit.get_by_role("button", name="Open circuit carrier")).to_be_visible()
    # A circuit that had opened by itself would stay open after an "Undo" of this.
    expect(scene.main.locator(".toast")).to_contain_text("is closed")
    expect(scene.button("Undo")).to_have_count(0)


def test_a_circuit_that_opened_by_itself(scene: Scene) -> None:
    """It has a time of the next probe; nothing undoes its close, as that would open it for good."""
    scene.console.open("circuits")
    states = [scene.service.get("/carrier").json()["state"] for _ in range(5)]
    assert states[-1] == "OPEN"
    circuit = scene.row("carrier")
    expect(circuit).to_contain_text("the first call after")
    circuit.get_by_role("button", name="Close circuit carrier").click()
    expect(circuit).to_contain_text("closed")
    expect(scene.main.locator(".toast")).to_contain_text("is closed")
    expect(scene.button("Undo")).to_have_count(0)


def test_schedules(scene: Scene) -> None:
    """A schedule is paused, the pause is undone, and it runs now."""
    scene.console.open("schedules")
    schedule = scene.row("console.scheduled")
    expect(schedule).to_contain_text("0 3 1 1 *")
    scene.button("Pause schedule console.scheduled").click()
    expect(schedule).to_contain_text("paused")
    scene.button("Undo").click()
    expect(schedule).to_contain_text("running")
    scene.button("Run schedule console.scheduled now").click()
    expect(scene.main.locator(".toast.good")).to_contain_text("the times of the schedule stay")
    schedule.get_by_role("link").click()
    expect(scene.main.get_by_role("rowheader")).to_have_count(1)
    expect(scene.main.get_by_role("row").last).to_contain_text("completed")


def test_a_job_of_tomorrow_runs_now(scene: Scene) -> None:
    """The button is there while the job waits for its time."""
    later = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    body = {"task": "console.webhook", "payload": 1, "runAt": later}
    job = scene.service.get(JOBS, method="POST", json_body=body).json()["id"]
    scene.console.open(f"jobs/{job}")
    scene.button(f"Run job {job} now").click()
    expect(scene.main.locator("dl")).to_contain_text("completed")
    expect(scene.button(f"Run job {job} now")).to_have_count(0)


def test_changes(scene: Scene) -> None:
    """The changes of all processes, by check."""
    scene.console.open("changes?check=supplier")
    expect(scene.main.get_by_role("rowheader").first).to_be_visible()


def problems(opened: Console) -> list[str]:
    """Return the rules of axe-core that the page violates, and whether it is too wide."""
    found = opened.page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
    sideways = opened.page.evaluate("document.documentElement.scrollWidth > innerWidth")
    return [each["id"] for each in found] + ["sideways"] * sideways


@pytest.mark.parametrize("scene", STORAGES[-1:], indirect=True)
@pytest.mark.soak
@pytest.mark.parametrize(("dark", "width"), APPEARANCES)
def test_everybody_can_use_it(
    scene: Scene, browser: Browser, record_property: Record, *, dark: bool, width: int
) -> None:
    """No view violates a rule of axe-core, or has to be scrolled sideways."""
    with console(browser, scene.service, dark=dark, width=width) as opened:
        found = {}
        opened.page.evaluate(AXE)  # the views are parts of one page
        for view in [*VIEWS, f"jobs/{scene.failed[1]}"]:
            opened.open(view)
            expect(opened.main.locator(".loading")).to_have_count(0)
            if view in FEW_ROWS:
                opened.main.get_by_label(re.compile("^Find a ")).fill(FEW_ROWS[view])
                expect(opened.main.get_by_role("rowheader").nth(MAX_ROWS)).to_have_count(0)
            found[view] = problems(opened)
            if view == "status":
                opened.page.get_by_role("button", name="supplier", exact=True).click()
                expect(opened.main.locator("pre")).to_be_visible()
                found["the details of a check"] = problems(opened)
            if view == "stop":
                opened.page.get_by_role("button", name="Begin the stop …").click()
                found["a dialog"] = problems(opened)
                opened.page.get_by_role("button", name="Keep as it is").click()
        opened.page.get_by_role("button", name="Log out").click()
        opened.open("login")
        found["login"] = problems(opened)
        opened.require_clean()

    for name, each in found.items():
        view = "jobs/{id}" if name.startswith("jobs/") else name
        record_property(view, f"{'dark' if dark else 'light'} {width} px: {len(each)}")
    assert {name: each for name, each in found.items() if each} == {}


@pytest.mark.parametrize("scene", STORAGES[-1:], indirect=True)
def test_markup_in_names_and_headers_stays_text(scene: Scene) -> None:
    """A task may have any name, and a client sends any header; the server takes no such id."""
    headers = {"X-Correlation-ID": PLANTED, "User-Agent": PLANTED, "Referer": PLANTED}
    name = f"console.planted {PLANTED}"
    job = accept(scene.service, name, {PLANTED: PLANTED}, **headers)
    until(scene.service, job, "completed")
    scene.console.open(f"jobs?task={quote(name)}")
    expect(scene.main.get_by_role("table")).to_contain_text(name)
    scene.console.open(f"jobs/{job}")
    expect(scene.main).to_contain_text(name)


def test_the_narrowest_screen(scene: Scene) -> None:
    """A window of 1280 px at 400 % has 320 px, which need no sideways scrolling."""
    page = scene.console.page
    before = page.viewport_size
    assert before is not None
    page.set_viewport_size({"width": 320, "height": 800})
    scene.console.open("status")
    expect(scene.row("supplier").get_by_role("img")).to_be_visible()
    wide = page.evaluate("document.documentElement.scrollWidth")
    page.set_viewport_size(before)
    assert wide == 320


BACKWARDS = """
() => {
  const found = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const node = texts.currentNode;
    for (const word of node.data.matchAll(/[A-Za-z]{2,}/g)) {
      const [one, next] = [0, 1].map((place) => {
        const range = document.createRange();
        range.setStart(node, word.index + place);
        range.setEnd(node, word.index + place + 1);
        return range.getBoundingClientRect();
      });
      if (one.top === next.top && one.left > next.left) found.push(node.data);
    }
  }
  return [...new Set(found)];
}
"""
"""Returns the texts with a word whose second letter is left of the first one."""


@pytest.mark.parametrize("scene", STORAGES[-1:], indirect=True)
def test_a_name_does_not_reverse_the_text_around_it(scene: Scene) -> None:
    """A character that would is shown as its code."""
    name = f"console.reversed {REVERSED}"
    shown = name.replace("\u2069", r"\u2069").replace("\u202e", r"\u202e")
    job = accept(scene.service, name, "\u05d0\u05d1 12")
    until(scene.service, job, "failed")
    for view in (f"jobs?task={quote(name)}", f"jobs/{job}"):
        scene.console.open(view)
        expect(scene.main).to_contain_text(shown)
        expect(scene.main.locator("bdi").first).to_contain_text("\u05d0\u05d1 12")
        assert scene.console.page.evaluate(BACKWARDS) == []
    scene.console.open("loggers?find=reversed")
    expect(scene.main.get_by_role("rowheader")).to_contain_text([shown.partition(" ")[2]])
    assert scene.console.page.evaluate(BACKWARDS) == []


def test_the_keyboard_is_enough(scene: Scene) -> None:
    """Tab leads through the page in order, the dialog keeps it, and Escape ends the dialog."""
    page = scene.console.page
    scene.console.open("queues")
    expect(scene.row("default")).to_be_visible()
    page.reload()
    expect(scene.row("default")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(scene.main).to_be_focused()
    page.keyboard.press("Tab")
    while page.evaluate("document.activeElement.textContent") != "Pause":
        assert page.evaluate("document.activeElement !== document.body")
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(scene.button("Undo")).to_be_visible()
    scene.button("Undo").focus()
    page.keyboard.press("Enter")
    expect(scene.row("default")).to_contain_text("running")

    scene.console.open("stop")
    scene.button("Begin the stop …").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    for _ in range(4):
        page.keyboard.press("Tab")
        # After its last field the focus is in the browser's own controls.
        assert page.evaluate("document.activeElement.matches('dialog *, body')")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(scene.button("Begin the stop …")).to_be_focused()


def test_without_a_log_in_it_reads_only(scene: Scene, browser: Browser) -> None:
    """No view has an action, and each tab is there: those with more than the health ask for it."""
    with console(browser, scene.service, token="") as opened:
        opened.open("status")
        expect(opened.sentence).to_have_text(re.compile("^Healthy: all"))
        expect(opened.page.get_by_role("button", name="Check now")).to_have_count(0)
        expect(opened.main.get_by_role("heading", name="Queues")).to_have_count(0)
        opened.open("stop")
        expect(opened.page.get_by_role("button", name="Begin the stop …")).to_have_count(0)
        opened.open("circuits")
        expect(opened.main.get_by_role("rowheader", name="carrier")).to_be_visible()
        expect(opened.page.get_by_role("button", name="Open circuit")).to_have_count(0)
        for tab in ("Fleet", "Jobs", "Queues", "Schedules", "Loggers", "Settings"):
            opened.page.get_by_role("link", name=tab, exact=True).click()
            expect(opened.page.get_by_role("heading", level=1)).to_have_text(tab)
            expect(opened.main.locator("input[type=password]")).to_have_count(1)
            expect(opened.main.get_by_role("row")).to_have_count(0)
        opened.page.get_by_label("Token").fill("wrong")
        opened.page.get_by_label("Token").press("Enter")
        expect(opened.page.get_by_role("alert")).to_be_visible()
        opened.page.get_by_label("Token").fill(QUICK["MANAGEMENT_TOKEN"])
        opened.page.get_by_label("Token").press("Enter")
        expect(opened.page.get_by_role("button", name="Run the doctor")).to_be_visible()
        opened.page.get_by_role("button", name="Log out").click()
        expect(opened.page.get_by_role("button", name="Run the doctor")).to_have_count(0)
        opened.forgive("401")
        opened.require_clean()
