"""Runs the suites that meet other projects, against their newest releases: ``just newest``.

The packages have lower bounds alone, so an installation may get a release that the lock does not
have. An environment of its own gets the newest of each, by uv; the tests are the contract suites,
and those of the parts that a release may lack. It needs a package index. ``--record`` publishes the
versions and the results.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.endurance import read
from benchmarks.results import Target, circumstances, command, publish, table, target_table
from tests.deploy.distribution import ROOT, locked
from tests.deploy.wheels import failure, timed, uv

ENVIRONMENT = ROOT / ".venv-newest"
SUITES = (
    "tests/contracts",
    "tests/edge",
    "tests/frameworks",
    "tests/integration/test_postgres_missing_parts.py",
    "tests/integration/test_stream_notifier.py",
    "tests/integration/test_taskiq_broker.py",
    "tests/integration/test_traced_statements.py",
    "tests/system/test_missing_parts.py",
    "tests/system/test_stop.py",
)
"""A release without a part that is used fails `test_missing_parts`: nothing may lack a part."""
USED_IN_PRIVATE = ("uvicorn", "httptools", "websockets", "asyncpg", "taskiq", "taskiq-redis")
"""Packages whose private parts are used."""


@dataclass(frozen=True)
class Result:
    """The end of the suites."""

    passed: int
    others: dict[str, int]
    seconds: float
    output: str


def install() -> list[str]:
    """Make the environment with the newest releases; return problems."""
    python = ENVIRONMENT / "bin/python"
    made = ("venv", "--quiet", "--clear", "--python", sys.executable, ENVIRONMENT)
    newest = ("--upgrade", "--group", "test", "--editable", ".[all]")
    into = ("pip", "install", "--quiet", "--python", python, *newest)
    for step in (made, into):
        if found := failure(f"uv {step[0]}", uv(*step)):
            return found
    return []


def versions() -> dict[str, str]:
    """Return the version of each package in the environment."""
    listed = uv("pip", "list", "--format", "json", "--python", ENVIRONMENT / "bin/python")
    (found,) = re.findall(r"^\[.*\]$", listed.output, re.MULTILINE)
    return {each["name"]: each["version"] for each in json.loads(found)}


def run(suites: Sequence[str]) -> Result:
    """Run the suites in the environment."""
    report = ENVIRONMENT / "newest.xml"
    options = ("-q", "-n", str(os.cpu_count()), "-p", "no:cacheprovider", "--tb=short")
    began = time.monotonic()
    ended = timed(
        *(ENVIRONMENT / "bin/python", "-m", "pytest", *options),
        *(f"--junitxml={report}", "-o", "junit_family=xunit1", *suites),
        environment={"VIRALFX_TEST_SERVERS": os.environ.get("VIRALFX_TEST_SERVERS", "wheels")},
    )
    counts = read(report).results
    others = {kind: number for kind, number in counts.items() if kind != "passed" and number}
    if ended.code and not others:
        others["pytest"] = ended.code
    return Result(counts["passed"], others, time.monotonic() - began, ended.output)


def main() -> int:
    """Install, run, publish with ``--record``, and return the exit code."""
    parser = argparse.ArgumentParser(prog="just newest", description=__doc__)
    parser.add_argument("suites", nargs="*", help="files or folders of tests; default: the suites")
    parser.add_argument("--record", action="store_true", help="publish the results in RESULTS.md")
    options = parser.parse_args()
    if options.record and options.suites:
        parser.error("--record needs a run of all suites: leave out their names")
    if problems := install():
        print("\n".join(problems))
        return 1
    newer = {
        name: (locked()[name], version)
        for name, version in versions().items()
        if locked().get(name, version) != version
    }
    for name, (old, new) in newer.items():
        print(f"{name} {new}, the lock has {old}", flush=True)
    result = run(options.suites or SUITES)
    failed = {kind: number for kind, number in result.others.items() if kind != "skipped"}
    print(result.output if failed else result.output.splitlines()[-1])
    shown = {**dict.fromkeys(USED_IN_PRIVATE), **newer}
    found = versions()
    target = Target(
        what="tests that do not pass on the newest releases",
        measured=sum(failed.values()),
        limit=0,
        at_least=False,
    )
    skipped = result.others.get("skipped", 0)
    lines = [
        *circumstances(
            command("newest"),
            f"{result.passed:,} tests passed, {skipped} skipped, in {result.seconds:.0f} s",
            "Versions above are those of the lock; the tests ran on these:",
        ),
        "",
        *table(
            ("package", "newest release", "in the lock"),
            [(f"`{name}`", found[name], locked()[name]) for name in shown],
        ),
        "",
        *target_table([target]),
    ]
    recorded = options.record and not failed
    return publish("newest.py", lines, [target], check=True, record=recorded)


if __name__ == "__main__":
    sys.exit(main())
