"""The operations console while the database, the process or the connection fails."""

import json
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from playwright.sync_api import Browser, Route, expect
from tests.console.pages import APP, HIDDEN, QUICK, Console, console
from tests.servers.postgres import PostgresServer
from tests.system.service import Service, running
from tests.system.workers import environment_of

STOP = {
    **QUICK,
    "SHUTDOWN_READINESS_DELAY": "1500",
    "SHUTDOWN_DRAIN_TIMEOUT": "30000",
    "STAGE_SECONDS": "0.5",
}
HEALTHY = re.compile("^Healthy: all")
SILENT = re.compile("^Disconnected: (no event since|the connection is open, and no event arrives)")

SEEN = """
() => {
  window.seen = [];
  const note = (text) => { if (window.seen.at(-1) !== text) window.seen.push(text); };
  const look = () => {
    if (window.seen.at(-1) === "Ended") return;  // the last stage still runs at the last event
    for (const row of document.querySelectorAll("tr.stage.running")) {
      note(row.querySelector("th").textContent);
    }
    if (document.querySelector("[role=status]").textContent.startsWith("Ended")) note("Ended");
  };
  const all = { subtree: true, childList: true, characterData: true, attributes: true };
  new MutationObserver(look).observe(document.body, all);
}
"""


def require_clean(opened: Console) -> None:
    """Require a clean page, except the requests that failed with the process."""
    opened.forgive("net::ERR_")
    opened.require_clean()


def test_a_frozen_database(browser: Browser, own_postgres: PostgresServer) -> None:
    """The page says so while it lasts, still shows the other checks, and sees the end."""
    environment = environment_of(own_postgres, **QUICK)
    with running(*APP, management=True, environment=environment) as service:
        service.wait_ready()
        with console(browser, service) as opened:
            expect(opened.sentence).to_have_text(HEALTHY)
            own_postgres.freeze()
            expect(opened.sentence).to_have_text(
                re.compile(r"^Not ready: database \(\w+\) fails\.$")
            )
            verdict = opened.main.get_by_role("region", name="Verdict")
            expect(verdict).to_contain_text("ViralFXDatabaseDown")
            expect(opened.main.get_by_role("row").filter(has_text="supplier")).to_contain_text(
                "pass"
            )
            opened.open("jobs")
            expect(opened.main).to_contain_text("The ledger does not answer")
            own_postgres.thaw()
            # The sentence is in this view, too.
            expect(opened.sentence).to_have_text(HEALTHY)
            expect(opened.main.locator(".empty")).to_be_visible()
            # The process lived, so the browser has written no line about a request.
            opened.require_clean()


@contextmanager
def _request_in_flight(service: Service) -> Iterator[None]:
    """Hold a request in flight for the time of the block; its client leaves at the end."""
    with socket.create_connection(("127.0.0.1", service.port)) as client:
        client.sendall(b"GET /slow?seconds=60 HTTP/1.1\r\nHost: test\r\n\r\n")
        yield


def test_a_stop_is_shown_to_its_end(browser: Browser) -> None:
    """The page on the management port shows each stage while it runs, and then the end."""
    with running(*APP, management=True, environment=STOP) as service:
        service.wait_ready()
        with console(browser, service) as opened:
            opened.open("stop")
            expect(opened.main.get_by_role("row").filter(has_text="drain")).to_contain_text(
                "pending"
            )
            opened.page.evaluate(SEEN)
            with _request_in_flight(service):
                expect(opened.main).to_contain_text("1 request and")
                service.signal(signal.SIGTERM)
                expect(opened.main.locator("tr.stage.running")).to_contain_text("drain")
                # The drain lasts as long as the block, so the page cannot be past this text.
                expect(opened.main).to_contain_text("SIGTERM. Forced end in")
            expect(opened.sentence).to_have_text(re.compile(r"^Ended: .* \(SIGTERM\) at "))
            code = service.exit_code()
            seen = opened.page.evaluate("window.seen")
            expect(opened.main.get_by_role("row").filter(has_text="drain")).to_contain_text("ok")
            require_clean(opened)

    assert code == 0, list(service.output)[-20:]
    assert seen == ["stop accepting", "drain", "save state", "close connections", "Ended"]


