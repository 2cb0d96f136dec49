"""Draws the pictures of docs/console.md from a service with faults, in Debian's Chromium.

python -m tests.console.pictures
"""

import re
import signal
import threading
from contextlib import ExitStack
from pathlib import Path

from playwright.sync_api import expect
from tests.console.pages import QUICK, Console, console
from tests.servers.chromium import chromium
from tests.servers.postgres import postgres_server
from tests.servers.redis import redis_server
from tests.system.jobs import accept, until
from tests.system.service import request, running
from tests.system.workers import environment_of

APP = ("--app", "tests.console.picture_app:app")
DOCS = Path(__file__).parents[2] / "docs"
SIZE = {"width": 1100, "height": 760}


def shoot(page: Console, name: str) -> None:
    """Write one picture, once events arrive."""
    expect(page.page.locator("header")).to_contain_text("last event")
    page.page.screenshot(path=DOCS / f"console-{name}.png")


def draw() -> None:
    """Draw the views while Redis is frozen, a worker is killed, jobs fail and the service stops."""
    with ExitStack() as stack:
        enter = stack.enter_context
        browser = enter(chromium())
        postgres, redis = enter(postgres_server()), enter(redis_server())
        more = {
            "REDIS_URL": redis.url(),
            "SHUTDOWN_READINESS_DELAY": "1000",
            "SHUTDOWN_DRAIN_TIMEOUT": "12000",
        }
        environment = environment_of(postgres, **{**QUICK, **more})
        service = enter(running(*APP, management=True, environment=environment)).wait_ready()
        workers = [
            enter(running(*APP, program="worker", management=True, environment=environment))
            for _ in range(3)
        ]
        for worker in workers:
            worker.wait_ready()
        failed = [accept(service, "orders.bill", order) for order in range(12)]
        for order, job in enumerate(failed):
            until(service, job, "failed" if order % 4 else "completed")
        for _ in range(3):
            accept(service, "orders.ship", 600)

        page = enter(console(browser, service))
        page.page.set_viewport_size({"width": SIZE["width"], "height": SIZE["height"]})
        page.open("jobs?state=failed")
        expect(page.main.get_by_role("rowheader")).to_have_count(9)
        shoot(page, "jobs")
        workers[0].signal(signal.SIGKILL)
        page.open("fleet")
        expect(page.main).to_contain_text("1 silent")
        shoot(page, "fleet")
        redis.freeze()
        page.open("status")
        expect(page.sentence).to_contain_text(re.compile("^Degraded: redis .*fails"))
        shoot(page, "status")
        redis.thaw()
        expect(page.sentence).not_to_contain_text("redis")

        threading.Thread(
            target=request, args=(service.port, "/report?seconds=9"), daemon=True
        ).start()
        page.open("stop")
        expect(page.main).to_contain_text("1 request and")
        service.signal(signal.SIGTERM)
        drain = page.main.get_by_role("row").filter(has_text="drain")
        expect(drain).to_contain_text("running")
        expect(drain).to_contain_text(re.compile(r"\b[2-5]\.\d of 12"))
        shoot(page, "stop")
        service.exit_code()


if __name__ == "__main__":
    draw()
