"""The codec of payloads, results and cached values: msgspec, and Pydantic for its own types.

It never imports Pydantic (ADR-0072). An application that declares a type of Pydantic has imported
it.
"""

import sys
from abc import ABCMeta
from collections.abc import (
    AsyncIterable,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import suppress
from dataclasses import is_dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import lru_cache, partial
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NewType,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)
from uuid import UUID

import msgspec

from viralfx.core.errors import text_of
from viralfx.jobs.codec import MAX_NESTING_LEVELS, PayloadError, ResultError, is_too_deep

_Schema = dict[str, Any]
_check_syntax = msgspec.json.Decoder(msgspec.Raw).decode


class MsgspecCodec:
    """Implements :class:`viralfx.jobs.codec.Codec`, and the ``ValueCodec`` of the cache.

    A type with a type of Pydantic in it is Pydantic's, as in FastAPI. If it also has a ``Struct``,
    it is msgspec's, which hands the models in it to Pydantic. Any other type is msgspec's.

    msgspec is strict: it does not accept text as a number. Error messages name the position as a
    path that starts with ``$``, the payload. Each type has one decoder.
    """

    def __init__(self) -> None:
        self._decoders: dict[object, msgspec.json.Decoder[Any]] = {}
        self._pydantic: dict[object, _PydanticType | TypeError | None] = {}
        self._encode, self._encode_to_read = (
            msgspec.json.Encoder(enc_hook=partial(self._encode_object, round_trip=each)).encode
            for each in (True, False)
        )

    def learn(self, type_: Any) -> None:
        """Prepare the decoder of a type. Raises ``TypeError`` for an unsupported type."""
        if self._pydantic_type(type_) is None:
            self._decoder(type_)

    def learn_result(self, type_: Any) -> None:
        """Raise ``TypeError`` for a type of results that is known to have no JSON."""
        for part in _parts(type_, of_models=True):
            _require_current(part)
        for part in filter(_is_class, _parts(type_, fields=False)):
            if not (_is_of_pydantic(part) or _may_have_json(part)):
                raise TypeError(
                    f"msgspec encodes no {part.__qualname__}; return a dict, a dataclass or a model"
                )

    def decode(self, payload: bytes, type_: Any) -> Any:
        """Decode a payload. Raises :class:`PayloadError`."""
        if is_too_deep(payload):
            raise PayloadError(f"it is nested more than {MAX_NESTING_LEVELS} levels deep")
        try:
            if not payload.isascii():
                payload.decode()  # the decoder skips unknown fields without checking their encoding
            if (found := self._pydantic_type(type_)) is None:
                return self._decoder(type_).decode(payload)
            _check_syntax(payload)  # Pydantic accepts NaN, which no ledger could store
            return found.decode(payload)
        except msgspec.MsgspecError as error:
            raise PayloadError(str(error)) from None
        except UnicodeDecodeError:
            raise PayloadError("it is not UTF-8 text") from None
        except RecursionError:
            raise PayloadError("it is nested too deep for its type") from None
        except Exception:
            raise
        except BaseException as error:
            # From the code of the type: such an exception would end the process.
            raise PayloadError(f"its type raised {type(error).__name__}") from error

    def encode(self, value: object, type_: Any = Any, *, round_trip: bool = True) -> bytes:
        """Encode a value of a type. Raises :class:`ResultError` for any error of the objects in it.

        With ``round_trip`` the JSON is for :meth:`decode` with the same type. Without it is to be
        read: it has the computed fields of models, and secrets of Pydantic are masked.
        """
        try:
            document = self._encoded(value, type_, round_trip=round_trip)
            if isinstance(value, msgspec.Raw):
                self.decode(document, msgspec.Raw)  # the encoder does not look into it
        except BaseException as error:  # noqa: BLE001 - an object's own code may raise anything
            raise ResultError(f"{type(value).__name__} has no JSON: {text_of(error)}") from None
        if is_too_deep(document):
            raise ResultError(
                f"{type(value).__name__} has more than {MAX_NESTING_LEVELS} levels of JSON"
            )
        return document

    def schemas(self, types: Iterable[Any], prefix: str) -> tuple[list[_Schema | None], _Schema]:
        """Return the JSON Schema of each type, None without one, and the named schemas in them.

        ``prefix`` comes before their names in a reference.
        """
        known = list(types)
        models: dict[Any, _PydanticType] = {}
        wanted = [self._has_schema(each, models) for each in known]
        of_models, named = _schemas_of_models(models, prefix)
        of_msgspec, others = msgspec.json.schema_components(
            [each for each, has in zip(known, wanted, strict=True) if has and each not in models],
            schema_hook=lambda kind: _ANYTHING if kind is object else of_models[kind],
            ref_template=f"{prefix}{{name}}",
        )
        rest = iter(of_msgspec)
        found = [
            None if not has else of_models[each] if each in models else next(rest)
            for each, has in zip(known, wanted, strict=True)
        ]
        return found, {**named, **others}

    def _has_schema(self, type_: Any, models: "dict[Any, _PydanticType]") -> bool:
        """Return True if a type has a schema; add the types of Pydantic in it to ``models``."""

        def add(kind: Any) -> bool:
            if (found := self._pydantic_type(kind)) is None:
                return False
            found.adapter.json_schema()
            models[kind] = found
            return True

        def hook(kind: type) -> _Schema:
            if kind is object or add(kind):
                return _ANYTHING
            raise NotImplementedError

        try:
            if not add(type_):
                msgspec.json.schema_components([type_], schema_hook=hook)
        except Exception:  # noqa: BLE001 - of Pydantic, or TypeError: validators alone have none
            return False
        return True

    def _encoded(self, value: object, type_: Any, *, round_trip: bool) -> bytes:
        encode = self._encode if round_trip else self._encode_to_read
        try:
            found = self._pydantic_type(type_)
            if found is not None:
                return found.encode(value, round_trip=round_trip)
        except Exception:
            if round_trip:
                raise
            # A result may have another type than the task declares.
            with suppress(Exception):
                return encode(value)
            raise
        if hasattr(type(value), _SERIALIZER):  # msgspec would encode an object of a dataclass
            return bytes(self._encode_object(value, round_trip=round_trip))
        return encode(value)

    def _encode_object(self, value: object, *, round_trip: bool) -> msgspec.Raw:
        """Return the JSON of an object that msgspec does not know."""
        kind: Any = type(value)
        if (validator := getattr(kind, _VALIDATOR, None)) is not None:
            # Not by a type of its own, which would be kept: a model may be made at run time.
            document = _dumped(getattr(kind, _SERIALIZER).to_json, value, round_trip=round_trip)
            if round_trip and (_MASK in document or _class_may_lose(kind)):
                _require_all(value, validator.validate_json, document)
            return msgspec.Raw(document)
        if (found := self._pydantic_type(kind)) is not None:
            return msgspec.Raw(found.encode(value, round_trip=round_trip))
        raise TypeError(f"Encoding objects of type {kind.__name__} is unsupported")

    def _decode_object(self, kind: Any, value: Any) -> Any:
        """Return an object of a type that msgspec does not know."""
        if (found := self._pydantic_type(kind)) is None:
            return value  # the decoder compares its type
        try:
            return found.decode(msgspec.json.encode(value), kind.__name__)
        except PayloadError as error:
            raise ValueError(str(error)) from None  # the decoder adds the path to it

    def _decoder(self, type_: Any) -> "msgspec.json.Decoder[Any]":
        try:
            found = self._decoders.get(type_)
        except TypeError:  # an annotation that cannot be hashed
            return msgspec.json.Decoder(type_, dec_hook=self._decode_object)
        if found is None:
            found = msgspec.json.Decoder(type_, dec_hook=self._decode_object)
            self._decoders[type_] = found
        return found

    def _pydantic_type(self, type_: Any) -> "_PydanticType | None":
        """Return how Pydantic decodes and encodes a type, as the function of this name does."""
        try:
            found = self._pydantic[type_]
        except KeyError:
            try:
                found = _pydantic_type(type_)
            except TypeError as error:
                found = TypeError(*error.args)  # without the frames of this call
            self._pydantic[type_] = found
        except TypeError:  # an annotation that cannot be hashed
            return _pydantic_type(type_)
        if isinstance(found, TypeError):
            raise TypeError(*found.args)
        return found


