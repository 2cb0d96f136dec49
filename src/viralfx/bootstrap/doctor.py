"""Collects the subjects of ``viralfx doctor``: settings, backends and tracing."""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit

from viralfx.adapters.memory.state import StateFolderDoctor
from viralfx.core.errors import Problem
from viralfx.core.extras import is_about_extra, is_installed, lacking, missing
from viralfx.domain.doctor import (
    Area,
    DoctorCheck,
    Finding,
    failed,
    finding_of,
    passed,
    skipped,
    warned,
)
from viralfx.settings import CredentialsCallable, Settings, fields
from viralfx.settings.doctor import misspelt, plain_environment, review, unread
from viralfx.settings.model import DATABASE_URLS
from viralfx.telemetry.tracing.variables import (
    endpoint_of,
    is_enabled,
    needs,
    problems,
    uses_grpc,
)

_SPECIAL, _GENERAL = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"
_REFUSALS = ("OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER")
"""Variables that turn tracing off although an endpoint is set."""
_COLLECTOR_SECONDS = 3.0


_FindCallable: TypeAlias = Callable[[], Awaitable[CredentialsCallable | None]]


def tracing_problems(environ: Mapping[str, str]) -> list[Problem]:
    """Return the problems of the variables ``OTEL_*`` that would prevent a start."""
    return [*map(Problem.of_line, problems(environ))] if is_enabled(environ) else []


def review_tracing(environ: Mapping[str, str]) -> Finding:
    """Return a finding on whether valid variables turn tracing on. Contacts no collector."""
    endpoints = {name: environ.get(name, "").strip() for name in (_SPECIAL, _GENERAL)}
    variable = next((name for name, value in endpoints.items() if value), None)
    if variable is None:
        return skipped(Area.TRACING, f"{_GENERAL} is not set: nothing is traced")
    if not is_enabled(environ):
        only = {variable: endpoints[variable]}
        said = {name: environ.get(name, "").strip() for name in _REFUSALS}
        no = [
            f"{name}={value}"
            for name, value in said.items()
            if not is_enabled({**only, name: value})
        ]
        return skipped(Area.TRACING, f"{' and '.join(no)}: nothing is traced, despite {variable}")
    how = "gRPC" if uses_grpc(environ) else "HTTP"
    return passed(Area.TRACING, f"traces go to {_place(endpoints[variable])} by {how}: {variable}")


def _place(endpoint: str) -> str:
    """Return scheme, host and port on one line; the rest of an address may be secret."""
    parts = urlsplit(endpoint if "://" in endpoint else f"//{endpoint}")
    place = " ".join(parts.netloc.rpartition("@")[2].splitlines())
    return f"{parts.scheme}://{place}" if parts.scheme else place


