"""Runs tests in full, and records what they did: more tries, a longer time, more servers.

    just endurance NAME...

The gate runs the short form of each. A run is recorded only if none of its tests fails or skips.
Tests give their figures by ``record_property``.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from xml.etree import ElementTree as ET

from benchmarks.results import circumstances, command, publish, table

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Run:
    """Tests, and what makes them run in full."""

    claim: str
    tests: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    counted_by: str | None = None
    """Matches a part of the tests' names: those that have the same are counted together."""


SOAK = {"VIRALFX_TEST_SOAK": "1"}
RUNS = {
    "smuggling": Run(
        "No request is smuggled and no header forged, directly and through HAProxy and nginx; a"
        " request of `curl --http2` with a body works.",
        ("tests/edge/test_smuggling.py", "tests/edge/test_attacks.py", "-k", "smuggl or curl"),
        {"EDGE_TRIES": "1000"},
    ),
    "schemathesis": Run(
        "Schemathesis finds no deviation from the OpenAPI document, on Postgres and in memory.",
        ("tests/system/test_schemathesis.py",),
        {**SOAK, "VIRALFX_SCHEMATHESIS_EXAMPLES": "100"},
    ),
    "fuzz": Run(
        "Random requests get no server error but those of limits, no exception is logged, and the"
        " memory stays flat.",
        ("tests/edge/test_fuzz.py", "--timeout", "7200"),
        {"EDGE_FUZZ_REQUESTS": "100000"},
    ),
    "foreign-loops": Run(
        "20,000 calls of `asyncio.run(plugin.jobs.submit())` from threads beside as many"
        " asynchronous ones, under `serve --app`, uvicorn and in plain tasks, and a quarter of them"
        " for cache, database and Redis: all have a result, and the process stops in order.",
        ("tests/system/test_foreign_loops.py",),
        SOAK,
    ),
    "contracts": Run(
        "The contract suites of ledger, state, check and fleet pass behind PgBouncer in session and"
        " transaction mode, each with `max_prepared_statements` 0 and 200.",
        ("tests/contracts", "-n", "2", "-k", "pgbouncer"),
        SOAK,
        r"pgbouncer \w+ \d+",
    ),
    "switchovers": Run(
        "After a change of the primary under load the service is ready and accepts jobs within 6 s,"
        " and within 8 s where the former primary is silent. With synchronous replication no"
        " accepted job is lost.",
        ("tests/integration/test_postgres_switchover.py",),
        SOAK,
    ),
    "locked-jobs": Run(
        "`LOCK TABLE` on the jobs for 10 s, behind PgBouncer in either mode, leaves readiness at"
        " 200.",
        ("tests/system/test_database_faults.py", "-k", "locked_jobs_behind"),
        SOAK,
    ),
    "silent-drop": Run(
        "After a firewall forgot all connections silently, the first request takes less than 3 s,"
        " also behind PgBouncer in transaction mode.",
        ("tests/integration/test_postgres_failover.py", "-k", "silent_drop or cannot_begin"),
        SOAK,
    ),
    "idle-workers": Run(
        "Ten idle worker processes make at most ten transactions a second in all where they poll,"
        " and a hundred fewer than seventy.",
        ("tests/system/test_idle_workers.py", "tests/integration/test_postgres_idle_workers.py"),
        SOAK,
    ),
    "console": Run(
        "Each view of the console keeps every rule of axe-core and is no wider than the window, in"
        " each theme and width. The figures count what it breaks.",
        ("tests/console/test_views.py", "-k", "everybody_can_use_it"),
        SOAK,
    ),
    "frameworks": Run(
        "An application of Litestar, FastAPI, Starlette, Django and plain ASGI has true probes,"
        " finishes its requests during a stop and has its exit code under `viralfx serve`, uvicorn,"
        " granian, hypercorn and gunicorn, as the table of `docs/asgi.md` says.",
        ("tests/frameworks/test_servers.py",),
        {**SOAK, "VIRALFX_TEST_FRESH": "1"},
    ),
    "rolling": Run(
        "No request fails while both backends are replaced three times, through HAProxy and through"
        " Envoy, and by the units of systemd; the proxy hides no failure.",
        (
            *("tests/system/test_rolling_update.py", "tests/system/test_units.py"),
            *("-k", "both_backends or rolling_restart_loses"),
        ),
        {**SOAK, "VIRALFX_TEST_FRESH": "1"},
    ),
    "pages": Run(
        "In Chromium `/api/docs` and every page of the documentation site ask no other host, and no"
        " error or report of the content security policy appears.",
        ("tests/browser", "-k", "shows_each_operation or elsewhere"),
        SOAK,
    ),
    "podman": Run(
        "`podman kube play` runs the rendered base and production overlay with the image:"
        " migration, readiness, a job, a restart by the liveness probe, and a stop within the grace"
        " period.",
        ("tests/deploy/test_podman.py",),
        {"VIRALFX_TEST_COMPLETE": "1"},
    ),
    "sigterm": Run(
        "SIGTERM ends the process with exit code 0, at any moment from a millisecond to a second"
        " after the init starts it.",
        ("tests/system/test_init.py", "-k", "sigterm or hangup"),
        SOAK,
    ),
}


