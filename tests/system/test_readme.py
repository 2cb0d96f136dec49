"""The README and the documents beside it stay true."""

import os
import re
import shlex
import subprocess

from tests.servers.waiting import wait_until
from tests.system.drills.procedures import masked
from tests.system.jobs import accept
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


def test_the_shown_lines_of_a_job_are_what_is_logged() -> None:
    """The example of a logger's level shows something, and just that."""
    shown = re.search(
        r"```bash\n(curl [^`]*/health/loggers/jobs)\n```\n```json\n(.*?)```.*?```json\n(.*?)```",
        README,
        re.DOTALL,
    )
    assert shown
    line, answer, lines = shown.groups()
    environment = {"MANAGEMENT_TOKEN": "planted", "TASK_MODULES": "docs.examples.greet"}
    with running(environment=environment) as service:
        service.wait_ready()
        typed = line.replace("localhost:3000", f"127.0.0.1:{service.port}")
        changed = subprocess.run(
            ["/bin/bash", "-c", typed],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        accept(service, "greet", {"name": "Ada"}, **{"X-Correlation-ID": "guest-2"})

        def logged() -> list[str]:
            found = [each for each in list(service.output) if '"context":"jobs"' in each]
            return found if len(found) >= lines.count("\n") else []

        found = wait_until(logged, what="the lines of the job")

    assert changed.stdout == answer.rstrip()
    assert masked("".join(found)) == masked(lines)


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