# The first matching prefix determines the area of a variable.
_AREAS = (
    ("DATABASE_", Area.DATABASE),
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
_TRACING_PREFIX = "OTEL_"


@dataclass(frozen=True, slots=True)
class Known:
    """A doctor check whose findings are known already."""

    findings: Sequence[Finding]

    async def check(self) -> Sequence[Finding]:
        """Return the findings."""
        return self.findings


def doctor_checks(
    settings: Settings,
    environ: Mapping[str, str],
    redis_credentials: _FindCallable | None = None,
    database_password: _FindCallable | None = None,
) -> Iterator[tuple[Area, DoctorCheck]]:
    """Yield the doctor checks, each with its main area.

    ``redis_credentials`` and ``database_password`` return the application's callable for Redis
    and for Postgres, if it has one.
    """
    yield Area.ENVIRONMENT, Known([*review(settings, environ), *review_extras(settings, environ)])
    yield Area.DATABASE, _database(settings, database_password)
    yield Area.REDIS, _redis(settings, redis_credentials)
    yield Area.STATE, _state(settings)
    yield Area.TRACING, _tracing(environ)


@dataclass(frozen=True, slots=True)
class ConfigurationSource:
    """The origin of the settings and the credentials of a process, to diagnose it while it runs."""

    env_prefix: str = ""
    """The beginning of the names of its variables."""
    redis_credentials: CredentialsCallable | None = None
    database_password: CredentialsCallable | None = None

    def environ(self) -> Mapping[str, str]:
        """Return the environment as it is now, with the variables' names without the prefix."""
        return plain_environment(os.environ, self.env_prefix)

    def doctor_checks(self, settings: Settings) -> Iterator[tuple[Area, DoctorCheck]]:
        """Yield the doctor checks, each with its main area."""
        callables = (self.redis_credentials, self.database_password)
        return doctor_checks(settings, self.environ(), *map(_finder, callables))


def _finder(found: CredentialsCallable | None) -> _FindCallable:
    async def find() -> CredentialsCallable | None:
        return found

    return find


def review_extras(settings: Settings, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Yield findings on the extras that the variables ask for."""
    asked = [*settings.needs, *needs(environ)]
    if missing(asked):
        for variable, extra in asked:
            if not is_installed(extra):
                yield failed(Area.ENVIRONMENT, *lacking(variable, extra))
    elif asked:
        names = ",".join(dict.fromkeys(extra for _, extra in asked))
        found = f"the settings ask for viralfx[{names}], and its packages are installed"
        yield passed(Area.ENVIRONMENT, found)


def unreadable(problems: Iterable[Problem], environ: Mapping[str, str]) -> list[Finding]:
    """Return findings for the problems of :func:`viralfx.settings.read_settings` and of tracing.

    All areas that need the settings are skipped.
    """
    every = [*problems, *tracing_problems(environ)]
    findings = refused(every)
    reported_variables = {problem.variable for problem in every}
    findings += misspelt(environ, reported_variables)
    findings += unread(environ, reported_variables)
    reported = {finding.area for finding in findings}
    findings += [
        skipped(area, "the settings could not be read") for area in Area if area not in reported
    ]
    return findings


def refused(problems: Iterable[Problem]) -> list[Finding]:
    """Return findings for a :class:`ConfigurationError`; the variable determines the area."""
    return [finding_of(problem, _area(problem.variable)) for problem in problems]


def unmade(problems: Iterable[Problem], environ: Mapping[str, str]) -> list[Finding]:
    """Return findings for a failed start, without problems that are reported elsewhere."""
    reported = set(tracing_problems(environ))
    # `review_extras` reports missing extras.
    left = [p for p in problems if p not in reported and not is_about_extra(str(p))]
    findings = [
        finding_of(p, Area.TRACING if p.variable.startswith(_TRACING_PREFIX) else Area.ENDPOINTS)
        for p in left
    ]
    if all(finding.area is Area.TRACING for finding in findings):
        findings.append(
            skipped(Area.ENDPOINTS, "nothing starts before the problems above are fixed")
        )
    return findings


def _area(variable: str) -> Area:
    if variable.startswith(_TRACING_PREFIX):
        return Area.TRACING
    known = {field.variable: field for field in fields()}
    if variable not in known:
        return Area.ENVIRONMENT
    if known[variable].secret and variable not in {*DATABASE_URLS, "REDIS_URL"}:
        return Area.SECRETS
    return next((a for start, a in _AREAS if variable.startswith(start)), Area.ENVIRONMENT)


def _tracing(environ: Mapping[str, str]) -> DoctorCheck:
    if wrong := tracing_problems(environ):
        return Known(refused(wrong))
    reviewed = review_tracing(environ)
    return CollectorDoctor(environ, reviewed) if is_enabled(environ) else Known([reviewed])


@dataclass(frozen=True, slots=True)
class CollectorDoctor:
    """Connects to the collector of traces once, and sends nothing."""

    environ: Mapping[str, str]
    reviewed: Finding
    """The finding if the collector listens."""

    async def check(self) -> Sequence[Finding]:
        """Connect to the host and port of the endpoint."""
        variable, endpoint = endpoint_of(self.environ)
        parts = urlsplit(endpoint if "://" in endpoint else f"//{endpoint}")
        grpc = uses_grpc(self.environ)
        place, host = _place(endpoint), parts.hostname or ""
        if _proxied(("grpc", "https", "http") if grpc else (parts.scheme,), host):
            found = f"{self.reviewed.found}; through a proxy, so the collector itself was not tried"
            return [replace(self.reviewed, found=found)]
        port = parts.port or (443 if grpc or parts.scheme == "https" else 80)
        try:
            async with asyncio.timeout(_COLLECTOR_SECONDS):
                _, writer = await asyncio.open_connection(host, port)
        except (OSError, UnicodeError) as error:
            found = f"the collector at {place} {_reason(error)}: no trace arrives"
            return [warned(Area.TRACING, found, f"start the collector, or correct {variable}")]
        writer.transport.abort()
        return [self.reviewed]


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"does not answer within {_COLLECTOR_SECONDS:g} s"
    if isinstance(error, ConnectionRefusedError) or "Connect call failed" in str(error):
        return "does not listen"
    known = not isinstance(error, socket.gaierror | UnicodeError)
    return "cannot be reached" if known else "has an unknown host name"


def _proxied(schemes: Collection[str], host: str) -> bool:
    # Imported late, since each process loads this module.
    from urllib.request import getproxies, proxy_bypass  # noqa: PLC0415

    return not getproxies().keys().isdisjoint(schemes) and not proxy_bypass(host)


def _database(settings: Settings, find_callable: _FindCallable | None) -> DoctorCheck:
    areas = (Area.DATABASE, Area.POOL, Area.MIGRATIONS)
    if settings.database_url is None:
        reason = "DATABASE_URL is not set: data is kept in memory"
        return Known([skipped(area, reason) for area in areas])
    if not is_installed("postgres"):
        return Known([skipped(area, "viralfx[postgres] is not installed") for area in areas])
    # Imported late: a process without Postgres does not need the driver.
    from viralfx.adapters.postgres.doctor import PostgresDoctor  # noqa: PLC0415
    from viralfx.bootstrap.postgres import migration_config, postgres_config  # noqa: PLC0415

    production = settings.in_production
    own_address = settings.database_migration_url is not None
    return PostgresDoctor(
        postgres_config(settings),
        production=production,
        migrator=migration_config(settings) if own_address else None,
        find_callable=find_callable,
    )


def _redis(
    settings: Settings,
    credentials: _FindCallable | None,
) -> DoctorCheck:
    if not settings.redis.in_use:
        return Known([skipped(Area.REDIS, "REDIS_HOST is not set: the cache is in memory")])
    if not is_installed("redis"):
        return Known([skipped(Area.REDIS, "viralfx[redis] is not installed")])
    from viralfx.adapters.redis.doctor import RedisDoctor  # noqa: PLC0415 - as above

    return RedisDoctor(settings.redis, credentials)


def _state(settings: Settings) -> DoctorCheck:
    if settings.state_dir is not None:
        return StateFolderDoctor(Path(settings.state_dir))
    where = "memory" if settings.database_url is None else "the database"
    return Known([skipped(Area.STATE, f"STATE_DIR is not set: state is kept in {where}")])
