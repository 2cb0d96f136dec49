"""Runs the commands of docs/tutorial.md as they are written there, and prints their times.

``python -m tests.deploy.tutorial`` starts in an empty folder with the wheel of this checkout, so it
needs a package index.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.deploy.release import ROOT
from tests.deploy.wheels import wheel_of_checkout
from tests.servers.ports import free_port

MAX_SECONDS = 180.0
MAX_COMMANDS = 12
INSTALLS = 2
"""The first commands, which make the environment."""

_MARK = "-- command"
_TIMED = re.compile(rf"^{_MARK} (\d+) at ([\d.]+) after (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Step:
    """One command of the tutorial, as it ran."""

    command: str
    seconds: float
    output: str
    code: int


def text() -> str:
    """Return the tutorial."""
    return (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """Return its commands."""
    return "".join(re.findall(r"```bash\n(.*?)```", text(), re.DOTALL)).splitlines()


def module() -> str:
    """Return the module that it shows."""
    (shown,) = re.findall(r"```python\n(.*?)```", text(), re.DOTALL)
    return str(shown)


def run(folder: Path, typed: Sequence[str], **variables: str) -> list[Step]:
    """Save the module, and run commands in one shell in a folder, against a free port.

    Raises ``AssertionError`` if the shell ends early.
    """
    (folder / "greet.py").write_text(module(), encoding="utf-8")
    port = str(free_port())
    mark = f'printf "\\n{_MARK} %s at %s after %s\\n"'
    lines = [f"{mark} 0 $EPOCHREALTIME 0"]
    for number, command in enumerate(typed, 1):
        lines += [command.replace("localhost:3000", f"127.0.0.1:{port}")]
        lines += [f"{mark} {number} $EPOCHREALTIME $?"]
    clean = {"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8", **_indexes()}
    shell = subprocess.run(
        ["/bin/bash", "-c", "\n".join(lines)],
        cwd=folder,
        env={**clean, "PORT": port, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=2 * MAX_SECONDS,
        check=False,
    )
    parts = _TIMED.split(shell.stdout)
    moments, codes = [float(each) for each in parts[2::4]], [int(each) for each in parts[3::4]]
    outputs = [each.strip() for each in parts[4::4]]
    assert len(moments) == len(typed) + 1, shell.stdout
    return [
        Step(command, moments[number + 1] - moments[number], outputs[number], codes[number + 1])
        for number, command in enumerate(typed)
    ]


def _indexes() -> Mapping[str, str]:
    """Return what configures pip on this machine."""
    mine = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
    files = [Path.home() / ".config/pip/pip.conf", Path.home() / ".pip/pip.conf"]
    found = next((str(path) for path in files if path.exists()), None)
    return {"PIP_CONFIG_FILE": found, **mine} if found else mine


def main() -> int:
    """Run the tutorial as a stranger does; return the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = wheel_of_checkout(Path(folder))
        empty = Path(folder, "empty")
        empty.mkdir()
        steps = run(empty, commands(), PIP_FIND_LINKS=str(wheel.parent))
    for step in steps:
        print(f"{step.seconds:6.1f} s  {step.code}  {step.command}")
        if step.code:
            print(step.output)
    seconds = sum(step.seconds for step in steps)
    print(f"{seconds:6.1f} s  {len(steps)} commands, {sum(step.code > 0 for step in steps)} failed")
    return seconds > MAX_SECONDS or len(steps) > MAX_COMMANDS or any(s.code for s in steps)


if __name__ == "__main__":
    sys.exit(main())
