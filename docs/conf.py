"""Builds the documentation site from the Markdown pages of the repository: ``just site``."""

from collections.abc import Iterator
from inspect import isclass, isroutine
from pathlib import Path

from docutils import nodes
from pygments.lexers.special import TextLexer
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

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

SECTIONS = {
    "domain.health": "Health checks",
    "domain.jobs": "Jobs",
    "domain.resilience": "Resilience",
    "domain.shutdown": "Stages of a shutdown",
    "settings": "Settings",
    "web": "Litestar",
}
"""Headings of the API reference, by the beginning of the module that a public name comes from."""
MODULES = {
    "viralfx.asgi": "Other frameworks",
    "viralfx.testing": "Tests",
    "viralfx.taskiq": "taskiq",
}
"""Headings of public modules beside the package itself."""


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
            options = "\n   :members:" if kind == "class" else ""
            yield f".. auto{kind}:: {name}{options}\n"
        yield "```\n"
    for module, heading in MODULES.items():
        yield f"## {heading}\n\n```{{eval-rst}}\n.. automodule:: {module}\n   :members:\n```\n"


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


def setup(app: Sphinx) -> None:
    """Register what the pages need beyond the extensions."""
    app.add_lexer("mermaid", TextLexer)  # the viewer of these diagrams would be 3 MB of script
    app.connect("source-read", _add_reference)
    app.connect("doctree-read", _link_folders)
