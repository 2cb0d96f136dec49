"""Reads the settings from environment variables and reports all problems at once."""

import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
from msgspec import inspect

from viralfx.core.errors import ConfigurationError, Problem, edits, suggest
from viralfx.settings import platform
from viralfx.settings.dsn import (
    IMPLIED,
    DatabaseAddress,
    is_other_database,
    parse_database_url,
)
from viralfx.settings.groups import (
    POOL_PROFILES,
    REDIS_SCHEMES,
    Secret,
    WebhookSettings,
    parse_redis_url,
)
from viralfx.settings.model import (
    CONSOLE_WORDS,
    DATABASE_URLS,
    LOG_LEVELS,
    SHAPES,
    Settings,
    near_miss,
    show,
)

_WORDS: Mapping[str, Mapping[str, str]] = {"LOG_LEVEL": LOG_LEVELS, "CONSOLE": CONSOLE_WORDS}


class Field(msgspec.Struct, frozen=True):
    """One setting."""

    path: tuple[str, ...]
    """Attribute path in :class:`Settings`: the name of its group, if any, and its own."""
    type: inspect.Type
    default: object
    meaning: str
    example: str | None
    secret: bool
    """True if the value is masked in all output."""

    @property
    def variable(self) -> str:
        """The environment variable's name."""
        return "_".join(self.path).upper()

    def of(self, settings: Settings) -> object:
        """Return this setting's value."""
        if self.variable == "QUEUES":
            return settings.queue_entries
        value: object = operator.attrgetter(".".join(self.path))(settings)
        return value

    def parse(self, raw: str) -> object:
        """Convert the variable's text into the value.

        Raises ``ValueError`` with the allowed values.
        """
        if self.secret:
            if not raw.strip():
                raise ValueError("consists of spaces only; set a secret, or unset it")
            return Secret(raw)
        text = raw.strip()
        if not text:
            raise ValueError(f"{raw!r} is not {self.allowed}")
        value: object = text
        if isinstance(self.type, inspect.LiteralType):
            words = _WORDS.get(self.variable, {})
            value = words.get(text.lower(), text.lower())
        if isinstance(self.type, inspect.VarTupleType):
            names = [part for part in map(str.strip, text.split(",")) if part]
            value = [] if names == ["none"] and not self.type.min_length else names
        if isinstance(self.type, inspect.IntType | inspect.FloatType):
            value = self._number(text)
        try:
            return msgspec.convert(value, _hint(self.path), strict=False)
        except msgspec.ValidationError:
            shown = "that" if self.may_hold_a_secret(text) else repr(raw)
            raise ValueError(f"{shown} is not {self.allowed}") from None

    def _number(self, text: str) -> float:
        if not re.fullmatch(r"0|[1-9][0-9]{0,17}", text):
            raise ValueError(f"{text!r} is not {self.allowed}")
        # Every such setting with a fraction is a duration.
        return int(text) / 1000 if isinstance(self.type, inspect.FloatType) else int(text)

    @staticmethod
    def may_hold_a_secret(text: str) -> bool:
        """Return True if an invalid text looks like an address with credentials."""
        return "@" in text or "://" in text

    @property
    def allowed(self) -> str:
        """The allowed values, in words."""
        match self.type:
            case inspect.LiteralType(values=values):
                return "one of " + ", ".join(map(str, values))
            case inspect.BoolType():
                return "true or false"
            case inspect.IntType(ge=low, le=high) | inspect.FloatType(ge=low, le=high):
                return f"a whole number from {show(low)} to {show(high)}"
            case inspect.VarTupleType(min_length=at_least):
                what = f"like {self.example}" if self.example else "of names like one,two"
                return f"a list {what}" + ("" if at_least else ", or none")
            case inspect.StrType(pattern=str()):
                return SHAPES[self.variable]
            case _:
                return "a text that is not empty"


@cache
def fields() -> tuple[Field, ...]:
    """All settings, in the order of the documentation."""
    return tuple(_fields_of(Settings, ()))


