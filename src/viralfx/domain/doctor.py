"""Pre-deployment diagnosis (``viralfx doctor``): the check port, findings, and one run of all."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from viralfx.core.clock import Clock, finished_within, ignore_error
from viralfx.core.errors import Problem


class Area(StrEnum):
    """Subject of a finding, in report order."""

    ENVIRONMENT = "environment"
    SECRETS = "secrets"
    BUDGETS = "shutdown budgets"
    DATABASE = "database"
    POOL = "pool"
    MIGRATIONS = "migrations"
    REDIS = "redis"
    STATE = "saved state"
    MEMORY = "memory"
    PORTS = "ports"
    ENDPOINTS = "health endpoints"
    LOGGING = "logging"
    TRACING = "tracing"
    MONITORING = "monitoring"


class Verdict(StrEnum):
    """Result of a finding."""

    PASS = "pass"
    WARN = "warn"
    """Works, but with a risk or a limitation."""
    FAIL = "fail"
    """Does not work."""
    SKIP = "skip"
    """Not examined; the finding says why."""


_SEVERITY = {Verdict.SKIP: 0, Verdict.PASS: 1, Verdict.WARN: 2, Verdict.FAIL: 3}
_ORDER = {area: place for place, area in enumerate(Area)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One fact, on one line, and what to do about it. Neither text contains a secret."""

    area: Area
    verdict: Verdict
    found: str
    remedy: str = ""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for several lines, and for a warning or failure without remedy."""
        if len(f"{self.found} {self.remedy}".splitlines()) > 1:
            raise ValueError("a finding has one line")
        if self.verdict in {Verdict.WARN, Verdict.FAIL} and not self.remedy:
            raise ValueError(f"a warning or failure needs a remedy: {self.found}")


class DoctorCheck(Protocol):
    """Port: diagnoses one technology or one part of the settings.

    A check makes one attempt and changes nothing outside this process. It must tolerate
    cancellation.
    """

    async def check(self) -> Sequence[Finding]:
        """Examine the subject once and return the findings."""
        ...


def passed(area: Area, found: str) -> Finding:
    """Return a passing finding."""
    return Finding(area=area, verdict=Verdict.PASS, found=found)


def warned(area: Area, found: str, remedy: str) -> Finding:
    """Return a warning."""
    return Finding(area=area, verdict=Verdict.WARN, found=found, remedy=remedy)


def failed(area: Area, found: str, remedy: str) -> Finding:
    """Return a failure: something that keeps the service from working."""
    return Finding(area=area, verdict=Verdict.FAIL, found=found, remedy=remedy)


def finding_of(
    problem: Problem, area: Area, verdict: Callable[[Area, str, str], Finding] = failed
) -> Finding:
    """Return the finding that states a problem; ``verdict`` is :func:`failed` or :func:`warned`."""
    # A text may contain the value of a variable, with several lines.
    found, remedy = (" ".join(text.splitlines()) for text in (problem.found, problem.remedy))
    return verdict(area, found, remedy or f"correct {problem.variable or found}")


def skipped(area: Area, found: str, remedy: str = "") -> Finding:
    """Return a finding for a subject that was not examined; ``found`` says why."""
    return Finding(area=area, verdict=Verdict.SKIP, found=found, remedy=remedy)


def worst(findings: Iterable[Finding]) -> Verdict:
    """Return the worst verdict. Skipped findings do not count; no findings at all is a pass."""
    verdicts = (finding.verdict for finding in findings)
    return max((Verdict.PASS, *verdicts), key=lambda verdict: _SEVERITY[verdict])


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Sort by area, and within one the worst first."""
    return tuple(sorted(findings, key=lambda f: (_ORDER[f.area], -_SEVERITY[f.verdict])))


async def diagnose(
    doctor_checks: Iterable[tuple[Area, DoctorCheck]], *, clock: Clock, limit: float
) -> tuple[Finding, ...]:
    """Run all checks concurrently, each for at most ``limit`` seconds. Return sorted findings.

    A check that raises or takes longer becomes a failure in its area. It is cancelled and
    abandoned, so that a hanging check does not delay the result.
    """
    runs = [asyncio.ensure_future(_run(area, one, clock, limit)) for area, one in doctor_checks]
    found: list[Finding] = []
    try:
        for run in runs:
            found += await run
    finally:
        for run in runs:
            run.cancel()
    return in_order(found)


async def _run(area: Area, check: DoctorCheck, clock: Clock, limit: float) -> Sequence[Finding]:
    task = asyncio.ensure_future(check.check())
    try:
        if not await finished_within(task, limit, clock):
            return [
                failed(
                    area,
                    f"no result within {limit:g} s",
                    "check the server, the network path to it, and how busy this machine is",
                )
            ]
    finally:
        task.cancel()
        task.add_done_callback(ignore_error)
    if task.cancelled():
        return [_crashed(area, "it was cancelled")]
    error = task.exception()
    # Not the error's text: it may contain a secret.
    return task.result() if error is None else [_crashed(area, type(error).__name__)]


def _crashed(area: Area, what: str) -> Finding:
    return failed(area, f"the check itself failed: {what}", "report this as a bug in viralfx")
