"""The operations console as a person uses it: in a browser, with a token, by clicks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from playwright.sync_api import Browser, Locator, Page, expect
from tests.servers.chromium import Visit, visiting
from tests.system.service import Service

TOKEN = "planted-management-4b7e1d9c6a02f853"
APP = ("--app", "tests.console.console_app:app")
QUICK = {
    "MANAGEMENT_TOKEN": TOKEN,
    "JOB_MAX_ATTEMPTS": "1",
    "HEALTH_CHECK_INTERVAL": "300",
    "HEALTH_CHECK_TIMEOUT": "500",
    "DB_HEALTH_CHECK_INTERVAL": "300",
}
"""Variables of a service whose checks notice a fault within a second."""

VIEWS = {
    "status": "Status",
    "stop": "Stop",
    "fleet": "Fleet",
    "jobs": "Jobs",
    "queues": "Queues",
    "schedules": "Schedules",
    "circuits": "Circuits",
    "loggers": "Loggers",
    "settings": "Settings",
    "audit": "Audit",
    "changes": "Changes",
}
"""The heading of each view, by its name in the address."""

HIDDEN = """(hidden) => {
  Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
}"""
"""Hides or shows the page, which closes its stream or opens it again."""


@dataclass
class Console:
    """One page of the console, and the clicks on it."""

    visit: Visit
    port: int
    clicks: int = 0

    @property
    def page(self) -> Page:
        """The page."""
        return self.visit.page

    @property
    def main(self) -> Locator:
        """The part of the page below the head and the names of the views."""
        return self.page.get_by_role("main")

    @property
    def sentence(self) -> Locator:
        """The sentence of the moment, the only status of the page."""
        return self.page.locator("[role=status]")

    def open(self, view: str = "status") -> None:
        """Go to a view by its address."""
        self.page.goto(f"http://127.0.0.1:{self.port}/health/ui#/{view}")
        name, _, job = view.partition("?")[0].partition("/")
        heading = "Job" if job else {"login": "Log in"}.get(name) or VIEWS[name]
        expect(self.page.get_by_role("heading", level=1)).to_have_text(heading)

    def log_in(self, token: str = TOKEN) -> None:
        """Enter a token."""
        self.open("login")
        self.page.get_by_label("Token").fill(token)
        self.page.get_by_label("Token").press("Enter")
        expect(self.page.get_by_role("button", name="Log out")).to_be_visible()

    def enter(self, token: str = TOKEN) -> None:
        """Begin a session without the form, and show the status as after a log-in by it."""
        address = f"http://127.0.0.1:{self.port}"
        answer = self.page.context.request.post(
            f"{address}/health/ui/session", data={"token": token}, headers={"Origin": address}
        )
        assert answer.ok, answer.text()
        self.open()
        expect(self.page.get_by_role("button", name="Log out")).to_be_visible()

    def click(self, found: Locator) -> None:
        """Click, and count it."""
        self.clicks += 1
        found.click()

    def forgive(self, *words: str) -> None:
        """Leave out the lines that the browser itself writes about failed requests."""
        problems = self.visit.problems
        loads = [each for each in problems if each.startswith("Failed to load resource")]
        expected = {each for each in loads if any(word in each for word in words)}
        problems[:] = [each for each in problems if each not in expected]

    def require_clean(self) -> None:
        """Fail if anything was requested elsewhere, reported, logged or executed."""
        assert self.visit.foreign(f"http://127.0.0.1:{self.port}/") == []
        assert self.visit.problems == []
        assert self.page.locator("#planted, img, main script").count() == 0


@contextmanager
def console(
    browser: Browser, service: Service, *, dark: bool = False, width: int = 1280, token: str = TOKEN
) -> Iterator[Console]:
    """Open the console in a profile of its own, on the management port if there is one."""
    port = service.management_port or service.port
    with visiting(browser, colors="dark" if dark else "light", width=width) as visit:
        opened = Console(visit, port)
        if token:
            opened.enter(token)
        yield opened
