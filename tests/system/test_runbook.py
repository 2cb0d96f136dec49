"""The commands of the runbook and of the deployment checklist, run against the service."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jq
import pytest
from tests.observability.wired import described, wired
from tests.servers.ports import free_port
from tests.system.drills.procedures import (
    FENCED,
    PARTS,
    Console,
    masked,
    procedure,
    steps_of_beginning,
)
from tests.system.service import ROOT, Service, command, running

from viralfx.postgres import errors

RUNBOOK = (ROOT / "docs/runbook.md").read_text(encoding="utf-8")
DEPLOYMENT = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")
ASKED = sorted(
    set(
        re.findall(
            r"\$(?:INSTANCE|WORKER)(/[^\"\s$]*)\"? \| jq (?:-\w+ )?'([^']+)'", RUNBOOK + DEPLOYMENT
        )
    )
)
SEARCHED = re.findall(r"\$(?:INSTANCE|WORKER)/metrics \| grep (?:-E )?'([^']+)'", RUNBOOK)
EMERGENCIES = re.findall(r"\| \[(ViralFX\w+)\]\(#viralfx\w+\) \|\n", RUNBOOK.split("\n## ")[0])
BEGINNING = re.findall(r"^## (?!ViralFX)(.+)$", RUNBOOK, re.MULTILINE)
DRILLS = "".join(path.read_text() for path in Path(__file__).parent.glob("test_drills*.py"))
TOKEN = {"Authorization": "Bearer planted"}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """Return a service in memory with all tokens set."""
    environment = {"MANAGEMENT_TOKEN": "planted", "API_TOKEN": "planted"}
    with running(environment=environment) as service:
        yield service.wait_ready()


@pytest.mark.parametrize(("path", "text"), ASKED)
def test_a_filter_prints_values(service: Service, path: str, text: str) -> None:
    """The path exists, and the filter prints values other than null, if there are any."""
    reply = service.get(path, headers=TOKEN)
    found: list[Any] = jq.compile(text).input_value(reply.json()).all()
    nothing_now = any(part in text for part in (".items[]", "select(.status ==", ".error.code"))

    assert reply.status == 200
    assert nothing_now or found not in ([], [None])
    if not nothing_now:
        for shown in found:
            assert not isinstance(shown, dict) or any(v is not None for v in shown.values())


def test_the_documents_hold_many_filters() -> None:
    """The test above finds the filters of the documents at all."""
    assert len(ASKED) >= 18
    assert len(SEARCHED) >= 9


@pytest.mark.parametrize("pattern", SEARCHED)
def test_a_search_matches_existing_metrics(pattern: str) -> None:
    """Each search matches the beginning of a metric name."""
    names = [name for metric in described(wired()) for name in metric.series]

    for part in pattern.split("|"):
        (beginning,) = re.findall(r"^\^?(\w+)", part)
        assert [name for name in names if name.startswith(beginning)] != []


def test_the_emergencies_match_the_guide() -> None:
    """The emergency procedures of docs/operations.md, in the same order."""
    guide = (ROOT / "docs/operations.md").read_text()

    assert re.findall(r"\[(ViralFX\w+)\]\(runbook\.md#viralfx\w+\)", guide) == EMERGENCIES
    assert len(EMERGENCIES) == len(set(EMERGENCIES)) == 9


@pytest.mark.parametrize("heading", EMERGENCIES)
def test_an_emergency_has_a_whole_procedure_and_a_drill(heading: str) -> None:
    """Symptom, diagnosis, remedy and end, each with its output; and a test that runs it."""
    found = procedure(heading)

    assert tuple(found.parts) == PARTS
    for part in ("Symptom", "Diagnosis", "Over"):
        assert any(step.shown for step in found.steps(part)), part
    assert f'"{heading}"' in DRILLS


@pytest.mark.parametrize("heading", BEGINNING)
def test_commands_before_the_alerts_have_a_drill(heading: str) -> None:
    """Each command before the alerts shows its output."""
    assert all(step.shown for step in steps_of_beginning(heading))
    assert f'"{heading}"' in DRILLS


def test_each_shown_output_is_compared() -> None:
    """Each output follows its command, in a procedure with a drill, and is not empty.

    An empty output would match any command.
    """
    shown = [output for _, output in FENCED.findall(RUNBOOK) if output]
    steps = [step for h in EMERGENCIES for part in PARTS for step in procedure(h).steps(part)]
    steps += [step for heading in BEGINNING for step in steps_of_beginning(heading)]

    assert "```" not in FENCED.sub("", RUNBOOK)
    assert sorted(shown) == sorted(step.shown for step in steps if step.shown is not None)
    assert [output for output in shown if not masked(output)] == []


def test_the_codes_of_the_database_are_known() -> None:
    """The procedure explains exactly the codes of the check."""
    table = re.findall(r"^\| (`[^|]+`) \|", procedure("ViralFXDatabaseDown").text, re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", " ".join(table)))

    assert len(named) >= 10
    source = Path(errors.__file__).read_text(encoding="utf-8")
    codes = r'ErrorExplanation\(\s*"(\w+)"|^_?[A-Z_]+ = "([a-z_]+)"$'
    known = set(re.findall(codes, source, re.MULTILINE))
    assert named <= {code for pair in known for code in pair} | {"schema_behind"}


@pytest.mark.each_python
@pytest.mark.parametrize(
    ("environment", "code", "said"),
    [
        ({"PORT": "planted"}, 2, "PORT: "),
        (
            {
                "DATABASE_URL": "postgresql://unknown@127.0.0.1:{free}/none",
                "PORT": "{port}",
                "DB_MAX_RECONNECT_ATTEMPTS": "1",
            },
            3,
            "Start-up failed DATABASE_URL: the database at 127.0.0.1:",
        ),
    ],
)
def test_the_log_names_the_reason_of_restarts(
    environment: dict[str, str], code: int, said: str, tmp_path: Path
) -> None:
    """In both log formats, JSON and text."""
    ports = {"free": free_port(), "port": free_port()}
    filled = {name: value.format(**ports) for name, value in environment.items()}
    ended = command("serve", environment=filled)
    log = tmp_path / "log"
    log.write_text(ended.stdout + ended.stderr)
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f"#!/bin/sh\ncat {log}\n")
    kubectl.chmod(0o755)
    (line,) = re.findall(r"^kubectl logs .+$", procedure("ViralFXRestarting").text, re.MULTILINE)

    assert ended.returncode == code
    assert said in Console(tmp_path, {}).type(line)


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ('["fail","refused"]', '["fail","refused"]', True),
        ('["fail","refused"]', '["fail","timeout"]', False),
        ("viralfx_ready 0.0", "viralfx_ready 1.0", False),
        ("process_resident_memory_bytes 2.1e+08", "process_resident_memory_bytes 9.9e+07", True),
        ('{"waiting":12,"oldestDue":604.788}', '{"waiting":12,"oldestDue":611.2}', True),
        ('{"waiting":12,"oldestDue":604.788}', '{"waiting":11,"oldestDue":604.788}', False),
        ("      3 GET /orders 500", "     27 GET /orders 500", True),
        ("      3 GET /orders 500", "      3 GET /orders 200", False),
        ("2 of 2 in use, 2 others wait", "2 of 2 in use, 5 others wait", True),
        (" 23624 | idle", "    17 | idle", True),
        ("  355   372264715   89.8%  bytearray", " 9     1   2.5%  bytearray", True),
        ("  355   372264715   89.8%  bytearray", "  355   372264715   89.8%  dict", False),
        ("shown", "shown\nand more", False),
        ("t\nt", "t", True),
    ],
)
def test_varying_values_of_an_output_are_masked(shown: str, printed: str, *, same: bool) -> None:
    """States and names must match; amounts and times may differ."""
    assert (masked(shown) == masked(printed)) is same
