"""Measures the first view of the operations console: time until it is complete, and bytes.

Each round is a new profile of Debian's Chromium, so its cache is empty and it has no connection.
The time runs from the start of the navigation until the frame after the last change, by the clock
of the browser. Complete is the status view with the sentence on top and, for each check of the
process, its row and its strip of 24 hours. Process and browser run before that. A first visit does
not count, because the process compresses its files then. The bytes are those until that moment,
with headers and without the events.
"""

import argparse
import statistics
from collections.abc import Sequence

from benchmarks.results import Target, circumstances, command, publish, table, target_table
from benchmarks.servers import BACKEND, Server
from playwright.sync_api import Browser
from tests.servers.chromium import chromium

ROUNDS = 15
MAX_MILLISECONDS = 300.0
MAX_KIB = 100.0
_NOTE_TIME = """
window.complete = new Promise((resolve) => {
  new MutationObserver((_, observer) => {
    const checks = document.querySelectorAll("section[aria-labelledby=checks] tbody tr").length;
    const strips = document.querySelectorAll(".strip svg").length;
    if (!document.querySelector(".verdict") || !checks || strips < checks) return;
    observer.disconnect();
    requestAnimationFrame(() => setTimeout(() => resolve(performance.now())));
  }).observe(document, { subtree: true, childList: true });
});
"""
_BYTES = """
performance.getEntries().reduce((sum, entry) => sum + (entry.transferSize || 0), 0)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(prog="just bench-first-view", description=__doc__)
    add = parser.add_argument
    add("--check", action="store_true", help="exit 1 when a target is missed")
    add("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    add("--dry", action="store_true", help="leave RESULTS.md as it is")
    options = parser.parse_args(arguments)
    with Server(BACKEND) as server, chromium() as browser:
        server.wait_for_200("/health/ready", seconds=60)
        address = f"http://127.0.0.1:{server.port}/health/ui"
        _visit(browser, address)  # the process compresses its files at the first request
        seen = [_visit(browser, address) for _ in range(options.rounds)]
    times, sizes = [each[0] for each in seen], [each[1] for each in seen]
    middle = statistics.median(times)
    targets = [
        Target(
            what="first view of the console, from an empty cache",
            measured=middle,
            limit=MAX_MILLISECONDS,
            at_least=False,
            unit=" ms",
        ),
        Target(
            what="bytes of the first view of the console",
            measured=max(sizes) / 1024,
            limit=MAX_KIB,
            at_least=False,
            unit=" KiB",
        ),
    ]
    rows = [("time in ms", f"{min(times):.0f}", f"{middle:.0f}", f"{max(times):.0f}")]
    lines = [
        *circumstances(command("bench-first-view"), f"{options.rounds} new profiles of Chromium"),
        "",
        *table(("first view", "least", "median", "most"), rows),
        "",
        *target_table(targets),
    ]
    return publish("first_view.py", lines, targets, check=options.check, record=not options.dry)


def _visit(browser: Browser, address: str) -> tuple[float, float]:
    """Return the milliseconds until the first view is complete, and the bytes by then."""
    context = browser.new_context()
    try:
        context.add_init_script(_NOTE_TIME)
        page = context.new_page()
        page.goto(address, wait_until="commit")
        return page.evaluate("window.complete"), page.evaluate(_BYTES)
    finally:
        context.close()


if __name__ == "__main__":
    raise SystemExit(main())
