"""What is looked at before a deployment: the port, its findings, and one run of everything."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from viralfx.domain.clock import Clock, finished_within


class Area(StrEnum):
    """What a finding is about, in the order in which it is told."""

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
    """How a finding is judged."""

    PASS = "pass"
    WARN = "warn"
    """It works, but not well, or not for long."""
    FAIL = "fail"
    """It does not work."""
    SKIP = "skip"
    """Nothing was looked at; the finding says why."""


_SEVERITY = {Verdict.SKIP: 0, Verdict.PASS: 1, Verdict.WARN: 2, Verdict.FAIL: 3}
_ORDER = {area: place for place, area in enumerate(Area)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was seen, on one line, and what to do about it. Neither holds a secret."""

    area: Area
    verdict: Verdict
    found: str
    remedy: str = ""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a text of several lines, and for trouble without a remedy."""
        if len(f"{self.found} {self.remedy}".splitlines()) > 1:
            raise ValueError("a finding has one line")
        if self.verdict in {Verdict.WARN, Verdict.FAIL} and not self.remedy:
            raise ValueError(f"nobody is told what to do: {self.found}")


class Examination(Protocol):
    """Port: answers "what is wrong with you?" for one technology or one part of the settings.

    It changes nothing outside of this process, makes one attempt, and must survive being
    cancelled.
    """

    async def examine(self) -> Sequence[Finding]:
        """Look once and say what is seen."""
        ...


def passed(area: Area, found: str) -> Finding:
    """Make a finding that all is well."""
    return Finding(area=area, verdict=Verdict.PASS, found=found)


def warned(area: Area, found: str, remedy: str) -> Finding:
    """Make a finding that somebody should know."""
    return Finding(area=area, verdict=Verdict.WARN, found=found, remedy=remedy)


def failed(area: Area, found: str, remedy: str) -> Finding:
    """Make a finding that keeps the service from working."""
    return Finding(area=area, verdict=Verdict.FAIL, found=found, remedy=remedy)


def skipped(area: Area, found: str, remedy: str = "") -> Finding:
    """Make a finding that nothing was looked at, and why."""
    return Finding(area=area, verdict=Verdict.SKIP, found=found, remedy=remedy)


def worst(findings: Iterable[Finding]) -> Verdict:
    """Return the worst verdict; what was skipped does not count, and nothing at all is a pass."""
    verdicts = (finding.verdict for finding in findings)
    return max((Verdict.PASS, *verdicts), key=lambda verdict: _SEVERITY[verdict])


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Sort by area, and within one the worst first."""
    return tuple(sorted(findings, key=lambda f: (_ORDER[f.area], -_SEVERITY[f.verdict])))


async def diagnose(
    examinations: Iterable[tuple[Area, Examination]], *, clock: Clock, limit: float
) -> tuple[Finding, ...]:
    """Run all examinations at once, each for at most ``limit`` seconds.

    One that raises or takes longer is itself a failure in its area; it is cancelled and left
    behind, so that this returns in time whatever hangs.
    """
    runs = [asyncio.ensure_future(_run(area, one, clock, limit)) for area, one in examinations]
    found: list[Finding] = []
    try:
        for run in runs:
            found += await run
    finally:
        for run in runs:
            run.cancel()
    return in_order(found)


async def _run(
    area: Area, examination: Examination, clock: Clock, limit: float
) -> Sequence[Finding]:
    task = asyncio.ensure_future(examination.examine())
    try:
        if not await finished_within(task, limit, clock):
            return [
                failed(
                    area,
                    f"nothing was found out within {limit:g} s",
                    "look at what is asked here, and at the network on the way",
                )
            ]
    finally:
        task.cancel()
        task.add_done_callback(_retrieve)
    if task.cancelled():
        return [_crashed(area, "it was cancelled")]
    error = task.exception()
    # Not the error's text: nobody knows what is in it.
    return task.result() if error is None else [_crashed(area, type(error).__name__)]


def _crashed(area: Area, what: str) -> Finding:
    return failed(area, f"the examination itself failed: {what}", "report it as our mistake")


def _retrieve(task: "asyncio.Future[Sequence[Finding]]") -> None:
    if not task.cancelled():
        task.exception()
