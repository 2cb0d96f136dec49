"""The commands of the runbook and of the deployment's checklist, run against the service."""

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

from viralfx.adapters.postgres.errors import _BY_CLASS

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
BEGINNING = re.findall(r"^### (.+)$", RUNBOOK.split("\n## ")[0], re.MULTILINE)
DRILLS = "".join(path.read_text() for path in Path(__file__).parent.glob("test_drills*.py"))
TOKEN = {"Authorization": "Bearer planted"}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """Return a service in memory, with a token for everything."""
    environment = {"MANAGEMENT_TOKEN": "planted", "API_TOKEN": "planted"}
    with running(environment=environment) as service:
        yield service.wait_ready()


@pytest.mark.parametrize(("path", "text"), ASKED)
def test_a_filter_finds_what_it_is_for(service: Service, path: str, text: str) -> None:
    """The path exists, and the filter prints something but nulls, unless there is nothing now."""
    reply = service.get(path, headers=TOKEN)
    found: list[Any] = jq.compile(text).input_value(reply.json()).all()
    nothing_now = any(part in text for part in (".items[]", "select(.status ==", ".error.code"))

    assert reply.status == 200
    assert nothing_now or found not in ([], [None])
    if not nothing_now:
        for shown in found:
            assert not isinstance(shown, dict) or any(v is not None for v in shown.values())


def test_there_are_many_of_them() -> None:
    """The rule above looks at them all."""
    assert len(ASKED) >= 18
    assert len(SEARCHED) >= 9


@pytest.mark.parametrize("pattern", SEARCHED)
def test_a_search_is_for_metrics_that_exist(pattern: str) -> None:
    """By the beginning of their names."""
    names = [name for metric in described(wired()) for name in metric.series]

    for part in pattern.split("|"):
        (beginning,) = re.findall(r"^\^?(\w+)", part)
        assert [name for name in names if name.startswith(beginning)] != []


def test_the_emergencies_are_those_of_the_guide() -> None:
    """Its emergency procedures, and its troubleshooting."""
    assert len(EMERGENCIES) == len(set(EMERGENCIES)) == 9


@pytest.mark.parametrize("heading", EMERGENCIES)
def test_an_emergency_has_a_whole_procedure_and_a_drill(heading: str) -> None:
    """Symptom, diagnosis, remedy and end, each with what is printed; and a test that does it."""
    found = procedure(heading)

    assert tuple(found.parts) == PARTS
    for part in ("Symptom", "Diagnosis", "Over"):
        assert any(step.shown for step in found.steps(part)), part
    assert f'"{heading}"' in DRILLS


@pytest.mark.parametrize("heading", BEGINNING)
def test_what_is_said_before_the_alerts_has_a_drill(heading: str) -> None:
    """Of the commands that are for all of them, each shows what it prints."""
    assert all(step.shown for step in steps_of_beginning(heading))
    assert f'"{heading}"' in DRILLS


def test_each_output_that_is_shown_is_compared() -> None:
    """It follows its command, in a procedure that a drill goes through, and is not nothing.

    What prints nothing at first, and the lines that count only later, would pass for nothing.
    """
    shown = [output for _, output in FENCED.findall(RUNBOOK) if output]
    steps = [step for h in EMERGENCIES for part in PARTS for step in procedure(h).steps(part)]
    steps += [step for heading in BEGINNING for step in steps_of_beginning(heading)]

    assert "```" not in FENCED.sub("", RUNBOOK)
    assert sorted(shown) == sorted(step.shown for step in steps if step.shown is not None)
    assert [output for output in shown if not masked(output)] == []


def test_the_codes_of_the_database_are_known() -> None:
    """Those that the procedure explains are those that the check tells."""
    table = re.findall(r"^\| (`.+`) \|", procedure("ViralFXDatabaseDown").text, re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", " ".join(table)))

    assert len(named) >= 10
    assert named <= {trouble.code for _, trouble in _BY_CLASS} | {"schema_behind"}


@pytest.mark.parametrize(
    ("environment", "code", "said"),
    [
        ({"PORT": "planted"}, 2, "PORT: "),
        (
            {
                "DATABASE_URL": "postgresql://nobody@127.0.0.1:{nobody}/none",
                "PORT": "{port}",
                "DB_MAX_RECONNECT_ATTEMPTS": "1",
            },
            3,
            "Start-up failed DATABASE_URL: the database at 127.0.0.1:",
        ),
    ],
)
def test_the_log_says_why_a_process_starts_again_and_again(
    environment: dict[str, str], code: int, said: str, tmp_path: Path
) -> None:
    """Whether that is a line for programs or for people."""
    ports = {"nobody": free_port(), "port": free_port()}
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
def test_an_output_is_compared_but_for_what_varies(shown: str, printed: str, *, same: bool) -> None:
    """States and names are to be as they are shown; amounts and times are the load's."""
    assert (masked(shown) == masked(printed)) is same
