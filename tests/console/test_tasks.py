"""Common tasks in the operations console take at most four clicks."""

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect
from tests.console.pages import APP, QUICK, Console, console
from tests.system.jobs import accept, until
from tests.system.service import Service, running

MAX_CLICKS = 4


@pytest.fixture(scope="module")
def supplier_away(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file that makes a check fail while it exists."""
    return tmp_path_factory.mktemp("supplier") / "away"


@pytest.fixture(scope="module")
def service(supplier_away: Path) -> Iterator[Service]:
    """Return a service that is not ready while the supplier is away."""
    more = {
        "READINESS_REQUIRES": "database,supplier",
        "SUPPLIER_AWAY": str(supplier_away),
        "SHUTDOWN_READINESS_DELAY": "4000",
    }
    with running(*APP, management=True, environment={**QUICK, **more}) as started:
        yield started.wait_ready()


@pytest.fixture
def opened(browser: Browser, service: Service) -> Iterator[Console]:
    """Return a page with a log-in."""
    with console(browser, service) as page:
        page.open("status")
        yield page


def test_find_why_it_is_not_ready(opened: Console, supplier_away: Path) -> None:
    """The sentence on top names the check, its code, the time and the next step; no click."""
    verdict = opened.main.get_by_role("region", name="Verdict")
    supplier_away.touch()
    try:
        expect(opened.sentence).to_have_text("Not ready: supplier (refused) fails.")
        expect(verdict).to_contain_text("Since")
        expect(verdict).to_contain_text("Runbook: ViralFXCheckFailing")
        opened.click(opened.page.get_by_role("button", name="supplier"))
        expect(opened.main.locator("pre")).to_be_visible()
    finally:
        supplier_away.unlink()
    expect(opened.sentence).to_have_text(re.compile("^Healthy: all"))
    opened.require_clean()

    assert opened.clicks <= MAX_CLICKS


def test_retry_all_failed_webhooks_of_the_last_hour(opened: Console, service: Service) -> None:
    """The number of jobs is confirmed, and each of them runs again."""
    jobs = [accept(service, "console.webhook", "away") for _ in range(12)]
    for job in jobs:
        until(service, job, "failed")
    opened.click(opened.page.get_by_role("link", name="Jobs", exact=True))
    opened.click(opened.page.get_by_role("button", name="Failed in the last hour"))
    expect(opened.main.get_by_role("rowheader")).to_have_count(12)
    opened.click(opened.page.get_by_role("button", name="Retry all that match …"))
    opened.click(opened.page.get_by_role("button", name="Retry 12 jobs"))
    expect(opened.main).to_contain_text("12 jobs wait again")
    for job in jobs:
        until(service, job, "failed")
        assert service.get(f"/api/v1/jobs/{job}").json()["failures"][0]["number"] in {1, 2}
    opened.require_clean()

    assert opened.clicks <= MAX_CLICKS


def test_watch_a_pod_drain(opened: Console, service: Service) -> None:
    """A link beside the sentence leads from any view to the stop, which is shown to its end."""
    opened.open("loggers")
    service.signal(signal.SIGTERM)
    expect(opened.sentence).to_have_text(re.compile(r"^Shutting down \(SIGTERM\)"))
    opened.click(opened.page.get_by_role("link", name="Watch the stop"))
    expect(opened.page.get_by_role("heading", level=1)).to_have_text("Stop")
    expect(opened.sentence).to_have_text(re.compile("^Ended"))

    assert service.exit_code() == 0
    assert opened.clicks <= MAX_CLICKS
