"""Renders the dashboard with Grafana's components and real data, and saves a picture of it.

A service and its worker run under traffic for some minutes, with faults, scraped by a Prometheus;
then Chromium opens the page beside this file. Run it by ``just dashboard-preview``, which fetches
and builds what the page is made of.
"""

import argparse
import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlencode

from tests.observability.dashboards import FILE, dashboard
from tests.observability.scene import acting, scene

HERE = Path(__file__).parent
PICTURE = HERE / "build/dashboard.png"
SCRAPED = 5
"""Seconds between two scrapes; the deployed configuration has 15, and takes three times as long."""
MINUTES = 10.0
PAUSE = 20.0
"""Seconds between two faults."""
WIDTH, CELL = 1680, 38
"""Pixels: of the page, and of one unit of the dashboard's height."""
HEAD = 110
_OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--virtual-time-budget=30000",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw; the exit code is 1 when a panel has no data."""
    parser = argparse.ArgumentParser(prog="just dashboard-preview", description=__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=MINUTES, help=f"of traffic; default: {MINUTES:g}")
    add("--to", type=Path, default=PICTURE, help=f"default: {PICTURE.name} in its build")
    options = parser.parse_args(arguments)
    with scene(seconds=SCRAPED) as on:
        began = time.time()
        acting(on, pause=PAUSE, until=time.monotonic() + options.minutes * 60)
        with _page() as address:
            parameters = {
                "prometheus": on.prometheus.url,
                "scrape": SCRAPED,
                "from": round(began * 1000),
                "to": round(time.time() * 1000),
            }
            url = f"{address}/index.html?{urlencode(parameters)}"
            _chromium(f"--screenshot={options.to.resolve()}", url)
            counts = _counts(_chromium("--dump-dom", url))
    panels = {str(panel["id"]): panel["title"] for panel in dashboard()["panels"]}
    empty = [f"{panels[panel]}: {count}" for panel, count in counts.items() if not _drawn(count)]
    print(
        f"{options.to}: {len(counts)} panels, {len(empty)} of them without data", *empty, sep="\n"
    )
    return 1 if empty or not counts else 0


def _drawn(count: object) -> bool:
    return isinstance(count, int) and count > 0


def _counts(page: str) -> dict[str, object]:
    found = re.search(r'<pre id="counts"[^>]*>(.*?)</pre>', page, re.DOTALL)
    return json.loads(found[1]) if found and found[1] else {}


def _chromium(what: str, url: str) -> str:
    program = shutil.which("chromium") or shutil.which("google-chrome") or "chromium"
    bottom = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in dashboard()["panels"])
    size = f"--window-size={WIDTH},{HEAD + bottom * CELL}"
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [program, *_OPTIONS, f"--user-data-dir={profile}", size, what, url],
            capture_output=True,
            text=True,
            timeout=180,
            check=True,
        )
    return done.stdout


@contextmanager
def _page() -> Iterator[str]:
    class Handler(SimpleHTTPRequestHandler):
        def translate_path(self, path: str) -> str:
            is_dashboard = path.partition("?")[0] == "/dashboard.json"
            return str(FILE) if is_dashboard else super().translate_path(path)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its own name
            """Log nothing."""

    handler = functools.partial(Handler, directory=str(HERE))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


if __name__ == "__main__":
    sys.exit(main())
