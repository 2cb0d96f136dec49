"""The settings one by one, as the loader and ``viralfx env`` see them."""

import operator
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, get_type_hints

import msgspec
from msgspec import inspect

from viralfx.settings.kinds import Secret
from viralfx.settings.model import Settings


class Field(msgspec.Struct, frozen=True):
    """One setting."""

    path: tuple[str, ...]
    """Where it is in :class:`Settings`: the names of its group, if any, and its own."""
    type: inspect.Type
    default: object
    meaning: str
    example: str | None
    secret: bool
    """Whether the value is masked wherever it is shown."""

    @property
    def variable(self) -> str:
        """The environment variable's name."""
        return "_".join(self.path).upper()

    def of(self, settings: Settings) -> object:
        """Return this setting's value."""
        value: object = operator.attrgetter(".".join(self.path))(settings)
        return value

    def parse(self, raw: str) -> object:
        """Turn the variable's text into the value.

        Raises ``ValueError`` saying what is allowed.
        """
        if self.secret:
            if not raw.strip():
                raise ValueError("a secret of nothing but spaces is none; set one, or unset it")
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
            return msgspec.convert(value, _hint(self.path), strict=False)
        except msgspec.ValidationError:
            shown = "that" if self.may_hold_a_secret(text) else repr(raw)
            raise ValueError(f"{shown} is not {self.allowed}") from None

    @staticmethod
    def may_hold_a_secret(text: str) -> bool:
        """Whether a refused text looks like an address with credentials in it."""
        return "@" in text or "://" in text

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
                what = f"like {self.example}" if self.example else "of names like one,two"
                return f"a list {what}" + ("" if at_least else ", or none")
            case inspect.StrType(pattern=str()):
                return (
                    "the name or address of a host alone; the rest has variables of its own:"
                    " REDIS_PORT, REDIS_USERNAME, REDIS_PASSWORD, REDIS_DB, REDIS_TLS_ENABLED"
                )
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
    return tuple(_fields_of(Settings, ()))


def assemble(values: Mapping[tuple[str, ...], object]) -> Settings:
    """Make the settings from values by their fields' paths; what is missing has its default."""
    own: dict[str, Any] = {path[0]: value for path, value in values.items() if len(path) == 1}
    for name, kind in get_type_hints(Settings).items():
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind is not Secret:
            group = {path[1]: v for path, v in values.items() if path[0] == name and path[1:]}
            own[name] = kind(**group)
    return Settings(**own)


def _fields_of(struct: type[msgspec.Struct], prefix: tuple[str, ...]) -> Iterator[Field]:
    kind = inspect.type_info(struct)
    assert isinstance(kind, inspect.StructType)  # noqa: S101 - narrows for the type checker
    for field in kind.fields:
        path = (*prefix, field.name)
        if isinstance(field.type, inspect.StructType):
            yield from _fields_of(field.type.cls, path)
        else:
            yield _field(path, field)


def _field(path: tuple[str, ...], field: inspect.Field) -> Field:
    kind, meaning = _unwrapped(field.type)
    secret = False
    if isinstance(kind, inspect.UnionType):
        # Every union here is "some type, or None while it is not set".
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