def assemble(given: Mapping[str, object]) -> Settings:
    """Build the settings from values by variable; missing ones get their defaults."""
    values = {f.path: given[f.variable] for f in fields() if f.variable in given}
    own: dict[str, Any] = {path[0]: value for path, value in values.items() if len(path) == 1}
    for name, kind in get_type_hints(Settings).items():
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind is not Secret:
            group = {path[1]: v for path, v in values.items() if path[0] == name and path[1:]}
            own[name] = kind(**group)
    return Settings(**own)


def _fields_of(struct: type[msgspec.Struct], prefix: tuple[str, ...]) -> Iterator[Field]:
    kind = inspect.type_info(struct)
    assert isinstance(kind, inspect.StructType)  # noqa: S101 - narrows for the type checker
    for one in kind.fields:
        if one.name in ("warnings", "queue_concurrency"):
            continue
        path = (*prefix, one.name)
        if isinstance(one.type, inspect.StructType):
            yield from _fields_of(one.type.cls, path)
        else:
            yield _field(path, one)


def _field(path: tuple[str, ...], field: inspect.Field) -> Field:
    kind, meaning = _unwrapped(field.type)
    secret = False
    if isinstance(kind, inspect.UnionType):
        # Every union here is "some type, or None if unset".
        some = next(t for t in kind.types if not isinstance(t, inspect.NoneType))
        kind, _ = _unwrapped(some)
        secret = isinstance(kind, inspect.StructType) and kind.cls is Secret
    example = None
    if isinstance(kind, inspect.VarTupleType) and isinstance(kind.item_type, inspect.Metadata):
        example = (kind.item_type.extra_json_schema or {}).get("examples", [None])[0]
    return Field(path, kind, field.default, meaning, example, secret)


def _unwrapped(kind: inspect.Type) -> tuple[inspect.Type, str]:
    meaning = ""
    while isinstance(kind, inspect.Metadata):
        meaning = (kind.extra_json_schema or {}).get("description", meaning)
        kind = kind.type
    return kind, meaning


@cache
def _hint(path: tuple[str, ...]) -> object:
    owner: Any = Settings
    for name in path[:-1]:
        owner = get_type_hints(owner)[name]
    return get_type_hints(owner, include_extras=True)[path[-1]]


_MIN_CHARACTERS = 8
"""Shorter unknown names are not judged: two edits make another word of them."""
_MAX_EDITS = 2
_OF_OTHERS = ("HOST", "PORT", "LOG_LEVEL", "LOG_FORMAT", "CONSOLE", "ACCESS_LOG", "RUNBOOK_URL")
"""Variables with other meanings for other programs, whose default serves an application."""


def read_settings(
    environ: Mapping[str, str],
    *,
    env_prefix: str = "",
    strict: bool = False,
    with_api: bool = False,
    with_tasks: bool = False,
    authorizes: bool = False,
) -> Settings:
    """Read the settings; an empty variable counts as not set.

    ``env_prefix`` is the beginning of all names: with ``OPS_``, only ``OPS_DATABASE_URL`` and so on
    are read. ``strict``: the environment is that of a program of this package, so an unknown name
    that is probably a typing error is a problem, and so is the address of another kind of database.
    Otherwise an application shares the environment, and a value that is not meant for this package
    is ignored, with a line in ``Settings.warnings`` where a setting has no effect; an ENVIRONMENT
    that is close to a known word has such a line and is production; that of QUEUES is ignored
    only without ``with_tasks``: the application has tasks. ``with_api``: the process serves the
    jobs API, for which production requires a token and a database; ``authorizes``: a function of
    the application names the callers, so there need be no token.

    Raises :class:`ConfigurationError` with every problem; each names the variable and the remedy.
    Secret values are not shown.
    """
    if env_prefix:
        environ = {
            name.removeprefix(env_prefix): value
            for name, value in environ.items()
            if name.startswith(env_prefix) or name in platform.NAMES
        }
    reading = _read(environ, strict=strict, tasks=with_tasks)
    settings = assemble(reading.values)
    problems: list[Problem | str] = [
        *(typing_errors(environ, env_prefix) if strict else ()),
        *reading.problems,
        *settings.contradictions(
            reading.failed, with_api=with_api, judge_environment=strict, authorizes=authorizes
        ),
    ]
    if problems:
        raise ConfigurationError(prefixed(str(each), env_prefix) for each in problems)
    warnings = tuple(prefixed(str(each), env_prefix) for each in reading.warnings)
    return msgspec.structs.replace(settings, warnings=warnings) if warnings else settings


