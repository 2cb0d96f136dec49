"""Reads the settings from environment variables, and tells every problem at once."""

import difflib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
from msgspec import inspect

from viralfx.domain.errors import ConfigurationError
from viralfx.settings.model import Secret, Settings

_PREFIXES = ("DB_", "REDIS_", "SHUTDOWN_", "HEALTH_", "POOL_", "JOB_", "QUEUE")
_SERVICE_LINK = re.compile(
    r"\w+_SERVICE_HOST|\w+_SERVICE_PORT(_\w+)?|\w+_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?"
)
_BACKENDS = ("DATABASE_URL", "REDIS_HOST", "REDIS_SENTINEL_ENABLED")


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Read the settings; an empty variable counts as not set.

    Raises :class:`ConfigurationError` that lists every problem, each naming the variable and
    what to do. A value is shown only when it is not a secret.
    """
    values: dict[str, Any] = {}
    failed: set[str] = set()
    problems = list(_unknown(environ))
    for field in fields():
        try:
            raw = _raw(field.variable, environ)
            if raw is not None:
                values[field.name] = field.parse(raw)
        except ValueError as error:
            failed.add(field.name)
            problems.append(f"{field.variable}: {error}")
    settings = Settings(**values)
    problems.extend(settings.contradictions(failed))
    if problems:
        raise ConfigurationError(problems)
    return settings


def _is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes injected this for a Service that happens to have such a name."""
    injected_port = name.endswith("_PORT") and value.startswith(("tcp://", "udp://", "sctp://"))
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
            # A word from another family is no help: DB_HOST is not a misspelt HOST.
            family = [other for other in known if other.startswith(name[:3])]
            close = difflib.get_close_matches(plain, family, n=1)
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
        if not text:
            raise ValueError(f"{raw!r} is not {self.allowed}")
        value: object = text
        if isinstance(self.type, inspect.VarTupleType):
            names = [part for part in map(str.strip, text.split(",")) if part]
            value = [] if names == ["none"] and not self.type.min_length else names
        if isinstance(self.type, inspect.IntType) and not re.fullmatch(r"[0-9]{1,18}", text):
            raise ValueError(f"{raw!r} is not {self.allowed}")
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
            case inspect.IntType(ge=low, le=high):
                return f"a whole number from {low} to {high}"
            case inspect.VarTupleType(min_length=at_least):
                return "a list of names like one,two" + ("" if at_least else ", or none")
            case _:
                return "a text that is not empty"


def source(variable: str, environ: Mapping[str, str]) -> str:
    """Say where a variable's value comes from: environment, a file, or the default."""
    value = environ.get(variable, "")
    if value and not _is_service_link(variable, value):
        return "environment"
    path = environ.get(f"{variable}_FILE")
    return f"file {path}" if path else "default"


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
