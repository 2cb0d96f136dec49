"""The procedures of docs/runbook.md, parsed and carried out as written."""

import difflib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tests.servers.waiting import wait_until
from tests.system.service import ROOT

RUNBOOK = ROOT / "docs/runbook.md"
PARTS = ("Symptom", "Diagnosis", "Remedy", "Over")
"""The parts of an emergency procedure, in order."""

_PART = re.compile(r"^\*\*(\w+):\*\*", re.MULTILINE)
FENCED = re.compile(r"^```bash\n(.*?)^```\n(?:```(?:\w*)\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
"""A command, followed by its output if the document shows it."""

# Values that vary, are counted or measured; all other text must match the document.
_MEASURED = (
    "responseTime|duration|cpuUsage|rss|heapUsed|heapTotal|external|usagePercent|totalRequests"
    "|successfulRequests|failedRequests|failedAttempts|failedConnections|slowQueries|oldestDue"
)
_GROWING = (
    "process_|db_client|http_|viralfx_event_loop|viralfx_queue_oldest|viralfx_database_slow"
    "|viralfx_database_connection|viralfx_redis_(?:memory|requests|failed)"
)
_VARIES = tuple(
    (re.compile(pattern), instead)
    for pattern, instead in (
        (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[.\d]*Z?", "<time>"),
        (r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b|\b[0-9a-f]{32}\b", "<id>"),
        (r'(127\.0\.0\.1:|localhost:|port |"port":)\d+', r"\1<port>"),
        (rf'"({_MEASURED})": ?"?[-.\d]+(?:MB|%)?"?', r'"\1":<number>'),
        (rf"^((?:{_GROWING})\w*(?:{{.*}})?) \S+$", r"\1 <number>"),
        (r"\d+ (others )?wait\b", r"<number> \1wait"),
        (r"for [.\d]+ s\b", "for <number> s"),
        (r"\.py:\d+", ".py:<line>"),
        (r"^\[\d+(?:\.\d+)?,(?=3,0\])", "[<milliseconds>,"),
        (r"^ *\d+ +\d+ +[.\d]+%", "<objects>"),  # of a heap report
        (r"^ *\d+ +(?=[\w/])", "<count> "),  # of uniq -c
        (r"^ *\d+ \|", "<pid> |"),
        (r"-{2,}", "-"),
        (r" {2,}", " "),
    )
)


@dataclass(frozen=True)
class Step:
    """One fenced command of the document, which may have several lines."""

    where: str
    command: str
    shown: str | None
    """The output that the document shows; None if it shows none."""

    def with_words(self, words: Mapping[str, str]) -> "Step":
        """Return the step with words of its output replaced."""
        shown = self.shown
        for word, instead in words.items():
            shown = shown and shown.replace(word, instead)
        return replace(self, shown=shown)


@dataclass(frozen=True)
class Procedure:
    """One heading of the runbook."""

    heading: str
    text: str
    parts: Mapping[str, str]

    def steps(self, part: str) -> list[Step]:
        """Return the commands of one part."""
        return _steps(f"{self.heading}, {part}", self.parts[part])

    def alerts(self) -> set[str]:
        """Return the alerts that the symptom names."""
        return set(re.findall(r"`(ViralFX\w+)`", self.parts["Symptom"])) | {self.heading}


def procedure(heading: str) -> Procedure:
    """Return the procedure below a heading of the runbook."""
    text = RUNBOOK.read_text(encoding="utf-8")
    sections = {part.split("\n", 1)[0]: part for part in text.split("\n## ")[1:]}
    _, *rest = _PART.split(sections[heading])
    return Procedure(heading, sections[heading], dict(zip(rest[::2], rest[1::2], strict=True)))


def steps_of_beginning(heading: str) -> list[Step]:
    """Return the commands under a heading before those of the alerts."""
    parts = re.split(r"\n##+ ", RUNBOOK.read_text(encoding="utf-8"))
    (text,) = [part for part in parts if part.startswith(f"{heading}\n")]
    return _steps(heading, text)


def _steps(where: str, text: str) -> list[Step]:
    found = FENCED.findall(text)
    return [Step(where, command.strip(), shown or None) for command, shown in found]


class Console:
    """The shell of the person on call, which runs the commands of the document.

    ``folder`` comes first on PATH and gets the programs that this machine lacks.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, **environment}
        _provide(folder)

    def type(self, command: str) -> str:
        """Run a command; return its output and errors."""
        done = subprocess.run(
            ["/bin/bash", "-c", command],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,  # a restart of two pods, on a busy machine
            check=False,
        )
        return done.stdout

    def follow(self, steps: list[Step], *, seconds: float = 60.0) -> None:
        """Repeat each command in turn until it prints the output of the document.

        A command without output in the document runs once and must print no error.
        """
        for step in steps:
            if step.shown is None:
                printed = self.type(step.command)
                assert not re.search(r"(?i)\berror\b|not found|usage:", printed), (step, printed)
            else:
                self.expect(step, step.shown, seconds=seconds)

    def expect(self, step: Step, shown: str, *, seconds: float = 60.0) -> None:
        """Repeat a command until it prints ``shown``, apart from values that vary."""
        expected, seen = masked(shown), ""

        def matches() -> bool:
            nonlocal seen
            seen = self.type(step.command)
            return masked(seen) == expected

        try:
            wait_until(matches, seconds=seconds)
        except AssertionError:
            lines = difflib.unified_diff(
                expected, masked(seen), "the document", "printed", lineterm=""
            )
            difference = "\n".join(lines)
            raise AssertionError(
                f"{step.where}: {step.command}\n{difference}\nprinted:\n{seen}"
            ) from None


def masked(printed: str) -> list[str]:
    """Return the lines of an output with varying values masked and repeated lines merged.

    Amounts depend on the load of the drill.
    """
    lines: list[str] = []
    for line in printed.rstrip().splitlines():
        text = line.rstrip()
        for pattern, instead in _VARIES:
            text = pattern.sub(instead, text)
        if text not in lines[-1:]:
            lines.append(text)
    return lines


# -- programs that a machine may lack ------------------------------------------------------------

_JQ = """
import sys, jq, json
options = "".join(a.lstrip("-") for a in sys.argv[1:] if a.startswith("-"))
(text,) = [a for a in sys.argv[1:] if not a.startswith("-")] or ["."]
program, given = jq.compile(text), sys.stdin.read()
inputs = [json.dumps(l) for l in given.splitlines()] if "R" in options else [given]
for one in inputs:
    for value in program.input_text(one).all():
        if "r" in options and isinstance(value, str):
            print(value)
        else:
            compact = (",", ":") if "c" in options else None
            indent = None if "c" in options else 2
            print(json.dumps(value, separators=compact, indent=indent, ensure_ascii=False))
"""
_REDIS_CLI = """
import sys, redis
words, given = sys.argv[1:], {"-h": "127.0.0.1", "-p": "6379", "-a": None}
while words and words[0] in given:
    given[words[0]], words = words[1], words[2:]
host, port = given["-h"], int(given["-p"])
from redis.backoff import NoBackoff
from redis.retry import Retry
client = redis.Redis(host, port, password=given["-a"], decode_responses=True, protocol=2,
    retry=Retry(NoBackoff(), 0))
client.response_callbacks.clear()
try:
    answer = client.execute_command(*words)
except redis.ConnectionError:
    sys.exit(f"Could not connect to Redis at {host}:{port}: Connection refused")
print(*(answer if isinstance(answer, list) else [answer]), sep="\\n")
"""


def _provide(folder: Path) -> None:
    """Write substitutes for client programs that this machine lacks.

    Skips the test if curl or a shell is missing.
    """
    for name in ("/bin/bash", "curl", "timeout"):
        if shutil.which(name) is None:
            pytest.skip(f"the runbook's commands need {name}, which is not here")
    if shutil.which("jq") is None:
        _script(folder / "jq", _JQ)
    if shutil.which("redis-cli") is None:
        _script(folder / "redis-cli", _REDIS_CLI)
    if shutil.which("psql") is None:
        packages = Path(pytest.__file__).parents[1]
        beside = next(iter(packages.glob("*/pginstall/bin/psql")), None)
        if beside is None:
            pytest.skip("the runbook's commands need psql, which is not here")
        (folder / "psql").symlink_to(beside)


def _script(path: Path, text: str) -> None:
    path.write_text(f"#!{sys.executable}\n{text}", encoding="utf-8")
    path.chmod(0o755)
