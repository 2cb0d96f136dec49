"""The walks of docs/architecture.md name files that exist, and its ports have one file name."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src/viralfx"
STEP = re.compile(r"^(\d+)\. (.+?)(?=^\d+\. |\Z)", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"`([\w/]+\.py)`")


PORTS = {
    "AuditStore": "audit",
    "CacheStore": "cache",
    "FleetStore": "fleet",
    "HealthCheck": "health",
    "JobLedger": "ledger",
    "JobNotifier": "notifier",
    "RetryPolicy": "retry",
    "ShutdownStage": "shutdown",
    "StateStore": "state",
}
"""Each port, and the name of its file in every adapter."""
PORT = re.compile(r"^\| \[`(\w+)[^|]*\|[^|]*\|(.*)\|$", re.MULTILINE)
ADAPTER = re.compile(r"\(\.\./src/viralfx/adapters/(\w+)/(\w+)\.py\)")


def walks(text: str) -> dict[str, list[tuple[int, str]]]:
    """Return the numbered steps below each heading "Walk: ..."."""
    sections = re.split(r"^## ", text, flags=re.MULTILINE)
    parts = (section.partition("\n") for section in sections if section.startswith("Walk: "))
    return {
        title.removeprefix("Walk: "): [(int(number), step) for number, step in STEP.findall(body)]
        for title, _, body in parts
    }


def problems(steps: list[tuple[int, str]]) -> list[str]:
    """Return each step that is out of order, names no file, or names a missing one."""
    found = [
        f"step {number} is not step {place}"
        for place, (number, _) in enumerate(steps, start=1)
        if number != place
    ]
    for number, step in steps:
        if not (files := FILE.findall(step)):
            found.append(f"step {number} names no file")
        found += [f"{name} does not exist" for name in files if not (PACKAGE / name).is_file()]
    return found


WALKS = walks((ROOT / "docs/architecture.md").read_text(encoding="utf-8"))


def matrix(text: str) -> dict[str, set[tuple[str, str]]]:
    """Return the adapter and the name of each file that the table of ports links to."""
    return {port: {*ADAPTER.findall(links)} for port, links in PORT.findall(text)}


def test_each_port_has_one_file_name_in_every_adapter() -> None:
    """The table has every such file, and no other."""
    folders = [path for path in (PACKAGE / "adapters").iterdir() if (path / "__init__.py").exists()]

    assert matrix((ROOT / "docs/architecture.md").read_text(encoding="utf-8")) == {
        port: {(path.name, name) for path in folders if (path / f"{name}.py").exists()}
        for port, name in PORTS.items()
    }


def test_a_probe_a_job_and_a_stop_are_walked() -> None:
    """Each of the three walks has several steps."""
    assert set(WALKS) == {"a probe", "a job", "a stop"}
    assert min(map(len, WALKS.values())) >= 5


@pytest.mark.parametrize("name", WALKS)
def test_the_files_of_a_walk_exist(name: str) -> None:
    """Each step names a file below src/viralfx, and the steps are numbered in order."""
    assert problems(WALKS[name]) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("1. `web/gate.py` answers.\n2. `web/gone.py` helps.\n", "web/gone.py does not exist"),
        ("1. The gate answers.\n", "step 1 names no file"),
        ("1. `web/gate.py` answers.\n3. `web/app.py` helps.\n", "step 3 is not step 2"),
    ],
)
def test_a_wrong_step_is_reported(text: str, problem: str) -> None:
    """A missing file, a step without a file, and a gap are each found."""
    (steps,) = walks(f"# Page\n\n## Walk: a test\n\n{text}").values()

    assert problems(steps) == [problem]