def prefixed(line: str, prefix: str) -> str:
    """Return a message with the names of variables as the environment has them."""
    if not prefix:
        return line
    names = "|".join(sorted((one.variable for one in fields()), key=len, reverse=True))
    return re.sub(rf"\b(?:{names})(?:_FILE)?\b", lambda found: prefix + found[0], line)


def sources(environ: Mapping[str, str]) -> Mapping[str, str]:
    """Return the origins of the values that are no default: environment, a file or a variable."""
    return _read(environ).sources


def given(environ: Mapping[str, str]) -> frozenset[str]:
    """Return the variables that are set directly or through their ``_FILE`` variable."""
    sources = _read(environ).sources
    return frozenset(
        name for name, where in sources.items() if where.startswith(("environment", _FILE))
    )


_FILE = "file "
"""Begins the source of a value that a variable ``*_FILE`` names."""


@dataclass(slots=True)
class _Reading:
    strict: bool = False
    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)

    def parse(self, one: Field, raw: str, source: str) -> None:
        try:
            value = one.parse(raw)
            if isinstance(value, Secret) and source.startswith(_FILE):
                value = Secret(value.value, file=source.removeprefix(_FILE))
            self.values[one.variable] = value
            self.sources[one.variable] = source
        except ValueError as error:
            self.fail(one.variable, str(error))

    def fail(self, variable: str, text: str) -> None:
        self.failed.add(variable)
        self.problems.append(Problem.of_text(variable, text))

    def warn(self, variable: str, text: str) -> None:
        self.warnings.append(Problem.of_text(variable, text))

    def take_unknown(self, variable: str, lines: Iterable[str]) -> None:
        """Take down unknown parameters of an address; an application has other clients for it."""
        for line in lines:
            if self.strict:
                self.fail(variable, line)
            else:
                self.warn(variable, f"ignored {line.removesuffix('; remove it')}")

    def is_open(self, variable: str) -> bool:
        """Return True if nothing has set the variable, so that another one may imply it."""
        return variable not in self.values.keys() | self.failed

    def ignore(self, variable: str, reason: str) -> None:
        """Treat a variable as not set, with a warning."""
        for found in (self.values, self.sources):
            found.pop(variable, None)
        self.warn(variable, f"ignored, because {reason}")


def _read(environ: Mapping[str, str], *, strict: bool = False, tasks: bool = False) -> _Reading:
    reading = _Reading(strict)
    for one in fields():
        try:
            raw, source = _raw(one.variable, environ)
        except ValueError as error:
            reading.fail(one.variable, str(error))
            continue
        if raw is not None:
            reading.parse(one, raw, source)
    if not strict:
        if problem := near_miss(reading.values.get("ENVIRONMENT", Settings().environment)):
            reading.warnings.append(Problem.of_line(problem))
        _ignore_foreign(reading, tasks=tasks or "TASK_MODULES" in reading.values)
    for variable in DATABASE_URLS:
        _imply_from_url(reading, variable)
    _imply_from_redis_url(reading)
    _imply_from_profile(reading)
    _imply_from_pool_max(reading)
    _imply_verification(reading)
    if environ.get(platform.KUBERNETES):
        _imply_readiness_delay(reading)
    _warn_about_addresses(reading)
    for one in fields():
        if one.variable.startswith(("DB_TLS_", "REDIS_TLS_")) and one.variable.endswith("_FILE"):
            _check_readable(reading, one.variable)
    return reading


_SIGNING_KEYS = {
    "WEBHOOK_SECRET": "secret",
    "WEBHOOK_SHARED_SECRET": "shared_secret",
    "WEBHOOK_KEYS": "keys",
    "ALERT_WEBHOOK_SECRET": "secret",
}
"""Variables with signing keys, and the field of :class:`WebhookSettings` whose form they have."""


