"""Gathers what ``viralfx doctor`` examines of the settings and of what they point to."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from viralfx.adapters.memory.examination import StateFolderExamination
from viralfx.bootstrap.tracing_review import review_tracing, tracing_problems
from viralfx.domain.diagnosis import Area, Examination, Finding, failed, skipped
from viralfx.settings import Settings, fields
from viralfx.settings.review import PRODUCTION, misspelt, review

# The first prefix that fits says what a variable is about.
_AREAS = (
    ("DATABASE_URL", Area.DATABASE),
    ("DB_POOL_", Area.POOL),
    ("POOL_", Area.POOL),
    ("DB_", Area.DATABASE),
    ("REDIS_", Area.REDIS),
    ("SHUTDOWN_", Area.BUDGETS),
    ("HEALTH_", Area.ENDPOINTS),
    ("READINESS_", Area.ENDPOINTS),
    ("LOG_", Area.LOGGING),
    ("STATE_", Area.STATE),
    ("PORT", Area.PORTS),
    ("HOST", Area.PORTS),
    ("MANAGEMENT_PORT", Area.PORTS),
)
_OF_TRACES = "OTEL_"


@dataclass(frozen=True, slots=True)
class Known:
    """An examination whose findings are there already."""

    findings: Sequence[Finding]

    async def examine(self) -> Sequence[Finding]:
        """Return them."""
        return self.findings


def examinations(
    settings: Settings, environ: Mapping[str, str]
) -> Iterator[tuple[Area, Examination]]:
    """Yield what is to be examined, each with the area that it is mainly about."""
    yield Area.ENVIRONMENT, Known(review(settings, environ))
    yield Area.DATABASE, _database(settings)
    yield Area.REDIS, _redis(settings)
    yield Area.STATE, _state(settings)
    yield Area.TRACING, Known(_tracing(environ))


def unreadable(problems: Iterable[str], environ: Mapping[str, str]) -> list[Finding]:
    """Make findings of what :func:`viralfx.settings.read_settings` refused, and those of traces.

    Everything that needs the settings is skipped.
    """
    findings = refused([*problems, *tracing_problems(environ)])
    told_variables = {finding.found.partition(":")[0] for finding in findings}
    findings += [f for f in misspelt(environ) if f.found.partition(" ")[0] not in told_variables]
    told = {finding.area for finding in findings}
    findings += [
        skipped(area, "the settings could not be read") for area in Area if area not in told
    ]
    return findings


def refused(problems: Iterable[str], area: Area | None = None) -> list[Finding]:
    """Make findings of a :class:`ConfigurationError`; each in its variable's area if not given."""
    return [_refused(problem, area) for problem in problems]


def unmade(problems: Iterable[str], environ: Mapping[str, str]) -> list[Finding]:
    """Make findings of why there is no application; of its traces only what is not told yet."""
    told = set(tracing_problems(environ))
    left = [problem for problem in problems if problem not in told]
    findings = [_refused(p, None if p.startswith(_OF_TRACES) else Area.ENDPOINTS) for p in left]
    if all(finding.area is Area.TRACING for finding in findings):
        findings.append(skipped(Area.ENDPOINTS, "nothing starts before tracing is put right"))
    return findings


def _refused(problem: str, area: Area | None = None) -> Finding:
    problem = " ".join(problem.splitlines())  # it may show what a variable holds
    variable = problem.partition(":")[0]
    found, _, remedy = problem.rpartition("; ")
    if not found:
        found, remedy = problem, f"correct {variable}"
    return failed(area or _area(variable), found, remedy)


def _area(variable: str) -> Area:
    if variable.startswith(_OF_TRACES):
        return Area.TRACING
    ours = {field.variable: field for field in fields()}
    if variable not in ours:
        return Area.ENVIRONMENT
    if ours[variable].secret and variable != "DATABASE_URL":
        return Area.SECRETS
    return next((a for start, a in _AREAS if variable.startswith(start)), Area.ENVIRONMENT)


def _tracing(environ: Mapping[str, str]) -> list[Finding]:
    return refused(tracing_problems(environ)) or [review_tracing(environ)]


def _database(settings: Settings) -> Examination:
    if settings.database_url is None:
        reason = "DATABASE_URL is not set: data is kept in memory"
        areas = (Area.DATABASE, Area.POOL, Area.MIGRATIONS)
        return Known([skipped(area, reason) for area in areas])
    # Not at the top: without Postgres nobody need wait for its driver.
    from viralfx.adapters.postgres.examination import PostgresExamination  # noqa: PLC0415
    from viralfx.bootstrap.postgres import postgres_config  # noqa: PLC0415

    production = settings.environment == PRODUCTION
    return PostgresExamination(postgres_config(settings), production=production)


def _redis(settings: Settings) -> Examination:
    if not settings.redis.in_use:
        return Known([skipped(Area.REDIS, "REDIS_HOST is not set: the cache is in memory")])
    from viralfx.adapters.redis.examination import RedisExamination  # noqa: PLC0415 - likewise
    from viralfx.bootstrap.redis import redis_config  # noqa: PLC0415

    return RedisExamination(redis_config(settings))


def _state(settings: Settings) -> Examination:
    if settings.state_dir is not None:
        return StateFolderExamination(Path(settings.state_dir))
    where = "memory" if settings.database_url is None else "the database"
    return Known([skipped(Area.STATE, f"STATE_DIR is not set: state is kept in {where}")])
