"""Formats figures as Markdown, and writes them to RESULTS.md, the source of the documents."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil

RESULTS = Path(__file__).with_name("RESULTS.md")
_LIBRARIES = ("viralfx", "litestar", "uvicorn", "uvloop", "httptools", "msgspec")
_HEADING = """# Results

Each section is written by the script that it names; run it again to renew it.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A figure with a lower or an upper limit."""

    what: str
    measured: float
    limit: float
    at_least: bool
    unit: str = ""
    remark: str = ""

    @property
    def met(self) -> bool:
        """Whether the figure is within the limit."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table; all columns but the first are figures."""
    rule = ["---", *("---:" for _ in header[1:])]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]


def target_table(targets: Iterable[Target]) -> list[str]:
    """Return the lines of a table of targets and whether they are met."""
    return table(
        ("target", "measured", "limit", "met", "remark"),
        (
            (
                target.what,
                f"{target.measured:.2f}{target.unit}",
                f"{'≥' if target.at_least else '≤'} {target.limit:g}{target.unit}",
                "yes" if target.met else "**no**",
                target.remark,
            )
            for target in targets
        ),
    )


def circumstances(*more: str) -> list[str]:
    """Return date, commit, machine and versions of a measurement."""
    memory = psutil.virtual_memory().total / 2**30
    load = os.getloadavg()[0]
    return [
        f"- Date: {datetime.now(UTC).date().isoformat()}, {_commit()}",
        f"- Machine: {os.cpu_count()} cores, {memory:.0f} GiB, load average {load:.1f} at the end",
        f"- Python {platform.python_version()}; "
        + ", ".join(f"{name} {version(name)}" for name in _LIBRARIES),
        *(f"- {line}" for line in more),
    ]


def _commit() -> str:
    """Return the commit of the checkout, and whether its code was changed after it."""
    git = ("git", "-C", str(RESULTS.parent))
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "diff", "--quiet", "HEAD", "--", "../src", "*.py"], check=False
        ).returncode
    except (OSError, subprocess.CalledProcessError):
        return "without a git checkout"
    return f"commit {head}" + (" with changes" if changed else "")


def command(recipe: str) -> str:
    """Return the command line of this run."""
    return f"Command: `{' '.join(['just', recipe, *sys.argv[1:]])}`"


def publish(
    script: str,
    lines: Iterable[str],
    targets: Iterable[Target],
    *,
    check: bool,
    record: bool = True,
) -> int:
    """Print a section and write it to the results; return the exit code.

    It is 1 if ``check`` is set and a target is missed. A trial run does not ``record`` its results.
    """
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    name = f"{script} on Python {python}"
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    section = "\n".join([begin, f"## `{script}`, Python {python}", "", *lines, end])
    print(section)
    if record:
        text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else _HEADING
        before, found, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{section}{after}" if found else f"{text.rstrip()}\n\n{section}\n"
        RESULTS.write_text(text, encoding="utf-8")
    missed = [target.what for target in targets if not target.met]
    for what in missed:
        print(f"missed: {what}", file=sys.stderr)
    return 1 if check and missed else 0
