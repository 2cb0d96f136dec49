"""The commands and outputs of the README and the documents are those of the program."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from tests.servers.ports import free_port
from tests.servers.waiting import wait_until
from tests.system.drills.procedures import masked
from tests.system.jobs import accept, until
from tests.system.service import ROOT, Service, command, running

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))
WORDS = 900
PLUGIN = re.compile(r"## Add it to your application\n(.*?)^## ", re.DOTALL | re.MULTILINE)
GUARDS = re.compile(r"## Retry and circuit breaker\n(.*?)^## ", re.DOTALL | re.MULTILINE)


def document(name: str) -> str:
    """Return the text of a document in docs."""
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def typed(line: str, service: Service, **variables: str) -> str:
    """Run a shown command line against a service, and return its output."""
    result = subprocess.run(
        ["/bin/bash", "-c", line.replace("localhost:3000", f"127.0.0.1:{service.port}")],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return result.stdout


def test_the_readme_is_short() -> None:
    """It has at most 900 words, with its code."""
    assert len(README.split()) <= WORDS


def test_the_readme_shows_one_command_that_serves_and_one_that_tests() -> None:
    """The first one starts a service that becomes ready, and readiness answers as shown."""
    serve = re.search(r"^\.ci/venv && (.venv/bin/viralfx serve)$", README, re.MULTILINE)
    test = re.search(r"^\.ci/venv --dev && \.ci/test$", README, re.MULTILINE)
    ready = re.search(r"```bash\n(curl [^\n]*/health/ready)\n```\n```json\n(.*?)\n```", README)

    assert serve
    assert test
    assert ready
    with running() as service:
        service.wait_ready()
        assert typed(ready[1], service) == ready[2]


@pytest.mark.parametrize("failing", ["", "once pure", "run processes", "run image"])
def test_the_test_command_runs_each_part_and_fails_with_it(tmp_path: Path, failing: str) -> None:
    """The pure tests first, and those of the image last."""
    program = tmp_path / "bin/python"
    program.parent.mkdir()
    fails = f'[ -n "{failing}" ] && case "$*" in *"{failing}"*) exit 1;; esac'
    program.write_text(f'#!/bin/sh\necho "$*"\n{fails}\nexit 0\n', encoding="utf-8")
    program.chmod(0o755)
    result = subprocess.run(
        [ROOT / ".ci/test"],
        env={**os.environ, "VENV": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )

    assert result.returncode == bool(failing), result.stderr
    distribution = (
        f"deploy/test_{each}.py" for each in ("extras", "release", "source", "tutorial")
    )
    ignored = ("unit", "simulation", "architecture", "browser/test_site.py", *distribution)
    others = " ".join(f"--ignore=tests/{each}" for each in ignored)
    assert result.stdout.splitlines() == [
        f"-m tests.gate once pure -n {len(os.sched_getaffinity(0))} tests/unit tests/simulation",
        f"-m tests.gate run processes -n 8 -m not image {others}",
        "-m tests.gate run image -n 2 -m image tests/deploy",
    ]


def test_every_command_of_the_readme_is_tested() -> None:
    """Each bash block is one that a test runs: the installation is that of the tutorial."""
    known = (
        r"VIRALFX=\S+\npip install \"\${VIRALFX}\[serve\]\"",
        r"\.ci/venv && \.venv/bin/viralfx serve",
        r"\.ci/venv --dev && .+",
        r"curl -s localhost:3000/health/ready",
        r"TASK_MODULES=greet \.venv/bin/viralfx serve",
        r"curl -s localhost:3000/api/v1/jobs -H .+",
    )
    commands = [block.strip() for block in blocks(README, "bash")]

    assert len(commands) == len(known)
    assert [
        one for one in commands if not any(re.fullmatch(each, one, re.DOTALL) for each in known)
    ] == []


@pytest.mark.each_python
def test_the_plugin_of_the_readme_runs(tmp_path: Path) -> None:
    """The snippets together are an application whose own check passes."""
    section = PLUGIN.search(README)
    assert section
    snippets = blocks(section[1], "python")
    (tmp_path / "shown.py").write_text("\n".join(snippets), encoding="utf-8")
    environment = {"PYTHONPATH": str(tmp_path)}

    assert len(snippets) == 2
    with running("--app", "shown:app", environment=environment) as service:
        response = service.wait_ready().get("/health/orders").json()

    assert (response["status"], response["message"]) == ("pass", "No orders are waiting")


def test_the_guards_of_the_readme_can_be_made() -> None:
    """The snippet of retry and circuit breaker decorates its function."""
    section = GUARDS.search(README)
    assert section
    (snippet,) = blocks(section[1], "python")
    names: dict[str, object] = {}
    exec(snippet, names)  # noqa: S102 - our own text

    assert callable(names["fetch_user"])


def test_the_first_job_is_accepted_as_shown(tmp_path: Path) -> None:
    """README and docs/jobs.md show the task, the command, the form of its answer and the result."""
    guide = document("jobs.md")
    sent = r"```bash\n(curl [^`]*?/api/v1/jobs .*?)```\n```json\n(.*?)```"
    shown = [re.search(sent, text, re.DOTALL) for text in (README, guide)]
    tasks = re.search(r"## Jobs\n.*?```python\n(.*?)```", README, re.DOTALL)
    result = re.search(
        r"```bash\n(curl [^\n]*/api/v1/jobs/)[^ ]+( \| jq [^\n]*)\n```\n```json\n(.*?)```",
        guide,
        re.DOTALL,
    )
    batch = re.search(r"```bash\n(curl [^`]*?/api/v1/jobs/batch .*?)```", guide, re.DOTALL)
    example = (ROOT / "docs/examples/greet.py").read_text(encoding="utf-8")
    assert tasks
    assert result
    assert batch
    assert blocks(guide, "python")[0].strip() in example
    (tmp_path / "greet.py").write_text(tasks[1], encoding="utf-8")
    job: dict[str, object] = {}
    accepted: dict[str, list[dict[str, str]]] = {}
    for folder, each in zip((tmp_path, ROOT / "docs/examples"), shown, strict=True):
        assert each
        environment = {"TASK_MODULES": "greet", "PYTHONPATH": str(folder)}
        with running(environment=environment) as service:
            service.wait_ready()
            printed = typed(each[1], service)
            (job_id,) = set(re.findall(r'"id":"([^"]+)"', printed))
            job = until(service, job_id, "completed")
            accepted = json.loads(typed(batch[1], service))
        (id_shown,) = set(re.findall(r'"id":"([^"]+)"', each[2]))
        assert printed.replace(job_id, id_shown) == each[2].rstrip()

    for name in ("state", "attempts", "result"):
        value = job[name] if isinstance(job[name], int) else f'"{job[name]}"'
        assert f'"{name}": {value}' in result[3]
    assert [each["queue"] for each in accepted["jobs"]] == ["notifications"] * 2


def test_the_shown_error_is_printed() -> None:
    """An invalid configuration prints the lines that docs/cli.md shows."""
    shown = re.search(
        r"```bash\n(PORT=abc [^\n]*)\n```\n```\n(.*?)```", document("cli.md"), re.DOTALL
    )
    assert shown
    line, output = shown.groups()
    words = shlex.split(line)
    variables = dict(word.split("=", 1) for word in words if "=" in word)
    result = command("serve", environment=variables)

    assert (2, output) == (result.returncode, result.stderr)


def test_the_shown_refusals_of_a_start_are_printed() -> None:
    """docs/deployment.md shows the messages for production and for a short grace period."""
    text = document("deployment.md")
    for variables in ({"ENVIRONMENT": "production"}, {"SHUTDOWN_GRACE_PERIOD": "60000"}):
        result = command("serve", environment=variables)

        assert result.returncode == 2
        assert f"```\n{result.stderr}```\n" in text


def test_the_shown_findings_of_the_doctor_are_printed() -> None:
    """Each finding of docs/doctor.md is one of a run in memory, except for numbers."""

    def findings(printed: str) -> list[str]:
        rows = re.split(r"\n(?=\S)", printed.strip())
        return [re.sub(r"\d+", "N", " ".join(row.split())) for row in rows if row != "..."]

    (shown,) = re.findall(r"```\n(status .*?)```", document("doctor.md"), re.DOTALL)
    result = command("doctor", environment={"PORT": str(free_port())})

    assert result.returncode == 0
    assert [row for row in findings(shown) if row not in findings(result.stdout)] == []


def test_the_shown_lines_of_a_job_are_logged() -> None:
    """After the level change of docs/logging.md a job logs exactly the lines shown there."""
    shown = re.search(
        r"```bash\n(curl [^`]*/health/loggers/jobs)\n```\n```json\n(.*?)```.*?```json\n(.*?)```",
        document("logging.md"),
        re.DOTALL,
    )
    assert shown
    line, response, lines = shown.groups()
    environment = {"MANAGEMENT_TOKEN": "planted", "TASK_MODULES": "docs.examples.greet"}
    with running(environment=environment) as service:
        service.wait_ready()
        changed = typed(line, service, **environment)
        accept(service, "greet", {"name": "Ada"}, **{"X-Correlation-ID": "guest-2"})

        def logged() -> list[str]:
            found = [each for each in list(service.output) if '"context":"jobs"' in each]
            return found if len(found) >= lines.count("\n") else []

        found = wait_until(logged, what="the lines of the job")

    assert changed == response.rstrip()
    assert masked("".join(found)) == masked(lines)


def test_the_shutdown_endpoint_answers_as_shown() -> None:
    """The command of docs/endpoints.md begins the shutdown, and the answer has the shown form."""
    shown = re.search(
        r"```bash\n(curl [^`]*/health/shutdown)\n```\n```json\n(.*?)```",
        document("endpoints.md"),
        re.DOTALL,
    )
    assert shown
    environment = {"MANAGEMENT_TOKEN": "planted"}
    with running(environment=environment) as service:
        service.wait_ready()
        response = typed(shown[1], service, **environment)
        assert service.exit_code() == 0

    assert masked(response) == masked(shown[2])


def test_the_configuration_document_is_printed_by_the_program() -> None:
    """docs/configuration.md holds the table of ``viralfx env --markdown``."""
    table = command("env", "--markdown").stdout

    assert document("configuration.md").endswith(f"\n\n{table}")


@pytest.mark.parametrize("path", [ROOT / "README.md", *DOCUMENTS], ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    """Every relative link of the README and the documents names an existing file."""
    links = re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8"))

    assert links or path.name != "README.md"
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_opens_with_its_use(path: Path) -> None:
    """The first sentence says what the reader can do with the document."""
    text = re.sub(r"\A# .+\n\n", "", path.read_text(encoding="utf-8"))

    assert re.match(r"(Read|Use) this page (to|when) ", text)