def test_a_killed_process_and_the_next_one(browser: Browser) -> None:
    """The page says that nothing answers, and shows the next process without a log-in."""
    with running(*APP, management=True, environment=QUICK) as service:
        service.wait_ready()
        with console(browser, service) as opened:
            first = opened.page.locator(".instance strong").inner_text()
            service.signal(signal.SIGKILL)
            expect(opened.sentence).to_have_text(re.compile("^Disconnected: no answer since"))
            ports = {"PORT": str(service.port), "MANAGEMENT_PORT": str(service.management_port)}
            service.exit_code()
            with running(*APP, environment={**QUICK, **ports}):
                expect(opened.page.locator(".instance strong")).not_to_have_text(first)
                expect(opened.page.get_by_role("button", name="Log out")).to_be_visible()
                expect(opened.sentence).to_have_text(HEALTHY)
                require_clean(opened)


def test_a_suspended_process(browser: Browser) -> None:
    """Missing beats are noticed although the connection stays open, and nothing stays green."""
    with running(*APP, management=True, environment=QUICK) as service:
        service.wait_ready()
        with console(browser, service) as opened:
            expect(opened.page.locator("header .word")).to_have_text("✓ ready")
            service.signal(signal.SIGSTOP)
            try:
                # Whether one event has come before depends on the moment.
                expect(opened.sentence).to_have_text(SILENT)
                expect(opened.page.locator("header .word.good")).to_have_count(0)
            finally:
                service.signal(signal.SIGCONT)
            expect(opened.page.locator("header .word")).to_have_text("✓ ready")
            expect(opened.sentence).to_have_text(HEALTHY)
            require_clean(opened)


def test_a_page_without_a_stream(browser: Browser, tmp_path: Path) -> None:
    """It asks instead, shows changes, and takes the stream when one is free."""
    supplier = tmp_path / "away"
    more = {"CONSOLE_MAX_STREAMS": "1", "SUPPLIER_AWAY": str(supplier)}
    with running(*APP, management=True, environment={**QUICK, **more}) as service:
        service.wait_ready()
        with console(browser, service) as first, console(browser, service) as opened:
            expect(opened.main).to_contain_text("too many streams open")
            expect(opened.sentence).to_have_text(HEALTHY)
            supplier.touch()
            expect(opened.sentence).to_have_text("Degraded: supplier (refused) fails.")
            expect(opened.main).to_contain_text("too many streams open")
            first.page.close()
            expect(opened.main).not_to_contain_text("too many streams open")
            expect(opened.sentence).to_have_text("Degraded: supplier (refused) fails.")
            opened.require_clean()


def test_a_hidden_page_closes_its_stream(browser: Browser) -> None:
    """A page that is shown again, or whose updates go on, catches up with what it missed."""
    with running(*APP, management=True, environment=QUICK) as service:
        service.wait_ready()
        with console(browser, service) as opened:
            expect(opened.page.locator("header .word")).to_have_text("✓ ready")
            streams = [url for url in opened.visit.requested if "/events" in url]
            opened.page.evaluate(HIDDEN, True)
            expect(opened.page.locator("header")).to_contain_text("not connected")
            opened.page.evaluate(HIDDEN, False)
            expect(opened.page.locator("header .word")).to_have_text("✓ ready")
            again = [url for url in opened.visit.requested if "/events" in url]
            opened.page.get_by_role("button", name="Pause updates").click()
            expect(opened.sentence).to_have_text(re.compile("^Disconnected: updates are paused"))
            opened.page.get_by_role("button", name="Pause updates").click()
            expect(opened.page.locator("header .word")).to_have_text("✓ ready")
            require_clean(opened)

    assert len(again) == len(streams) + 1
    assert "last=" in again[-1]


def test_a_late_event_of_a_circuit(browser: Browser) -> None:
    """The next probe is at the time of the process, as when a stream goes on after a pause."""
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    with running(*APP, management=True, environment=QUICK) as service:
        service.wait_ready()
        with console(browser, service, token="") as opened:
            opened.page.route("**/health/events*", hold)
            opened.open("circuits")
            circuit = opened.main.get_by_role("row").filter(has_text="carrier")
            expect(circuit).to_contain_text("closed")
            while not held:
                opened.page.wait_for_timeout(10)
            states = [service.get("/carrier").json()["state"] for _ in range(5)]
            assert states[-1] == "OPEN"
            session = service.get("/health/ui/session?start").json()
            (item,) = session["start"]["snapshot"]["circuits"]
            opened.page.clock.set_system_time(datetime.now(UTC) + timedelta(hours=1))
            event = f"event: circuit\ndata: {json.dumps(item)}\n\n"
            held[0].fulfill(body=event, content_type="text/event-stream")
            probe = circuit.locator("td[data-label='Next probe'] time")
            expect(probe).to_be_visible()
            at = datetime.fromisoformat(probe.get_attribute("datetime") or "")
            require_clean(opened)

    since = datetime.fromisoformat(item["since"])
    assert timedelta(0) < at - since <= timedelta(seconds=61)