# -- types ---------------------------------------------------------------------------------------

_PACKAGES = frozenset({"annotated_types", "pydantic", "pydantic_core", "pydantic_extra_types"})
"""The first one has the limits of types such as ``PositiveInt``."""
_VALIDATOR, _SERIALIZER = "__pydantic_validator__", "__pydantic_serializer__"
"""Attributes of the models and dataclasses of Pydantic 2."""
_SCHEMA = "__get_pydantic_core_schema__"
"""Method of a type that tells Pydantic how to decode it."""


def _parts(type_: Any, *, fields: bool = True, of_models: bool = False) -> Iterator[Any]:
    """Yield the classes in a type and the objects that annotate it, each class once.

    ``fields``: also those of its fields; ``of_models``: also of the fields of Pydantic's classes.
    """
    seen: set[int] = set()
    rest = [type_]
    while rest:
        each = rest.pop()
        notes, inner = _inside(each)
        yield from notes
        if inner:
            rest += inner
        elif isinstance(each, type) and id(each) not in seen:
            seen.add(id(each))
            yield each
            if fields:
                rest += _types_of_fields(each, of_models=of_models)
        elif hasattr(each, "__value__") and id(each) not in seen:  # `type Alias = ...`
            seen.add(id(each))
            rest.append(each.__value__)


