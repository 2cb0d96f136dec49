"""Each document, message and unit says where the package comes from, by one variable."""

import re
from pathlib import Path

import pytest
from tests.deploy.distribution import ROOT
from tests.deploy.source import VARIABLE, by_name, documents, renewed, source, sources_of

from viralfx.core.extras import SOURCE

NAME = "viralfx"


def text_of(path: Path) -> str:
    """Return a document."""
    return path.read_text(encoding="utf-8", errors="replace")


def test_each_document_has_the_source_of_the_code() -> None:
    """`just source` renews them after a change of the one line, or of the version."""
    found = {path.relative_to(ROOT).as_posix(): sources_of(text_of(path)) for path in documents()}

    assert {each for sources in found.values() for each in sources} == {source()}
    assert {name for name, sources in found.items() if sources} == {
        "README.md",
        "docs/deployment.md",
        "docs/installation.md",
        "docs/tutorial.md",
    }


def test_a_document_that_installs_says_from_where() -> None:
    """A command with the variable follows its value, or a link to the page that has it."""
    for path in documents():
        text = text_of(path)
        if f"${VARIABLE}" in text or f"${{{VARIABLE}}}" in text:
            assert sources_of(text) or "installation.md" in text, path


@pytest.mark.skipif(SOURCE == NAME, reason="an index has the package")
def test_no_command_installs_the_package_by_its_name() -> None:
    """No index has it, so another owner of the name could run code in its place."""
    commands = {
        path.relative_to(ROOT).as_posix(): found
        for path in documents()
        if (found := by_name(text_of(path)))
    }

    assert commands == {}


def test_each_unit_says_where_its_package_comes_from() -> None:
    """In a comment, because a unit installs nothing."""
    units = [text_of(path) for path in (ROOT / "deploy/systemd").glob("*.service")]

    assert len(units) == 3
    assert [
        unit for unit in units if f"that {VARIABLE} names: docs/installation.md." not in unit
    ] == []


@pytest.mark.parametrize(
    "command",
    [
        "pip install 'viralfx[serve]'",
        "python -m venv /opt/viralfx && /opt/viralfx/bin/pip install 'viralfx[all]'",
        "`pip install viralfx`",
        "uv pip install --python .venv/bin/python viralfx",
        "pip --python .venv/bin/python install 'viralfx[serve]'",
    ],
)
def test_a_command_by_name_is_found(command: str) -> None:
    """In each form that a document has."""
    assert by_name(command)


@pytest.mark.parametrize(
    "command",
    [
        '/opt/viralfx/bin/pip install "${VIRALFX}[all]"',
        "pip install './viralfx-0.2.0-py3-none-any.whl[serve]'",
        "install -D -m 0640 -g viralfx /dev/null /etc/viralfx/viralfx.env",
        "install deploy/systemd/rolling-restart /usr/local/sbin/",
    ],
)
def test_other_commands_pass(command: str) -> None:
    """A path of a wheel, and programs of the system."""
    assert by_name(command) == []


def test_the_source_is_renewed_in_each_form() -> None:
    """A variable of a shell, an exported one, and an argument of a Dockerfile."""
    old = "VIRALFX=old\nexport VIRALFX=old\nARG VIRALFX=old\nother VIRALFX=old\n"
    new = re.sub(r"^((?:export |ARG )?VIRALFX=)old$", rf"\g<1>{source()}", old, flags=re.MULTILINE)

    assert renewed(old) == new
    assert new.count(source()) == 3
