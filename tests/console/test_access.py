"""The operations console in production: rights, the end of a session, two tabs, a large result."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect
from tests.console.console_app import PLANTED
from tests.console.pages import APP, QUICK, TOKEN, Console, console
from tests.servers.chromium import Visit
from tests.servers.waiting import wait_until
from tests.system.jobs import JOBS
from tests.system.service import Service, running

API_TOKEN = "planted-api-9f3c7a1e5b8d2046"
LARGE, SHOWN = 1_000_000, 65_536
"""Characters."""


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """Return a service with the settings of production, for all tests of this file."""
    environment = {
        **QUICK,
        "ENVIRONMENT": "production",
        "ALLOW_MEMORY_ADAPTERS": "true",
        "API_TOKEN": API_TOKEN,
    }
    with running(*APP, management=True, environment=environment) as started:
        yield started.wait_ready()


def done(service: Service, task: str, payload: object, state: str) -> str:
    """Run a job to a state, and return its id."""
    headers = {"Authorization": f"Bearer {API_TOKEN}"}
    body = {"task": task, "payload": payload}
    accepted = service.get(JOBS, method="POST", json_body=body, headers=headers)
    job = str(accepted.json()["id"])

    def reached() -> bool:
        return bool(service.get(f"{JOBS}/{job}", headers=headers).json()["state"] == state)

    wait_until(reached, seconds=20, what=f"job {job} {state}")
    return job


def log_in(page: Page, token: str) -> None:
    """Enter a token, by the keyboard."""
    page.get_by_label("Token").fill(token)
    page.get_by_label("Token").press("Enter")


def test_wrong_tokens_open_nothing(browser: Browser, service: Service) -> None:
    """The view asks for the token in its place, and is there after the right one."""
    job = done(service, "console.webhook", PLANTED, "failed")
    with console(browser, service, token="") as opened:
        opened.open(f"jobs/{job}")
        for wrong, alert in (
            ("wrong", "This is not the token"),
            (API_TOKEN, "The token of api has not the right read"),
        ):
            log_in(opened.page, wrong)
            expect(opened.page.get_by_role("alert")).to_contain_text(alert)
        expect(opened.main.get_by_text(job)).to_have_count(0)
        log_in(opened.page, TOKEN)
        expect(opened.page.get_by_role("button", name="Log out")).to_be_visible()
        expect(opened.main).to_contain_text(f"the receiver is away {PLANTED}")
        opened.forgive("401", "403")
        opened.require_clean()


FRAME = """
(address) => new Promise((resolve) => {
  const frame = document.createElement("iframe");
  frame.onload = () => resolve();
  frame.src = address;
  document.body.append(frame);
})
"""


def test_another_page_cannot_frame_the_console(browser: Browser, service: Service) -> None:
    """The frame stays empty, so no click in it acts; the browser names the policy."""
    with console(browser, service) as opened, running(environment={}) as other:
        other.wait_ready()
        opened.page.goto(f"http://127.0.0.1:{other.port}/health/live")
        opened.page.evaluate(FRAME, f"http://127.0.0.1:{opened.port}/health/ui#/stop")
        (frame,) = opened.page.main_frame.child_frames
        assert frame.locator("button, main").count() == 0
        assert "frame-ancestors" in " ".join(opened.visit.problems)


def test_a_session_that_ends(browser: Browser, service: Service) -> None:
    """The page says so at the next request, hides what needs it, and another log-in brings it."""
    with console(browser, service) as opened:
        opened.open("settings")
        expect(opened.main.get_by_role("button", name="Run the doctor")).to_be_visible()
        opened.page.context.clear_cookies()
        opened.page.get_by_role("button", name="Run the doctor").click()
        expect(opened.main).to_contain_text("The session has ended. Log in again.")
        expect(opened.page.get_by_role("button", name="Log out")).to_have_count(0)
        expect(opened.main.get_by_role("row")).to_have_count(0)
        opened.log_in()
        opened.open("settings")
        expect(opened.main.get_by_role("button", name="Run the doctor")).to_be_visible()
        opened.forgive("401")
        opened.require_clean()


def test_two_tabs_act_on_one_job(browser: Browser, service: Service) -> None:
    """The second is refused with the reason and shows the new state; a log-out ends both."""
    job = done(service, "console.long", 600, "active")
    with console(browser, service) as first:
        second = Console(Visit(first.page.context.new_page()), first.port)
        for tab in (first, second):
            tab.open(f"jobs/{job}")
            tab.page.get_by_role("button", name=f"Cancel job {job}").click()
        sure = "Cancel the job"
        first.page.get_by_role("button", name=sure).click()
        for tab in (first, second):
            expect(tab.main.locator("dl")).to_contain_text("cancelled")
        second.page.get_by_role("button", name=sure).click()
        expect(second.main.locator(".toast.bad")).to_contain_text("cancelled")

        first.page.get_by_role("button", name="Log out").click()
        expect(first.page.get_by_role("button", name="Log out")).to_have_count(0)
        expect(second.main).to_contain_text("The session has ended. Log in again.")
        first.forgive("401", "409")
        first.require_clean()


def test_a_result_of_a_megabyte(browser: Browser, service: Service) -> None:
    """Its first 64 KiB are shown as text, the page says that they are cut, and works on."""
    job = done(service, "console.large", LARGE, "completed")
    with console(browser, service) as opened:
        opened.open(f"jobs/{job}")
        expect(opened.main).to_contain_text("The text is cut")
        text = opened.main.locator("pre").last.evaluate("(element) => element.textContent")
        opened.page.get_by_role("link", name="Status").click()
        expect(opened.main.get_by_role("row").filter(has_text="supplier")).to_be_visible()
        opened.require_clean()

    assert len(text) in range(SHOWN, SHOWN + 10)
    assert text.count("<script>") > SHOWN / len(PLANTED) / 2
