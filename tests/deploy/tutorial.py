"""Runs the commands of docs/tutorial.md as they are written there, and prints their times.

They start in a folder that holds the wheel of this checkout alone. ``just tutorial`` takes the
other packages from an index; the test takes them from this environment.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import Target, circumstances, command, publish, table, target_table
from tests.deploy.distribution import ROOT
from tests.deploy.wheels import wheel_of_checkout
from tests.servers.ports import free_port

MAX_SECONDS = 180.0
MAX_COMMANDS = 12
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


def run(folder: Path, wheel: Path, **variables: str) -> list[Step]:
    """Run all commands in one shell, in a new folder with the wheel and the module, as a stranger.

    The service listens on a free port. Raises ``AssertionError`` if the shell ends early.
    """
    folder.mkdir()
    shutil.copy(wheel, folder)
    typed = commands()
    (folder / "greet.py").write_text(module(), encoding="utf-8")
    port = str(free_port())
    mark = f'printf "\\n{_MARK} %s at %s after %s\\n"'
    lines = [f"{mark} 0 $EPOCHREALTIME 0"]
    for number, line in enumerate(typed, 1):
        lines += [line.replace("localhost:3000", f"127.0.0.1:{port}")]
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


def targets(steps: Sequence[Step]) -> list[Target]:
    """Return the promises of the document, with the figures of these steps."""
    figures = {
        "seconds from pip install to the end of the service": (_seconds(steps), MAX_SECONDS),
        "commands": (len(steps), MAX_COMMANDS),
        "commands that fail": (sum(step.code > 0 for step in steps), 0),
    }
    return [
        Target(what=what, measured=measured, limit=limit, at_least=False)
        for what, (measured, limit) in figures.items()
    ]


def _seconds(steps: Sequence[Step]) -> float:
    return sum(step.seconds for step in steps)


def main() -> int:
    """Run the tutorial, publish its times with ``--record``, and return the exit code."""
    parser = argparse.ArgumentParser(prog="just tutorial", description=__doc__)
    parser.add_argument("--record", action="store_true", help="publish the times in RESULTS.md")
    record = parser.parse_args().record
    with tempfile.TemporaryDirectory() as folder:
        steps = run(Path(folder, "empty"), wheel_of_checkout(Path(folder)))
    for step in steps:
        if step.code:
            print(f"{step.command}: exit code {step.code}\n{step.output}")
    rows = [(f"`{step.command}`", f"{step.seconds:.1f}", str(step.code)) for step in steps]
    lines = [
        *circumstances(command("tutorial"), "Times depend on the index: pip has no cache"),
        "",
        *table(("command of docs/tutorial.md", "seconds", "exit code"), rows),
        "",
        *target_table(targets(steps)),
    ]
    works = all(target.met for target in targets(steps))
    return publish("tutorial.py", lines, targets(steps), check=True, record=record and works)


if __name__ == "__main__":
    sys.exit(main())
