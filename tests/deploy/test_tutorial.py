"""The tutorial works as written, from its third command on; `just tutorial` runs all of it."""

import json
import re
import sys
from pathlib import Path

from tests.deploy import tutorial


def test_the_commands_of_the_tutorial_work(tmp_path: Path) -> None:
    """The answers are those that it shows, and the service ends with 0."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    typed = tutorial.commands()
    steps = tutorial.run(tmp_path, typed[tutorial.INSTALLS :])
    shown = re.search(r"```json\n(.*?)\n```", tutorial.text())
    assert shown

    assert len(typed) <= tutorial.MAX_COMMANDS
    assert [(step.command, step.code, step.output) for step in steps if step.code] == []
    outputs = {step.command.split("localhost:3000")[-1]: step.output for step in steps}
    assert outputs["/health/ready"] == shown[1]
    (job,) = json.loads(outputs["/api/v1/jobs?task=greet'"])["items"]
    assert (job["task"], job["state"]) == ("greet", "completed")
    (refused,) = [each for end, each in outputs.items() if '"payload": {}' in end]
    assert json.loads(refused)["status"] == 422
    phases = (tmp_path / "service.log").read_text(encoding="utf-8")
    assert "Process ends" in phases
