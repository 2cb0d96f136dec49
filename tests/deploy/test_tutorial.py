"""The tutorial works word for word, from a folder with the wheel alone and a clean environment."""

import json
import re
import sys
from pathlib import Path

import pytest
from tests.deploy import tutorial
from tests.deploy.wheels import interpreters, wheel_of_checkout, wheelhouse

pytestmark = pytest.mark.timeout(300)


def test_the_commands_of_the_tutorial_work(tmp_path: Path) -> None:
    """The answers are those that it shows, and the service ends with 0.

    No index is asked: pip takes the packages that are installed here.
    """
    version = ".".join(map(str, sys.version_info[:2]))
    found = dict(interpreters()).get(version)
    if found is None or not found.with_name("python3").exists():
        pytest.skip(f"Python {version} has no ensurepip, or no program python3")
    packages = wheelhouse(tmp_path / "packages", ["serve"])
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(packages)}
    steps = tutorial.run(
        tmp_path / "empty",
        wheel_of_checkout(tmp_path),
        PATH=f"{found.parent}:/usr/bin:/bin",
        **offline,
    )
    shown = re.search(r"```json\n(.*?)\n```", tutorial.text())
    assert shown

    assert [step.command for step in steps] == tutorial.commands()
    assert len(steps) <= tutorial.MAX_COMMANDS
    assert [(step.command, step.code, step.output) for step in steps if step.code] == []
    outputs = {step.command.split("localhost:3000")[-1]: step.output for step in steps}
    assert outputs["/health/ready"] == shown[1]
    (job,) = json.loads(outputs["/api/v1/jobs?task=greet'"])["items"]
    assert (job["task"], job["state"]) == ("greet", "completed")
    (refused,) = [each for end, each in outputs.items() if '"payload": {}' in end]
    assert json.loads(refused)["status"] == 422
    phases = (tmp_path / "empty/service.log").read_text(encoding="utf-8")
    assert "Process ends" in phases