def _ignore_foreign(reading: _Reading, *, tasks: bool) -> None:
    """Ignore values that are meant for the application or its server."""
    for variable in DATABASE_URLS:
        if variable in reading.values and is_other_database(reading.values[variable].value):
            kept = ", and data is kept in memory" if variable == "DATABASE_URL" else ""
            reading.ignore(variable, f"it is the address of another kind of database{kept}")
    url: str = reading.values.get("REDIS_URL", Secret("redis:")).value
    scheme = url.strip().partition(":")[0].lower()
    if scheme not in REDIS_SCHEMES and not suggest(scheme, REDIS_SCHEMES, cutoff=0.8):
        reading.ignore("REDIS_URL", "it is not an address of a single Redis")
    if not reading.values.get("RUNBOOK_URL", "https://").startswith(("https://", "http://")):
        reading.ignore("RUNBOOK_URL", "it is not the address of a page")
    if all(map(reading.is_open, ("WEBHOOK_ALLOWED_HOSTS", "ALERT_WEBHOOK_URL"))):
        for variable, field in _SIGNING_KEYS.items():
            secret = reading.values.get(variable)
            if secret and any(WebhookSettings(**{field: secret}).contradictions()):
                reading.ignore(variable, "it is not a signing key, and no webhooks are configured")
    for variable in (*_OF_OTHERS, *(() if tasks else ("QUEUES",))):
        if variable in reading.failed:
            reading.failed.discard(variable)
            (problem,) = [each for each in reading.problems if each.variable == variable]
            reading.problems.remove(problem)
            reading.ignore(variable, str(problem._replace(variable="")))


_OF_CONNECTION = ("sslmode", "sslrootcert", "sslcert", "sslkey")
"""Parameters that each address may repeat; others belong into DATABASE_URL."""


def _address(reading: _Reading, variable: str) -> DatabaseAddress | None:
    url = reading.values.get(variable)
    try:
        return parse_database_url(url.value) if isinstance(url, Secret) else None
    except ValueError:
        return None  # reported with the contradictions


def _imply_from_url(reading: _Reading, url: str) -> None:
    """Set variables that are unset from the parameters of an address."""
    if (address := _address(reading, url)) is None:
        return
    for parameter, text in address.implied.items():
        one = _field_of(IMPLIED[parameter])
        try:
            value = one.parse(text)
        except ValueError as error:
            reading.fail(url, f"{parameter}: {error}")
            continue
        own = reading.values.get(one.variable, value)
        if reading.is_open(one.variable) and (url == "DATABASE_URL" or parameter in _OF_CONNECTION):
            reading.values[one.variable] = value
            reading.sources[one.variable] = url
        elif url != "DATABASE_URL" and parameter not in _OF_CONNECTION:
            reading.warn(url, f"{parameter} has no effect; set {one.variable}")
        elif own != value:
            problem = f"{show(own)} contradicts {parameter} in {url}, {text}; keep one"
            reading.fail(one.variable, problem)
    password = reading.values.get("DB_PASSWORD")
    if url == "DATABASE_URL" and password and address.password not in {None, password.value}:
        reading.fail("DB_PASSWORD", "DATABASE_URL holds another password; keep one")


def _imply_from_redis_url(reading: _Reading) -> None:
    """Set the variables that are unset from REDIS_URL."""
    url = reading.values.get("REDIS_URL")
    unknown: list[str] = []
    try:
        implied = {} if url is None else parse_redis_url(url.value, unknown)
    except ValueError as error:
        reading.fail("REDIS_URL", str(error))
        return
    reading.take_unknown("REDIS_URL", unknown)
    places = ("REDIS_HOST", "REDIS_SOCKET")
    if not all(map(reading.is_open, places)):
        implied = {name: text for name, text in implied.items() if name not in places}
    for variable, text in implied.items():
        if not reading.is_open(variable):
            if variable == "REDIS_TLS_ENABLED" and reading.values.get(variable) is False:
                what = "REDIS_TLS_ENABLED=false overrides rediss:// in REDIS_URL: there is no TLS"
                reading.warnings.append(Problem("", what, "remove REDIS_TLS_ENABLED"))
            continue
        one = _field_of(variable)
        try:
            reading.values[variable] = one.parse(text)
            reading.sources[variable] = "REDIS_URL"
        except ValueError:
            reading.fail("REDIS_URL", f"{variable} would not be {one.allowed}")


