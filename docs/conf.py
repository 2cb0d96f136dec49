"""Builds the documentation site from the Markdown pages of the repository: ``just site``."""

import gc
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from inspect import isclass, isroutine
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref, toctree
from sphinx.application import Sphinx
from sphinx.search.en import SearchEnglish

import viralfx

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "https://github.com/viralfx/viralfx-backend/"

project = "ViralFX Backend"
html_title = project
language = "en"
extensions = ["myst_parser", "sphinx_external_toc", "sphinx.ext.autodoc"]
external_toc_path = "docs/toc.yml"
include_patterns = ["*.md", "adr/*.md", "benchmarks/*.md", "docs/*.md", "tests/*.md"]
exclude_patterns = [".*", "build", "dist", "src", "node_modules", "tests/[!R]*"]
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
html_theme = "furo"
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "",
}

# Tests look for the files that these links name; the repository has them once a change is there.
linkcheck_ignore = [REPOSITORY]
linkcheck_timeout = 20

# Collections take a fifth of the time of a build; without them it needs 200 MB more.
gc.disable()

SECTIONS = {
    "checks": "Checks to use in an application",
    "domain.health": "Health checks",
    "jobs": "Jobs",
    "resilience": "Resilience",
    "domain.shutdown": "Stages of a shutdown",
    "settings": "Settings",
    "web": "Litestar",
}
"""Headings of the API reference, by the beginning of the module that a public name comes from."""
MODULES = {
    "viralfx.asgi": "Other frameworks",
    "viralfx.checks": "The module of the checks",
    "viralfx.testing": "Tests",
    "viralfx.taskiq": "taskiq",
}
"""Headings of public modules beside the package itself."""
SPECIAL = ("__aenter__", "__aexit__", "__call__")
"""Methods that belong to a form of use."""


def _members(*classes: type) -> str:
    """Return the options for every public member, also one that a base of this package gives."""
    bases = {base for each in classes for base in each.__mro__}
    foreign = {base.__name__ for base in bases if base.__module__.split(".")[0] != "viralfx"}
    excluded = ", ".join(sorted(foreign))
    return (
        "\n   :members:\n   :undoc-members:"
        f"\n   :inherited-members: {excluded}\n   :special-members: {', '.join(SPECIAL)}"
    )


def _reference() -> Iterator[str]:
    """Yield the API reference in Markdown: every public name below the heading of its section."""
    found: dict[str, list[str]] = {heading: [] for heading in SECTIONS.values()}
    for name in viralfx.__all__:
        home = viralfx._HOME_OF.get(name, "")  # noqa: SLF001 - the module shows its own names
        heading = next((h for start, h in SECTIONS.items() if home.startswith(start)), "Other")
        found.setdefault(heading, []).append(name)
    for heading, names in found.items():
        yield f"## {heading}\n"
        yield "```{eval-rst}\n.. currentmodule:: viralfx\n"
        for name in names:
            value = getattr(viralfx, name)
            kind = "class" if isclass(value) else "function" if isroutine(value) else "data"
            yield f".. auto{kind}:: {name}{_members(value) if isclass(value) else ''}\n"
        yield "```\n"
    for name, heading in MODULES.items():
        module = import_module(name)
        options = _members(*filter(isclass, (getattr(module, one) for one in module.__all__)))
        yield f"## {heading}\n\n```{{eval-rst}}\n.. automodule:: {name}{options}\n```\n"


def _add_reference(_app: Sphinx, page: str, source: list[str]) -> None:
    if page == "docs/api":
        source[0] += "\n" + "\n".join(_reference())


def _link_folders(app: Sphinx, document: nodes.document) -> None:
    """Lead links to a folder, which is no page of the site, to the repository."""
    page = ROOT / app.env.docname
    for link in list(document.findall(pending_xref)):
        folder = (page.parent / link["reftarget"]).resolve()
        if folder.is_dir() and folder.is_relative_to(ROOT):
            address = f"{REPOSITORY}tree/main/{folder.relative_to(ROOT).as_posix()}"
            link.replace_self(nodes.reference("", "", *link.children, refuri=address))


@cache
def _titles(app: Sphinx) -> dict[str, nodes.bullet_list]:
    """Return the contents of each page without its sections: its title and the pages below it."""
    found = {}
    for page, contents in app.env.tocs.items():
        found[page] = kept = contents.deepcopy()
        for entry in kept.children:
            if isinstance(entry, nodes.list_item) and len(entry) > 1:
                below = list(entry.findall(toctree))
                entry[1:] = [nodes.bullet_list("", *below)] if below else []
    return found


def _navigate_by_titles(
    app: Sphinx, _page: str, _template: str, context: dict[str, Any], _document: object
) -> None:
    """Make the navigation of a page from titles alone.

    It shows no sections, but Sphinx would copy those of all pages for each page.
    """
    make: Callable[..., str] = context["toctree"]

    def navigation(**options: bool | int) -> str:
        if not options.get("titles_only"):
            return make(**options)
        whole, app.env.tocs = app.env.tocs, _titles(app)
        try:
            return make(**options)
        finally:
            app.env.tocs = whole

    context["toctree"] = navigation


class English(SearchEnglish):
    """Stems each word once for all pages."""

    def __init__(self, options: dict[str, str]) -> None:
        """Make the stemmer of the search."""
        super().__init__(options)
        self._stems: dict[str, str] = {}

    def stem(self, word: str) -> str:
        """Return the beginning that a word and its forms share."""
        if word not in self._stems:
            self._stems[word] = super().stem(word)
        return self._stems[word]


def setup(app: Sphinx) -> None:
    """Register the parts that the pages need beyond the extensions."""
    app.connect("source-read", _add_reference)
    app.connect("doctree-read", _link_folders)
    app.connect("html-page-context", _navigate_by_titles, priority=400)  # before the theme
    app.add_search_language(English)