@dataclass
class Outcome:
    """The tests of a run by result, and the figures they gave."""

    results: Counter[str]
    figures: dict[str, list[str]]


def read(report: Path, counted_by: str | None = None) -> Outcome:
    """Read a JUnit report of pytest; see :class:`Run` for ``counted_by``."""
    outcome = Outcome(Counter(), {})
    for case in ET.parse(report).iter("testcase"):  # noqa: S314 - pytest has written it
        kinds = {child.tag for child in case} - {"properties", "system-out", "system-err"}
        outcome.results[kinds.pop() if kinds else "passed"] += 1
        if counted_by and (part := re.search(counted_by, case.get("name", ""))):
            outcome.figures.setdefault(f"tests of {part[0]}", []).append("1")
        for each in case.iter("property"):
            outcome.figures.setdefault(each.get("name", ""), []).append(each.get("value", ""))
    return outcome


def lines_of(run: Run, outcome: Outcome, seconds: float) -> Iterable[str]:
    """Yield the lines of a section."""
    said = " ".join(f"{name}={value}" for name, value in run.variables.items())
    yield from circumstances(
        command("endurance"), f"Tests: `{' '.join([said, 'pytest', *run.tests]).strip()}`"
    )
    yield from ("", run.claim, "")
    counts = [(f"tests {result}", str(count)) for result, count in outcome.results.items()]
    figures = [(name, _shown(values)) for name, values in outcome.figures.items()]
    yield from table(("what", "figure"), [*counts, *figures, ("seconds", f"{seconds:.0f}")])


def _shown(values: Sequence[str]) -> str:
    """Return the sum of numbers, or the different texts."""
    if all(value.lstrip("-").isdecimal() for value in values):
        return str(sum(map(int, values)))
    return "; ".join(dict.fromkeys(values))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, publish, and return the exit code."""
    parser = argparse.ArgumentParser(prog="just endurance", description=__doc__)
    parser.add_argument("names", nargs="+", choices=RUNS, metavar="NAME", help=", ".join(RUNS))
    options = parser.parse_args(arguments)
    status = 0
    for name in options.names:
        run, began = RUNS[name], monotonic()
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.xml")
            code = subprocess.run(
                [
                    *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *run.tests),
                    *(f"--junitxml={report}", "-o", "junit_family=xunit1"),
                ],
                cwd=ROOT,
                env={**os.environ, "VIRALFX_TEST_SERVERS": "wheels", **run.variables},
                check=False,
            ).returncode
            given = report.exists()
            outcome = read(report, run.counted_by) if given else Outcome(Counter(), {})
        if code or set(outcome.results) != {"passed"}:
            print(f"{name}: not recorded; {dict(outcome.results)}, exit code {code}")
            status = 1
            continue
        lines = list(lines_of(run, outcome, monotonic() - began))
        publish(f"endurance.py {name}", lines, (), check=False)
    return status


if __name__ == "__main__":
    sys.exit(main())
