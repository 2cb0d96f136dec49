"""The documentation site is complete, and works from a disk without a network."""

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from playwright.sync_api import Browser, expect
from tests.architecture.public_api import DESCRIPTION
from tests.servers.chromium import visiting
from tests.soak import SOAK, Record

import viralfx

ROOT = Path(__file__).parents[2]
LOADED = re.compile(
    r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=\"((?:https?:)?//[^\"]*)"
)
pytestmark = pytest.mark.timeout(300)  # the build reads a hundred pages
IN_STYLES = re.compile(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^)\"';]*)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site as ``just site`` does: a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    command += ["-c", "docs", "-d", str(folder / "doctrees"), ".", str(folder / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (built.returncode, built.stderr) == (0, "")
    return folder / "site"


@pytest.fixture
def served(site: Path) -> Iterator[str]:
    """Return the address of a plain file server for the site."""

    class Quiet(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            """Send a file; the icon that browsers ask for is none of the site's."""
            if self.path == "/favicon.ico":
                self.send_response(HTTPStatus.NO_CONTENT)
                self.end_headers()
            else:
                super().do_GET()

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_the_search_works_from_a_disk(browser: Browser, site: Path) -> None:
    """A browser refuses the excerpts of files, and the results are shown without them."""
    with visiting(browser) as visit:
        visit.page.goto(f"{site.as_uri()}/search.html?q=fencing+token")
        results = visit.page.locator("#search-results")
        expect(results.get_by_role("link", name="Glossary", exact=True)).to_be_visible()

    assert visit.foreign(site.as_uri()) == []


@pytest.mark.soak
def test_pages_load_nothing_from_elsewhere(
    browser: Browser, site: Path, record_property: Record
) -> None:
    """They are read from the disk, without an error, and with links; in a soak run all of them."""
    every = [path.relative_to(site).with_suffix("").as_posix() for path in site.rglob("*.html")]
    pages = every if SOAK else ["index", "docs/jobs", "docs/api", "genindex"]
    with visiting(browser) as visit:
        for page in pages:
            visit.page.goto(f"{site.as_uri()}/{page}.html")
            glossary = visit.page.get_by_role("link", name="Glossary", exact=True)
            expect(glossary.first).to_be_attached()

    record_property("pages of the site", len(pages))
    record_property("their requests", len(visit.requested))
    record_property("their requests to elsewhere", len(visit.foreign(site.as_uri())))
    assert visit.foreign(site.as_uri()) == []
    assert visit.problems == []


def test_no_page_names_a_file_from_elsewhere(site: Path) -> None:
    """The other pages have the same style, so a browser opens each in a soak run only."""
    pages, styles = list(site.rglob("*.html")), list(site.rglob("*.css"))
    found = {
        path.relative_to(site).as_posix(): named
        for pattern, paths in ((LOADED, pages), (IN_STYLES, styles))
        for path in paths
        if (named := pattern.findall(path.read_text(encoding="utf-8")))
    }

    assert len(pages) > 90
    assert found == {}


def test_the_search_finds_a_page(browser: Browser, served: str) -> None:
    """The index is a part of the site, and excerpts come from its pages."""
    with visiting(browser) as visit:
        visit.page.goto(f"{served}/docs/index.html")
        visit.page.get_by_role("textbox", name="Search").fill("fencing token")
        visit.page.keyboard.press("Enter")
        results = visit.page.locator("#search-results")
        expect(results.get_by_role("link", name="Glossary", exact=True)).to_be_visible()
        expect(results.get_by_text("A number that grows with each claim of a job")).to_be_visible()
        results.get_by_role("link", name="Glossary", exact=True).click()
        expect(visit.page).to_have_title(re.compile("^Glossary"))

    assert visit.foreign(served) == []
    assert visit.problems == []


def test_the_reference_has_every_public_name(site: Path) -> None:
    """Each name and each member has an entry; links from elsewhere find it by its name."""
    page = (site / "docs/api.html").read_text(encoding="utf-8")
    listed = set(re.findall(r'id="(viralfx\.[\w.]+)"', page))

    assert {f"viralfx.{name}" for name in viralfx.__all__} <= described()
    for_type_checkers = {"viralfx.testing.Jobs.__await__"}
    assert described() - listed == for_type_checkers


def described() -> set[str]:
    """Return the described names, those of members after the name of their class."""
    names, owner = set(), ""
    for line in DESCRIPTION.read_text(encoding="utf-8").splitlines():
        found = re.match(r"( *)(?:@\w+ |async |class )*([\w.]+)", line)
        assert found is not None
        indent, name = found.groups()
        owner = owner if indent else name
        names.add(f"{owner}.{name}" if indent else name)
    return names


def test_every_page_has_a_place(site: Path) -> None:
    """The contents name each document of the folder; the build fails for a page without a place."""
    contents = (site / "docs/index.html").read_text(encoding="utf-8")
    named = set(re.findall(r'class="reference internal" href="([\w-]+)\.html"', contents))

    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - named == {"index"}