def _warn_about_addresses(reading: _Reading) -> None:
    for variable in DATABASE_URLS:
        if (address := _address(reading, variable)) is None:
            continue
        reading.take_unknown(variable, address.unknown)
        reading.warnings += [Problem.of_text(variable, text) for text in address.warnings]
        if address.channel_binding and reading.values.get("DB_TLS_MODE") != "verify-full":
            reading.warn(
                variable,
                "channel_binding=require has no effect, because the driver cannot bind the channel;"
                " set DB_TLS_MODE=verify-full, which verifies the server instead",
            )


def _imply_from_profile(reading: _Reading) -> None:
    profile = reading.values.get("POOL_PROFILE")
    if profile is None:
        return
    for variable, size in zip(("DB_POOL_MIN", "DB_POOL_MAX"), POOL_PROFILES[profile], strict=True):
        if reading.is_open(variable):
            reading.parse(_field_of(variable), str(size), "POOL_PROFILE")


def _imply_from_pool_max(reading: _Reading) -> None:
    """Lower the default of DB_POOL_MIN to DB_POOL_MAX."""
    most = reading.values.get("DB_POOL_MAX")
    if reading.is_open("DB_POOL_MIN") and most is not None and most < Settings().db.pool_min:
        reading.parse(_field_of("DB_POOL_MIN"), str(most), "DB_POOL_MAX")


def _imply_verification(reading: _Reading) -> None:
    """Default to ``verify-full`` if a CA file is set."""
    if "DB_TLS_CA_FILE" in reading.values and reading.is_open("DB_TLS_MODE"):
        reading.parse(_field_of("DB_TLS_MODE"), "verify-full", "DB_TLS_CA_FILE")


def _imply_readiness_delay(reading: _Reading) -> None:
    """Serve on for a while in a pod, because proxies send requests until they learn of its end."""
    one = _field_of("SHUTDOWN_READINESS_DELAY")
    if reading.is_open(one.variable):
        s = assemble(reading.values)
        others = (s.shutdown_drain_timeout, s.shutdown_state_timeout, s.shutdown_connection_timeout)
        delay = platform.readiness_delay(s.shutdown_force_timeout - sum(others))
        reading.parse(one, show(delay), platform.KUBERNETES)


def _check_readable(reading: _Reading, variable: str) -> None:
    if variable not in reading.values:
        return
    path = Path(reading.values[variable])
    try:
        path.read_bytes()
    except OSError as error:
        reading.fail(variable, f"cannot read {path}: {error.strerror}")


def _field_of(variable: str) -> Field:
    return next(one for one in fields() if one.variable == variable)


def unknown_names(environ: Mapping[str, str]) -> list[str]:
    """Return the names that are set and that no setting reads; service links are left out."""
    known = {one.variable for one in fields()} | platform.NAMES
    return [
        name
        for name, value in sorted(environ.items())
        if value
        and not {name, name.removesuffix("_FILE")} & known
        and not platform.is_service_link(name, value)
    ]


def typing_errors(environ: Mapping[str, str], prefix: str = "") -> Iterator[Problem]:
    """Yield a problem for each unknown name, behind its prefix, within two edits of a known one."""
    known = [one.variable for one in fields()]
    known += [f"{name}_FILE" for name in known]
    for name in unknown_names(environ):
        if len(name.removesuffix("_FILE")) < _MIN_CHARACTERS:
            continue
        near = [other for other in known if abs(len(other) - len(name)) <= _MAX_EDITS]
        found = [(edits(name, other, limit=_MAX_EDITS), other) for other in near]
        distance, close = min(found, default=(_MAX_EDITS + 1, ""))
        if distance <= _MAX_EDITS:
            yield Problem(f"{prefix}{name}", "unknown variable", f"did you mean {close}?")


def _raw(variable: str, environ: Mapping[str, str]) -> tuple[str | None, str]:
    value, path = environ.get(variable, ""), environ.get(f"{variable}_FILE", "")
    if value and platform.is_service_link(variable, value):
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
    return content.rstrip("\r\n") or None, f"{_FILE}{path}"
