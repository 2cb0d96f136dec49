"""The README and the documents beside it stay true."""

import re
import shlex

from tests.system.service import ROOT, command, running

README = (ROOT / "README.md").read_text()


def test_the_two_commands_are_there() -> None:
    """A newcomer finds one command that serves and one that tests, and they do what they say."""
    serve = re.search(r"^\.ci/venv && (.venv/bin/viralfx serve)$", README, re.MULTILINE)
    parallel, alone = "\\.venv/bin/pytest -n 4 -m .not alone.", "\\.venv/bin/pytest -m alone"
    test = re.search(rf"^\.ci/venv --dev && {parallel} && {alone}$", README, re.MULTILINE)

    assert serve
    assert test
    with running() as service:
        assert service.wait_ready().get("/health/ready").json()["ready"] is True


def test_the_shown_error_is_what_is_printed() -> None:
    """The example of a wrong configuration prints exactly what the README shows."""
    shown = re.search(r"```bash\n(PORT=abc [^\n]*)\n```\n```\n(.*?)```", README, re.DOTALL)
    assert shown
    line, output = shown.groups()
    words = shlex.split(line)
    variables = dict(word.split("=", 1) for word in words if "=" in word)
    result = command("serve", environment=variables)

    assert (2, output) == (result.returncode, result.stderr)


def test_the_configuration_document_is_what_the_program_prints() -> None:
    """docs/configuration.md holds the table of ``viralfx env --markdown``."""
    document = (ROOT / "docs/configuration.md").read_text()
    table = command("env", "--markdown").stdout

    assert document.endswith(f"\n\n{table}")


def test_links_lead_somewhere() -> None:
    """Every relative link of the README and the documents names an existing file."""
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        links = re.findall(r"\]\(([^)#:]+)\)", document.read_text())

        assert links or document.name != "README.md"
        assert [link for link in links if not (document.parent / link).exists()] == []
