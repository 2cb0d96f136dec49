"""Runs ``viralfx doctor`` as a program and searches its output for secrets."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from tests import forked

TOKEN, API_TOKEN = "planted-token-7c1f9e3b5a", "planted-api-d2608b4c1e97"
USER_PASSWORD = "h:u@n/t#e?r2"

GOOD = {
    "ENVIRONMENT": "production",
    "ALLOW_MEMORY_ADAPTERS": "true",
    "PORT": "0",
    "MANAGEMENT_TOKEN": TOKEN,
    "API_TOKEN": API_TOKEN,
    "SHUTDOWN_READINESS_DELAY": "5000",
}
"""A right configuration, without the servers that it needs."""

Findings = list[dict[str, str]]


@dataclass(frozen=True)
class DoctorRun:
    """The result of one run."""

    code: int
    status: str
    findings: Findings

    def of(self, area: str) -> Findings:
        """Return the problems in an area."""
        return [
            finding
            for finding in self.findings
            if finding["area"] == area and finding["status"] in {"warn", "fail"}
        ]

    def judged(self, area: str, text: str) -> list[str]:
        """Return the verdicts of the findings that contain a text."""
        return [finding["status"] for finding in self.of(area) if text in finding["found"]]


def program(environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run it in an environment with only the given variables."""
    return subprocess.run(
        [sys.executable, "-m", "viralfx", "doctor"],
        env={"PATH": os.environ["PATH"], **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def visit(environ: Mapping[str, str], *arguments: str, secrets: tuple[str, ...] = ()) -> DoctorRun:
    """Run the doctor on a configuration; its output may contain only findings and no secret."""
    done = forked.viralfx("doctor", "--json", *arguments, environ=environ)
    assert done.stderr == ""
    assert not [s for s in (TOKEN, USER_PASSWORD, *secrets) if s in done.stdout]
    report = json.loads(done.stdout)
    return DoctorRun(done.returncode, report["status"], report["findings"])
