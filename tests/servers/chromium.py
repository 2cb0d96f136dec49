"""A real browser whose requests, errors and reports a test sees."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright
from tests.servers.sockets import socket_folder
from tests.servers.supply import UnavailableError

_ARGUMENTS = [
    "--no-sandbox",
    # Names of other hosts are not resolved, so that a foreign request fails at once.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    # Each window would load two pages for its address bar, which is never seen, at a third of the
    # CPU time of a short test. Chromium reads this list in place of Playwright's.
    "--disable-features=PaintHolding,WebUIOmniboxAimPopup,WebUIOmniboxPopup",
]
_DEADLINE = 20_000
_REPORT = """
addEventListener("securitypolicyviolation", (event) => {
  console.error(`policy: ${event.violatedDirective} ${event.blockedURI}`);
});
"""


@dataclass
class Visit:
    """A page, with its requests and its problems."""

    page: Page
    requested: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Errors and warnings of the console, uncaught errors, and reports of the security policy."""

    def foreign(self, own: str) -> list[str]:
        """Return the requested addresses that do not begin with this one."""
        return [each for each in self.requested if not each.startswith((own, "data:"))]

    def on_request(self, request: Request) -> None:
        """Take down a request."""
        self.requested.append(request.url)

    def on_console(self, message: ConsoleMessage) -> None:
        """Take down a message."""
        if message.type in {"error", "warning"}:
            self.problems.append(message.text)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run Debian's Chromium. Raises ``UnavailableError`` where there is none on this machine.

    An event loop runs in this thread until the end, so no test of the same time may be async.
    """
    program = shutil.which("chromium")
    if program is None:
        raise UnavailableError("chromium is not on PATH; Debian's package chromium has it")
    expect.set_options(timeout=_DEADLINE)
    with sync_playwright() as playwright, socket_folder() as folder:
        # Chromium makes a socket in its folder for temporary files.
        environment: dict[str, str | float | bool] = {**os.environ, "TMPDIR": str(folder)}
        browser = playwright.chromium.launch(
            executable_path=program, args=_ARGUMENTS, env=environment
        )
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visiting(
    browser: Browser, *, colors: Literal["light", "dark"] = "light", width: int = 1280
) -> Iterator[Visit]:
    """Open an empty page in a profile of its own."""
    context = browser.new_context(
        color_scheme=colors, viewport={"width": width, "height": 800}, service_workers="block"
    )
    try:
        context.add_init_script(_REPORT)
        context.set_default_timeout(_DEADLINE)
        visit = Visit(context.new_page())
        context.on("request", visit.on_request)
        context.on("console", visit.on_console)
        visit.page.on("pageerror", lambda error: visit.problems.append(str(error)))
        yield visit
    finally:
        context.close()
