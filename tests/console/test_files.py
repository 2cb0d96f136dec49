"""The files of the operations console: their size, their addresses, and what they must not use."""

import gzip
import re
from pathlib import Path

import pytest

STATIC = Path(__file__).parents[2] / "src/viralfx/web/console/static"
SERVED = {".html", ".css", ".js", ".svg"}
FILES = sorted(path for path in STATIC.rglob("*") if path.suffix in SERVED)
OWN = [path for path in FILES if path.parent == STATIC]
MAX_BYTES_ON_THE_WIRE = 50_000
MAX_BYTES_OF_OWN_FILES = 120_000
FORBIDDEN = re.compile(
    r"dangerouslySetInnerHTML|innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\("
    r"|new Function|style=|localStorage|sessionStorage|document\.cookie|@import|@font-face"
)


def test_the_page_is_small() -> None:
    """All files together take half of the budget of 100 KB."""
    assert len(FILES) > 10
    assert sum(len(gzip.compress(path.read_bytes())) for path in FILES) <= MAX_BYTES_ON_THE_WIRE
    assert sum(path.stat().st_size for path in OWN) <= MAX_BYTES_OF_OWN_FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_names_no_other_host(path: Path) -> None:
    """The namespace of SVG is a name and no address."""
    text = path.read_text(encoding="utf-8").replace("http://www.w3.org/", "")

    assert re.findall(r"https?://", text) == []


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_a_file_makes_no_markup_of_text(path: Path) -> None:
    """Text of any origin becomes a text node, and nothing is stored in the browser."""
    assert FORBIDDEN.findall(path.read_text(encoding="utf-8")) == []


def _imported(path: Path) -> set[str]:
    """Return the modules that a module needs before it runs."""
    names = re.findall(r'from "([^"]+)"', path.read_text(encoding="utf-8"))
    for name in names:
        assert (path.parent / name).is_file(), f"{path.name}: {name}"
    return {(path.parent / name).resolve().relative_to(STATIC).as_posix() for name in names}


def test_addresses_are_relative_and_lead_to_files() -> None:
    """The page works under any path of the endpoints, and loads the first view at once.

    The modules of the other views are loaded after it; each view names its module.
    """
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    named = re.findall(r'(?:href|src)="(ui/[^"]+)"', page)
    later = set(re.findall(r'"(\w+\.js)"', (STATIC / "app.js").read_text(encoding="utf-8")))
    modules = {path.relative_to(STATIC).as_posix() for path in FILES if path.suffix == ".js"}
    first, found = set[str](), {"start.js", "app.js"}
    while found != first:
        first = set(found)
        found |= {name for module in first for name in _imported(STATIC / module)}

    assert {name.removeprefix("ui/") for name in named} == first | {"console.css", "icon.svg"}
    assert first | later == modules
    assert "<script>" not in page
    for module in later:
        assert _imported(STATIC / module) <= first


def test_the_first_module_needs_no_other() -> None:
    """It reports the failure of any other module, so it must run without them."""
    assert _imported(STATIC / "start.js") == set()