def _inside(type_: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return the objects that annotate a type, and the types in it; none for a class."""
    origin = get_origin(type_)
    if origin is Annotated:
        inner, *notes = get_args(type_)
        return notes, [inner]
    if origin in (Union, UnionType):
        return (), get_args(type_)
    if origin is not None:
        return (), () if origin is Literal else (origin, *get_args(type_))
    if isinstance(type_, TypeVar):
        return (), type_.__constraints__ or (type_.__bound__,)
    return (), (type_.__supertype__,) if isinstance(type_, NewType) else ()


def _types_of_fields(kind: type, *, of_models: bool) -> Iterable[Any]:
    if hasattr(kind, _VALIDATOR):
        return [each.annotation for each in _fields_of(kind).values()] if of_models else ()
    if not (_is_of_msgspec(kind) or _is_neutral(kind)):
        return ()
    try:
        return get_type_hints(kind, include_extras=True).values()
    except Exception:  # noqa: BLE001 - a name that is not defined: the decoder reports it
        return ()


def _fields_of(kind: Any) -> Mapping[str, Any]:
    """Return the fields of a class of Pydantic by name; none for any other class."""
    if not hasattr(kind, _VALIDATOR):
        return {}
    return getattr(kind, "__pydantic_fields__", None) or getattr(kind, "model_fields", {})


def _is_class(part: Any) -> bool:
    return isinstance(part, type)


def _is_of_msgspec(part: Any) -> bool:
    """Return True for a class that msgspec decodes, and Pydantic does not."""
    return isinstance(part, type) and (
        issubclass(part, msgspec.Struct) or hasattr(part, "__attrs_attrs__")
    )


def _is_neutral(kind: type) -> bool:
    """Return True for a class with fields that both decode."""
    is_tuple = issubclass(kind, tuple) and hasattr(kind, "_fields")
    # Also one of typing_extensions, which Pydantic requires before Python 3.12.
    is_dict = issubclass(kind, dict) and hasattr(kind, "__required_keys__")
    return is_dataclass(kind) or is_dict or is_tuple


def _is_of_pydantic(part: Any) -> bool:
    kind = part if isinstance(part, type) else type(part)
    if hasattr(kind, _VALIDATOR):
        return True
    if any(base.__module__.partition(".")[0] in _PACKAGES for base in kind.__mro__):
        return True
    known = issubclass(kind, Enum) or _is_of_msgspec(kind) or _is_neutral(kind)
    return hasattr(part, _SCHEMA) and not known


def _require_current(part: Any) -> None:
    """Raise ``TypeError`` for a model or dataclass of Pydantic 1."""
    if not isinstance(part, type) or hasattr(part, _VALIDATOR):
        return
    names = {(base.__module__, base.__name__) for base in part.__mro__}
    old = {("pydantic.v1.main", "BaseModel"), ("pydantic.main", "BaseModel")}
    if names & old or hasattr(part, "__pydantic_model__"):
        raise TypeError(
            f"{part.__qualname__} is a model of Pydantic 1; declare it as one of Pydantic 2"
        )


def _pydantic_type(type_: Any) -> "_PydanticType | None":
    """Return how Pydantic decodes and encodes a type; None: msgspec does.

    Raises ``TypeError`` for a type that is Pydantic's and that it does not support.
    """
    pydantic: Any = sys.modules.get("pydantic")
    if pydantic is None:
        return None
    for part in _parts(type_, of_models=True):
        _require_current(part)
    parts = list(_parts(type_))
    of_pydantic = list(filter(_is_of_pydantic, parts))
    if not of_pydantic:
        return None
    if not any(map(_is_of_msgspec, parts)):
        return _PydanticType(pydantic, type_)
    for kind in filter(_is_class, of_pydantic):
        if hasattr(kind, "__dataclass_fields__"):
            # The decoder would take it for one of the standard library.
            raise TypeError(
                f"{kind.__qualname__} is a dataclass of Pydantic in a type of msgspec; declare it"
                " as a model"
            )
    return None


_WITH_JSON = (
    *(str, int, float, bytes, bytearray, memoryview, type(None)),
    *(list, tuple, dict, set, frozenset),
    *(date, time, timedelta, Decimal, UUID, Enum),
    *(msgspec.Struct, msgspec.Raw, msgspec.UnsetType),
)
_WITHOUT_JSON = (Iterator, AsyncIterable, Awaitable)


def _may_have_json(kind: type) -> bool:
    """Return False if no object of a class has JSON; of its subclasses those that exist count."""
    if issubclass(kind, _WITHOUT_JSON):
        return False
    if isinstance(kind, ABCMeta) or kind is object or kind is Any:
        return True
    if issubclass(kind, _WITH_JSON) or is_dataclass(kind) or _is_of_msgspec(kind):
        return True
    return any(map(_may_have_json, type.__subclasses__(kind)))


# -- Pydantic ------------------------------------------------------------------------------------

_MASK = b'"**********"'
"""The JSON of a secret of Pydantic, unless its field has a serializer."""
_MAX_PROBLEMS = 5
"""The problems that the text of an error has; Pydantic finds all of them."""
_UNKNOWN_FIELD = frozenset({"extra_forbidden", "unexpected_keyword_argument"})
_ANYTHING: _Schema = {"description": "Any JSON"}


class _PydanticType:
    """A type that Pydantic decodes and encodes."""

    def __init__(self, pydantic: Any, type_: Any) -> None:
        """Raise ``TypeError`` for a type that it does not support."""
        try:
            self.adapter = pydantic.TypeAdapter(type_)
        except Exception as error:  # noqa: BLE001 - also of the code of the type
            reason = str(error).partition("\n")[0]
            raise TypeError(f"Pydantic does not support it: {reason}") from None
        self._error = pydantic.ValidationError
        self._may_lose = _may_lose(type_)
        self._names: frozenset[str] = frozenset()

    def decode(self, document: bytes, root: str = "$") -> Any:
        """Raise :class:`PayloadError` for a document that does not fit.

        The path of the problem begins with ``root``.
        """
        try:
            return self.adapter.validate_json(document)
        except self._error as error:
            # Without the error itself, which quotes the payload.
            raise PayloadError(self._text_of(error, root)) from None

    def encode(self, value: object, *, round_trip: bool) -> bytes:
        """Encode a value; one of another type, too, as far as that is possible."""
        document = _dumped(self.adapter.dump_json, value, round_trip=round_trip)
        if round_trip and (self._may_lose or _MASK in document):
            with suppress(self._error):  # a dict may stand for a model
                value = self.adapter.validate_python(value)
            _require_all(value, self.adapter.validate_json, document)
        return document

    def _text_of(self, error: Any, root: str) -> str:
        self._names = self._names or _names_in(self.adapter.core_schema)
        problems = error.errors(include_url=False)
        texts = [_problem(each, root, self._names) for each in problems[:_MAX_PROBLEMS]]
        if (further := len(problems) - _MAX_PROBLEMS) > 0:
            texts.append(f"and {further} more")
        return "; ".join(texts)


def _problem(problem: Mapping[str, Any], root: str, names: frozenset[str]) -> str:
    """Return the text of a problem, without values of the payload and keys of its objects."""
    kind, text, path = problem["type"], problem["msg"], problem["loc"]
    if kind == "union_tag_invalid":  # its text quotes the tag
        of = problem["ctx"]
        text = f"Input tag {of['discriminator']} should be one of {of['expected_tags']}"
    if kind in _UNKNOWN_FIELD:
        names = names.union(path[-1:])
    steps = [
        f"[{step}]" if isinstance(step, int) else f".{step}" if step in names else "[...]"
        for step in path
    ]
    return f"{text} - at `{root}{''.join(steps)}`" if steps else str(text)


def _names_in(core_schema: Any) -> frozenset[str]:
    """Return the names that a path of Pydantic may have: of fields, classes, tags and types."""
    names: set[str] = set()
    rest = [core_schema]
    while rest:
        each = rest.pop()
        if isinstance(each, dict):
            for key in ("fields", "choices"):
                if isinstance(each.get(key), dict):
                    names.update(map(str, each[key]))
            alias = each.get("validation_alias", ())
            names.update(_texts_in([alias, each.get("name"), each.get("type")]))
            if isinstance(each.get("cls"), type):
                names.add(each["cls"].__name__)
            rest += each.values()
        elif isinstance(each, list | tuple):
            rest += each
    return frozenset(names)


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts_in(each)


def _dumped(dump: Callable[..., bytes], value: object, *, round_trip: bool) -> bytes:
    document = dump(value, by_alias=True, round_trip=round_trip, warnings=False)
    _check_syntax(document)  # a model may write infinity, which no ledger could store
    return document


def _may_lose(type_: Any) -> bool:
    """Return True if the JSON of a type may lack values, as far as its annotations tell."""
    return any(_is_secret(part) or _one_way_fields(part) for part in _parts(type_, of_models=True))


_class_may_lose = lru_cache(maxsize=512)(_may_lose)


def _one_way_fields(kind: Any) -> set[str]:
    """Return the fields of a class of Pydantic that its own JSON does not have, or not as read."""
    named = _fields_of(kind)
    config = getattr(kind, "model_config", None) or getattr(kind, "__pydantic_config__", None) or {}
    bytes_differ = config.get("ser_json_bytes", "utf8") != config.get("val_json_bytes", "utf8")
    if bytes_differ or config.get("ser_json_temporal", "iso8601") != "iso8601":
        return set(named)
    return {name for name, each in named.items() if _is_one_way(name, each, config)}


def _is_one_way(name: str, field: Any, config: Mapping[str, Any]) -> bool:
    if field.exclude or getattr(field, "exclude_if", None) or getattr(field, "init", True) is False:
        return True
    alias = field.validation_alias
    accepted = {name} if alias is None else set()
    if alias is not None and config.get("validate_by_alias", True):
        for each in getattr(alias, "choices", [alias]):  # of an AliasChoices
            path = getattr(each, "path", [each])
            accepted.update(path if len(path) == 1 else ())
    if config.get("validate_by_name") or config.get("populate_by_name"):
        accepted.add(name)
    return (field.serialization_alias or name) not in accepted


def _require_all(value: object, read: Callable[[bytes], Any], document: bytes) -> None:
    """Raise ``ValueError`` if an object lost a secret or a field on its way through its JSON."""
    try:
        lost = next(_losses(value, read(document)), "")
    except ValueError:
        lost = None if _MASK in document else ""  # decoding it has a text for any other reason
    if lost is None:
        raise ValueError(
            "the JSON of a secret is its mask; give its field a serializer that returns the value,"
            " or pass on where the secret is kept"
        )
    if lost:
        raise ValueError(
            f"the value of {lost} is not read again from its JSON, since the field is excluded, or"
            " written in another way than it is read; declare a model without it"
        )


def _losses(value: object, found: object) -> Iterator[str | None]:
    """Yield each field with another value in ``found``, and None for a secret."""
    rest: list[tuple[Any, Any]] = [(value, found)]
    while rest:
        one, other = rest.pop()
        if _is_secret(type(one)):
            if one != other:
                yield None
        elif isinstance(one, Mapping | set | frozenset) and isinstance(other, Collection):
            rest += [(each, each if each in other else None) for each in one]
            if isinstance(one, Mapping) and isinstance(other, Mapping):
                rest += [(each, other.get(key)) for key, each in one.items()]
        elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
            rest += zip(one, other, strict=False)
        elif isinstance(one, type(other)) and hasattr(one, "__dict__"):
            one_way, others = _one_way_fields(type(other)), _values_of(other)
            for name, each in _values_of(one).items():
                if name in one_way and each != others.get(name):
                    yield f"{type(one).__qualname__}.{name}"
                rest.append((each, others.get(name)))


def _values_of(value: Any) -> dict[str, Any]:
    return {**vars(value), **(getattr(value, "__pydantic_extra__", None) or {})}


def _is_secret(part: Any) -> bool:
    pydantic: Any = sys.modules["pydantic"]
    names = ("SecretStr", "SecretBytes", "Secret")  # the last one since 2.7
    kinds = tuple(getattr(pydantic, name) for name in names if hasattr(pydantic, name))
    return isinstance(part, type) and issubclass(part, kinds)


def _schemas_of_models(
    models: Mapping[Any, _PydanticType], prefix: str
) -> tuple[dict[Any, _Schema], _Schema]:
    """Return the schemas of types by type, and the named ones; equal names are kept apart."""
    if not models:
        return {}, {}
    found, shared = sys.modules["pydantic"].TypeAdapter.json_schemas(
        [(kind, "validation", model.adapter) for kind, model in models.items()],
        ref_template=f"{prefix}{_MODEL}{{model}}",
    )
    named = {f"{_MODEL}{name}": schema for name, schema in shared.get("$defs", {}).items()}
    return {kind: found[kind, "validation"] for kind in models}, named


_MODEL = "Model."
"""Keeps the names of models apart from those of other types."""
