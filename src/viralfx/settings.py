"""Settings from the environment: every variable, its default, its meaning, all problems at once."""

import difflib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgspec
from msgspec import Meta, inspect

from viralfx.domain.errors import ConfigurationError
from viralfx.domain.shutdown import ShutdownBudgets

Milliseconds = Annotated[int, Meta(ge=0)]
PositiveMilliseconds = Annotated[int, Meta(ge=1)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Names = tuple[Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_-]*$")], ...]


class Secret(msgspec.Struct, frozen=True):
    """A value that never shows itself: not in a log, a traceback or ``viralfx env``."""

    value: str

    def __repr__(self) -> str:
        return "Secret('***')"


def _meaning(text: str) -> Meta:
    return Meta(description=text)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that can be set. A field's name in capitals is its environment variable."""

    host: Annotated[str, _meaning("Address the API listens on")] = "0.0.0.0"  # noqa: S104 - a pod's
    port: Annotated[Port, _meaning("Port of the API; 0 takes any free one")] = 3000
    management_port: Annotated[
        Port | None,
        _meaning("Second port for health and shutdown that closes last; unset: none"),
    ] = None
    management_token: Annotated[
        Secret | None,
        _meaning("Bearer token for /health/shutdown, and for details when authorized"),
    ] = None
    environment: Annotated[
        str, Meta(min_length=1), _meaning("Name of the environment, shown by /health")
    ] = "development"
    allow_memory_adapters: Annotated[
        bool, _meaning("Let ENVIRONMENT=production run on memory adapters")
    ] = False
    log_level: Annotated[
        Literal["error", "warn", "log", "debug", "verbose"], _meaning("Least level that is logged")
    ] = "log"
    log_format: Annotated[
        Literal["json", "console"], _meaning("JSON lines, or text for people")
    ] = "json"
    state_dir: Annotated[
        str | None, _meaning("Folder that keeps state.json across restarts; unset: memory only")
    ] = None
    queues: Annotated[Names, Meta(min_length=1), _meaning("Names of the job queues")] = (
        "default",
        "notifications",
        "analytics",
    )

    health_check_interval: Annotated[
        PositiveMilliseconds, _meaning("Time between two attempts of a check")
    ] = 5000
    health_check_timeout: Annotated[
        PositiveMilliseconds, _meaning("Time after which an attempt is abandoned and fails")
    ] = 2000
    db_health_check_interval: Annotated[
        PositiveMilliseconds,
        _meaning("Time between two attempts of the database check while it passes"),
    ] = 30000
    health_failure_threshold: Annotated[
        int, Meta(ge=1), _meaning("Observations in a row before a check gets worse")
    ] = 1
    health_recovery_threshold: Annotated[
        int, Meta(ge=1), _meaning("Observations in a row before a check gets better")
    ] = 1
    health_critical: Annotated[
        Names, _meaning("Checks whose failure makes the service unhealthy")
    ] = ("database", "memory")
    health_details: Annotated[
        Literal["always", "authorized"], _meaning("Who may read /health/detailed and one check")
    ] = "always"
    readiness_requires: Annotated[Names, _meaning("Checks that must pass to be ready")] = (
        "database",
    )
    readiness_fail_open_after: Annotated[
        Milliseconds,
        _meaning("Ready again after failing so long on shared dependencies alone; 0: never"),
    ] = 0

    shutdown_readiness_delay: Annotated[
        Milliseconds, _meaning("Time readiness says no while still serving")
    ] = 0
    shutdown_drain_timeout: Annotated[
        Milliseconds, _meaning("Budget for requests and jobs in flight")
    ] = 30000
    shutdown_state_timeout: Annotated[Milliseconds, _meaning("Budget for saving state")] = 5000
    shutdown_connection_timeout: Annotated[
        Milliseconds, _meaning("Budget for closing connections")
    ] = 15000
    shutdown_force_timeout: Annotated[
        PositiveMilliseconds, _meaning("Time from the trigger after which the process is ended")
    ] = 60000
    shutdown_on_uncaught: Annotated[
        bool, _meaning("An uncaught exception starts the shutdown; false: it is only logged")
    ] = True

    @property
    def shutdown_budgets(self) -> ShutdownBudgets:
        """The shutdown times in seconds. Raises ``ValueError`` when they do not fit."""
        return ShutdownBudgets(
            readiness_delay=self.shutdown_readiness_delay / 1000,
            drain=self.shutdown_drain_timeout / 1000,
            state=self.shutdown_state_timeout / 1000,
            connections=self.shutdown_connection_timeout / 1000,
            force=self.shutdown_force_timeout / 1000,
        )

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> "Settings":
        """Read the settings; an empty variable counts as not set.

        Raises :class:`ConfigurationError` that lists every problem, each naming the variable and
        what to do. A value is shown only when it is not a secret.
        """
        values: dict[str, Any] = {}
        problems = list(_unknown(environ))
        for field in fields():
            try:
                raw = _raw(field.variable, environ)
                if raw is not None:
                    values[field.name] = field.parse(raw)
            except ValueError as error:
                problems.append(f"{field.variable}: {error}")
        settings = cls(**values)
        problems.extend(settings.contradictions())
        if problems:
            raise ConfigurationError(problems)
        return settings

    def contradictions(self) -> Iterator[str]:
        """Yield what is wrong with values that are right one by one."""
        try:
            _ = self.shutdown_budgets
        except ValueError as error:
            yield f"SHUTDOWN_FORCE_TIMEOUT: {error}; raise it, or lower a budget"
        if self.management_port and self.management_port == self.port:
            yield f"MANAGEMENT_PORT: {self.port} is PORT already; choose another"
        if self.health_details == "authorized" and self.management_token is None:
            yield "HEALTH_DETAILS: authorized needs MANAGEMENT_TOKEN to be set"
        if self.environment == "production" and not self.allow_memory_adapters:
            yield (
                "ENVIRONMENT: production refuses to keep its data in memory, and this version has"
                " memory adapters only; set ALLOW_MEMORY_ADAPTERS=true to accept the loss of all"
                " data at every stop"
            )


_PREFIXES = ("DB_", "REDIS_", "SHUTDOWN_", "HEALTH_", "POOL_", "JOB_", "QUEUE")
_SERVICE_LINK = re.compile(
    r"\w+_SERVICE_HOST|\w+_SERVICE_PORT(_\w+)?|\w+_PORT_\d+_(TCP|UDP)(_(PROTO|PORT|ADDR))?"
)
_BACKENDS = ("DATABASE_URL", "REDIS_HOST", "REDIS_SENTINEL_ENABLED")


def _is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes injected this for a Service that happens to have such a name."""
    injected_port = name.endswith("_PORT") and value.startswith(("tcp://", "udp://"))
    return injected_port or _SERVICE_LINK.fullmatch(name) is not None


def _unknown(environ: Mapping[str, str]) -> Iterator[str]:
    known = {field.variable for field in fields()}
    for name, value in sorted(environ.items()):
        plain = name.removesuffix("_FILE")
        if plain in known or not value or _is_service_link(name, value):
            continue
        if plain in _BACKENDS:
            yield f"{name}: this version keeps everything in memory; unset it"
        elif name.startswith(_PREFIXES):
            close = difflib.get_close_matches(plain, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else "; `viralfx env` lists what is known"
            yield f"{name}: unknown variable{hint}"


def _raw(variable: str, environ: Mapping[str, str]) -> str | None:
    value, path = environ.get(variable, ""), environ.get(f"{variable}_FILE", "")
    if value and _is_service_link(variable, value):
        value = ""
    if value and path:
        raise ValueError(f"set either {variable} or {variable}_FILE, not both")
    if not path:
        return value or None
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(f"cannot read {variable}_FILE={path}: {why}") from None
    return content.rstrip("\r\n") or None


class Field(msgspec.Struct, frozen=True):
    """One setting, as the loader and ``viralfx env`` see it."""

    name: str
    type: inspect.Type
    default: object
    meaning: str
    secret: bool
    """Whether the value is masked wherever it is shown."""

    @property
    def variable(self) -> str:
        """The environment variable's name."""
        return self.name.upper()

    def parse(self, raw: str) -> object:
        """Turn the variable's text into the value.

        Raises ``ValueError`` saying what is allowed.
        """
        if self.secret:
            return Secret(raw)
        text = raw.strip()
        value: object = text
        if isinstance(self.type, inspect.VarTupleType):
            names = [part for part in map(str.strip, text.split(",")) if part]
            value = [] if names == ["none"] and not self.type.min_length else names
        try:
            return msgspec.convert(value, _hint(self.name), strict=False)
        except msgspec.ValidationError:
            raise ValueError(f"{raw!r} is not {self.allowed}") from None

    @property
    def allowed(self) -> str:
        """What a value may be, in words."""
        match self.type:
            case inspect.LiteralType(values=values):
                return "one of " + ", ".join(map(str, values))
            case inspect.BoolType():
                return "true or false"
            case inspect.IntType(ge=low, le=None):
                return f"a whole number of {low} or more"
            case inspect.IntType(ge=low, le=high):
                return f"a whole number from {low} to {high}"
            case inspect.VarTupleType(min_length=at_least):
                return "a list of names like one,two" + ("" if at_least else ", or none")
            case _:
                return "a text that is not empty"


def show(value: object) -> str:
    """Write a value as it would stand in the environment; a secret as ``***``."""
    match value:
        case None:
            return ""
        case Secret():
            return "***"
        case bool():
            return str(value).lower()
        case ():
            return "none"
        case tuple():
            return ",".join(value)
        case _:
            return str(value)


@cache
def fields() -> tuple[Field, ...]:
    """Every setting, in the order of documentation."""
    struct = inspect.type_info(Settings)
    assert isinstance(struct, inspect.StructType)  # noqa: S101 - narrows for the type checker
    return tuple(_field(field) for field in struct.fields)


def _field(field: inspect.Field) -> Field:
    meaning, kind = "", field.type
    while isinstance(kind, inspect.Metadata):
        meaning = (kind.extra_json_schema or {}).get("description", meaning)
        kind = kind.type
    secret = False
    if isinstance(kind, inspect.UnionType):
        # Every union here is "some type, or None while it is not set".
        kind = next(t for t in kind.types if not isinstance(t, inspect.NoneType))
        secret = isinstance(kind, inspect.StructType) and kind.cls is Secret
    return Field(field.name, kind, field.default, meaning, secret)


@cache
def _hint(name: str) -> object:
    return get_type_hints(Settings, include_extras=True)[name]
