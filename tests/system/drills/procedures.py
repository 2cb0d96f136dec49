"""The procedures of docs/runbook.md: taken apart, and carried out as they are written."""

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
"""What an emergency procedure consists of, in this order."""

_PART = re.compile(r"^\*\*(\w+):\*\*", re.MULTILINE)
FENCED = re.compile(r"^```bash\n(.*?)^```\n(?:```(?:\w*)\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
"""A command, and right below it what it prints, if that is shown."""

# What is another thing each time, or was counted or measured; all else is to be as it is shown.
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
        (r"^\[\d+\.\d+,", "[<milliseconds>,"),
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
    """What the document shows it printing; None where it shows nothing."""

    def with_words(self, words: Mapping[str, str]) -> "Step":
        """Return it showing other words."""
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
        """Return the alerts that are to fire, as the symptom names them."""
        return set(re.findall(r"`(ViralFX\w+)`", self.parts["Symptom"])) | {self.heading}


def procedure(heading: str) -> Procedure:
    """Return what the runbook says under a heading."""
    text = RUNBOOK.read_text(encoding="utf-8")
    sections = {part.split("\n", 1)[0]: part for part in text.split("\n## ")[1:]}
    _, *rest = _PART.split(sections[heading])
    return Procedure(heading, sections[heading], dict(zip(rest[::2], rest[1::2], strict=True)))


def steps_of_beginning(heading: str) -> list[Step]:
    """Return the commands under a heading before those of the alerts."""
    beginning = RUNBOOK.read_text(encoding="utf-8").split("\n## ")[0]
    (text,) = [part for part in beginning.split("\n### ") if part.startswith(f"{heading}\n")]
    return _steps(heading, text)


def _steps(where: str, text: str) -> list[Step]:
    found = FENCED.findall(text)
    return [Step(where, command.strip(), shown or None) for command, shown in found]


class Console:
    """Where whoever is on call types: the commands of the document, in a shell.

    ``folder`` is on PATH before anything else, and gets what this machine does not have.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, **environment}
        _provide(folder)

    def type(self, command: str) -> str:
        """Run a command; return what the terminal shows, errors included."""
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
        """Carry out commands one after another, each until it prints what the document shows.

        What shows nothing in the document is run once, and is to print no error.
        """
        for step in steps:
            if step.shown is None:
                printed = self.type(step.command)
                assert not re.search(r"(?i)\berror\b|not found|usage:", printed), (step, printed)
            else:
                self.expect(step, step.shown, seconds=seconds)

    def expect(self, step: Step, shown: str, *, seconds: float = 60.0) -> None:
        """Run a command until it prints something, but for what varies."""
        expected, seen = masked(shown), ""

        def look() -> bool:
            nonlocal seen
            seen = self.type(step.command)
            return masked(seen) == expected

        try:
            wait_until(look, seconds=seconds)
        except AssertionError:
            lines = difflib.unified_diff(
                expected, masked(seen), "the document", "printed", lineterm=""
            )
            difference = "\n".join(lines)
            raise AssertionError(
                f"{step.where}: {step.command}\n{difference}\nprinted:\n{seen}"
            ) from None


def masked(printed: str) -> list[str]:
    """Return the lines of an output without what varies, each once where it comes repeatedly.

    The amounts are those of the load, and not the document's.
    """
    lines: list[str] = []
    for line in printed.rstrip().splitlines():
        text = line.rstrip()
        for pattern, instead in _VARIES:
            text = pattern.sub(instead, text)
        if text not in lines[-1:]:
            lines.append(text)
    return lines


# -- programs that are not everywhere ------------------------------------------------------------

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
    """Give the console what this machine has not: clients of the same servers, by other means.

    Skips the test where curl is missing, or what runs commands.
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
