"""Reads the settings from environment variables, and tells every problem at once."""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from viralfx.domain.errors import ConfigurationError
from viralfx.settings.backends import POOL_PROFILES
from viralfx.settings.database_url import IMPLIED, DatabaseAddress, parse_database_url
from viralfx.settings.fields import Field, assemble, fields, show
from viralfx.settings.kinds import Secret
from viralfx.settings.model import Settings

_PREFIXES = ("DB_", "REDIS_", "SHUTDOWN_", "HEALTH_", "POOL_", "JOB_", "QUEUE")
_SERVICE_LINK = re.compile(
    r"\w+_SERVICE_HOST|\w+_SERVICE_PORT(_\w+)?|\w+_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?"
)


def read_settings(environ: Mapping[str, str], *, with_api: bool = False) -> Settings:
    """Read the settings; an empty variable counts as not set.

    ``with_api`` is for a process that serves the jobs API: production asks more of it.

    Raises :class:`ConfigurationError` that lists every problem, each naming the variable and
    what to do. A value is shown only when it is not a secret.
    """
    reading = _read(environ)
    given = reading.values
    settings = assemble({f.path: given[f.variable] for f in fields() if f.variable in given})
    problems = [
        *_unknown(environ),
        *reading.problems,
        *settings.contradictions(reading.failed, with_api=with_api),
    ]
    if problems:
        raise ConfigurationError(problems)
    return settings


def source(variable: str, environ: Mapping[str, str]) -> str:
    """Say where a value comes from: environment, a file, another variable, or the default."""
    return _read(environ).sources.get(variable, "default")


def given(environ: Mapping[str, str]) -> frozenset[str]:
    """Return the variables that are set themselves: directly, or by the file that they name."""
    sources = _read(environ).sources
    return frozenset(
        name for name, where in sources.items() if where.startswith(("environment", "file "))
    )


@dataclass(slots=True)
class _Reading:
    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def take(self, one: Field, raw: str, source: str) -> None:
        try:
            self.values[one.variable] = one.parse(raw)
            self.sources[one.variable] = source
        except ValueError as error:
            self.fail(one.variable, f"{one.variable}: {error}")

    def fail(self, variable: str, problem: str) -> None:
        self.failed.add(variable)
        self.problems.append(problem)


def _read(environ: Mapping[str, str]) -> _Reading:
    reading = _Reading()
    for one in fields():
        try:
            raw, source = _raw(one.variable, environ)
        except ValueError as error:
            reading.fail(one.variable, f"{one.variable}: {error}")
            continue
        if raw is not None:
            reading.take(one, raw, source)
    _imply_from_url(reading)
    _imply_from_profile(reading)
    _imply_verification(reading)
    for one in fields():
        if one.variable.endswith("_CA_FILE") and one.variable in reading.values:
            _check_readable(reading, one.variable)
    return reading


def _imply_from_url(reading: _Reading) -> None:
    """Let the parameters of DATABASE_URL speak for variables that say nothing."""
    url = reading.values.get("DATABASE_URL")
    try:
        address = parse_database_url(url.value) if isinstance(url, Secret) else None
    except ValueError:
        return  # told with the contradictions
    if address is None:
        return
    for parameter, text in address.implied.items():
        one = _field(IMPLIED[parameter])
        try:
            value = one.parse(text)
        except ValueError as error:
            reading.fail("DATABASE_URL", f"DATABASE_URL: {parameter}: {error}")
            continue
        if one.variable not in reading.values.keys() | reading.failed:
            reading.values[one.variable] = value
            reading.sources[one.variable] = "DATABASE_URL"
        elif (own := reading.values.get(one.variable, value)) != value:
            problem = f"{show(own)} contradicts {parameter} in DATABASE_URL, {text}; keep one"
            reading.fail(one.variable, f"{one.variable}: {problem}")
    _check_one_password(reading, address)


def _check_one_password(reading: _Reading, address: DatabaseAddress) -> None:
    own = reading.values.get("DB_PASSWORD")
    if own is not None and address.password is not None and own.value != address.password:
        reading.fail("DB_PASSWORD", "DB_PASSWORD: DATABASE_URL holds another password; keep one")


def _imply_from_profile(reading: _Reading) -> None:
    profile = reading.values.get("POOL_PROFILE")
    if profile is None:
        return
    for variable, size in zip(("DB_POOL_MIN", "DB_POOL_MAX"), POOL_PROFILES[profile], strict=True):
        if variable not in reading.values.keys() | reading.failed:
            reading.take(_field(variable), str(size), "POOL_PROFILE")


def _imply_verification(reading: _Reading) -> None:
    """Verify where there is something to verify with: nobody names a CA file for less."""
    named = "DB_TLS_CA_FILE" in reading.values
    if named and "DB_TLS_MODE" not in reading.values.keys() | reading.failed:
        reading.take(_field("DB_TLS_MODE"), "verify-full", "DB_TLS_CA_FILE")


def _check_readable(reading: _Reading, variable: str) -> None:
    path = Path(reading.values[variable])
    try:
        path.read_bytes()
    except OSError as error:
        reading.fail(variable, f"{variable}: cannot read {path}: {error.strerror}")


def _field(variable: str) -> Field:
    return next(one for one in fields() if one.variable == variable)


def _is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes injected this for a Service that happens to have such a name."""
    injected_port = name.endswith("_PORT") and value.startswith(("tcp://", "udp://", "sctp://"))
    return injected_port or _SERVICE_LINK.fullmatch(name) is not None


def _unknown(environ: Mapping[str, str]) -> Iterator[str]:
    known = {one.variable for one in fields()}
    for name, value in sorted(environ.items()):
        plain = name.removesuffix("_FILE")
        if {plain, name} & known or not value or _is_service_link(name, value):
            continue
        if name.startswith(_PREFIXES):
            # A word from another family is no help: DB_HOST is not a misspelt HOST.
            family = [other for other in known if other.startswith(name[:3])]
            close = difflib.get_close_matches(plain, family, n=1)
            hint = f"; did you mean {close[0]}?" if close else "; `viralfx env` lists what is known"
            yield f"{name}: unknown variable{hint}"


def _raw(variable: str, environ: Mapping[str, str]) -> tuple[str | None, str]:
    value, path = environ.get(variable, ""), environ.get(f"{variable}_FILE", "")
    if value and _is_service_link(variable, value):
        value = ""
    if value and path:
        raise ValueError(f"set either {variable} or {variable}_FILE, not both")
    if not path:
        return value or None, "environment"
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(f"cannot read {variable}_FILE={path}: {why}") from None
    return content.rstrip("\r\n") or None, f"file {path}"
