"""The JSON of payloads, results and progress: the codec port, nesting depth and equality."""

import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import accumulate, islice
from types import UnionType
from typing import (
    Annotated,
    Any,
    Final,
    Literal,
    NewType,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

from viralfx.core.errors import ViralFXError

MAX_NESTING_LEVELS = 500
"""Nesting levels that a payload may have; every JSON parser and encoder in use supports them."""

_WITHOUT_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL).sub
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
"""Opening brackets as 1, closing ones as -1 in eight bits."""
_NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))


def is_too_deep(document: bytes) -> bool:
    """Return True if a document has more than :data:`MAX_NESTING_LEVELS` levels.

    The document need not be valid JSON.
    """
    if (
        len(document) <= MAX_NESTING_LEVELS
        or document.count(b"[") + document.count(b"{") <= MAX_NESTING_LEVELS
    ):  # the usual case
        return False
    # A loop over the tokens would block the event loop for longer.
    brackets = _WITHOUT_STRINGS(b"", document).translate(_STEPS, _NO_BRACKETS)
    return max(accumulate(array("b", brackets)), default=0) > MAX_NESTING_LEVELS


_Number = tuple[str, "Decimal | str"]


def same_json(one: bytes, other: bytes) -> bool:
    """Return True if two documents have the same JSON value. Both must be valid JSON in UTF-8.

    White space, the order of names in an object and the escapes in a string do not matter. If an
    object repeats a name, the last value counts, as it does for the task. Numbers are compared by
    their exact value: ``1``, ``1.0`` and ``10e-1`` are equal, and two large numbers with the same
    float representation are not.
    """
    return one == other or _value(one) == _value(other)


def _value(document: bytes) -> Any:
    return json.loads(document.decode(), parse_int=_number, parse_float=_number)


def _number(text: str) -> _Number:
    # A tuple cannot equal another JSON value; in Python `True` equals the number 1.
    try:
        return ("number", Decimal(text))
    except InvalidOperation:  # the exponent exceeds every context: compared as text
        return ("number", text)


def unique_key_of(task: str, payload: bytes) -> str:
    """Return a digest of a task and of the JSON value of its payload, which must be valid JSON.

    It is equal for payloads with the same value, as in :func:`same_json`; a number with an exponent
    beyond a thousand counts as its text. The SQL function ``enqueue`` computes the same digest.
    """
    parts = [task, "\n"]
    _write(_value(payload), parts)
    return hashlib.sha256("".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


_MAX_EXPONENT = 1000
"""More would let a short payload become a long text."""


def _write(value: Any, parts: list[str]) -> None:
    """Append a JSON value as Postgres writes it, with numbers in their shortest form."""
    if isinstance(value, dict):
        parts.append("{")
        for position, name in enumerate(sorted(value, key=_order)):
            parts += (", " if position else "", json.dumps(name, ensure_ascii=False), ": ")
            _write(value[name], parts)
        parts.append("}")
    elif isinstance(value, list):
        parts.append("[")
        for position, each in enumerate(value):
            parts.append(", " if position else "")
            _write(each, parts)
        parts.append("]")
    elif isinstance(value, tuple):
        parts.append(_digits(value[1]))
    else:
        parts.append(json.dumps(value, ensure_ascii=False))


def _order(name: str) -> tuple[int, bytes]:
    encoded = name.encode("utf-8", "surrogatepass")
    return len(encoded), encoded


def _digits(number: Decimal | str) -> str:
    if isinstance(number, str) or abs(number.adjusted()) > _MAX_EXPONENT:
        return str(number)
    if not number:
        return "0"
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def is_json(document: bytes) -> bool:
    """Return True for valid JSON in UTF-8 that is not nested too deep to be read."""
    try:
        json.loads(document.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> None:
    raise ValueError(constant)  # NaN or Infinity


class PayloadError(ViralFXError, ValueError):
    """A payload does not match the task's type; the message names the place and the reason."""


class PayloadTooLargeError(PayloadError):
    """A payload has more bytes of JSON than the settings allow."""


class ResultError(ValueError):
    """A task's result cannot be encoded as JSON, or cannot be stored."""


DEFAULT_MAX_BYTES = 2**20
"""Limit for the JSON of a payload or result."""


def too_large(size: int, limit: int) -> str | None:
    """Return the error message for a payload over the limit, and None for any other."""
    return None if size <= limit else _too_large(f"the payload has {size}", limit)


def _too_large(what: str, limit: int) -> str:
    return (
        f"{what} bytes of JSON, and JOB_MAX_RESULT_BYTES={limit}: keep the data elsewhere and pass"
        " on where it is, or raise the setting"
    )


class Codec(Protocol):
    """Port: payloads and results of any type as JSON."""

    def decode(self, payload: bytes, type_: Any) -> Any:
        """Decode a payload. Raises :class:`PayloadError`."""
        ...

    def encode(self, value: object, type_: Any = Any, *, round_trip: bool = True) -> bytes:
        """Encode a value of a type; with ``round_trip`` it is to be decoded as that type again.

        Raises :class:`ResultError`.
        """
        ...

    def schemas(
        self, types: Iterable[Any], prefix: str
    ) -> tuple[list[dict[str, Any] | None], dict[str, Any]]:
        """Return the JSON Schema of each type, None without one, and the named schemas in them.

        ``prefix`` comes before their names in a reference.
        """
        ...


_FAR_BEYOND = 16
_MAX_TEXTS = 100


def encoded_result(codec: Codec, result: object, limit: int, type_: Any = Any) -> bytes:
    """Return the JSON of a task's result, of at most ``limit`` bytes. Raises :class:`ResultError`.

    ``type_`` is the type that the task declares for it.

    Texts with many times the limit are not encoded: that would block the event loop, and need their
    memory once more.
    """
    size, least = _least_size(result), "at least "
    if size <= _FAR_BEYOND * limit:
        encoded, least = codec.encode(result, type_, round_trip=False), ""
        size = len(encoded)
        if size <= limit:
            return encoded
    raise ResultError(_too_large(f"the result has {least}{size}", limit))


def _least_size(value: object) -> int:
    """Return the length of a text or of the first texts in a container; zero for other values."""
    if value is None:
        return 0
    values: Iterable[object] = (value,)
    if type(value) is dict:
        values = value.values()
    elif type(value) is list or type(value) is tuple:
        values = value
    return sum(
        len(each)
        for each in islice(values, _MAX_TEXTS)
        # Not of a subclass, which may have a length of its own.
        if type(each) is str or type(each) is bytes or type(each) is bytearray
    )


MAX_PROGRESS_MESSAGE = 500
"""Characters of the message of a report that are kept."""
MAX_PROGRESS_NUMBER: Final = 2**53
"""Beyond it not every JSON parser keeps a whole number exactly."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a task is, as the task reported it.

    Raises ``ValueError`` for a number that is out of range, so that every progress has JSON.
    """

    current: float | None
    total: float | None
    message: str | None

    def __post_init__(self) -> None:
        """Check the numbers, and replace lone surrogates, which have no UTF-8."""
        for name, number in (("current", self.current), ("total", self.total)):
            if number is not None and not is_in_range(number):
                raise ValueError(f"report: {name} must be a finite number of at most 2**53 in size")
        if self.message is not None:
            message = self.message.encode("utf-8", "replace").decode()
            object.__setattr__(self, "message", message)

    @property
    def ratio(self) -> float | None:
        """``current`` of ``total``, from 0 to 1; None without both."""
        if self.current is None or not self.total or self.total < 0:
            return None
        return min(1.0, max(0.0, self.current / self.total))

    def encode(self) -> bytes:
        """Return the JSON of all three fields."""
        fields = {"current": self.current, "total": self.total, "message": self.message}
        return json.dumps(fields, ensure_ascii=False).encode()


def is_in_range(number: float) -> bool:
    """Return True for a number that a progress can have."""
    # NaN fails the comparison, too.
    return -MAX_PROGRESS_NUMBER <= number <= MAX_PROGRESS_NUMBER


def read_progress(current: object = None, total: object = None, message: object = None) -> Progress:
    """Return the progress that a task reports; a long message is cut.

    Raises ``TypeError`` for a value of a wrong type, and ``ValueError`` for a number that is out of
    range, or no value at all.
    """
    numbers = _reported("current", current), _reported("total", total)
    if message is not None and not isinstance(message, str):
        raise TypeError(_wrong("message", "a text", message))
    if message is not None and len(message) > MAX_PROGRESS_MESSAGE:
        # Often a part of the task's input: its length is no reason to fail the task.
        message = f"{message[: MAX_PROGRESS_MESSAGE - 3]}..."
    if numbers == (None, None) and message is None:
        raise ValueError("report() needs current, total or message, as in report(3, 10, 'rows')")
    return Progress(*numbers, message)


def _reported(name: str, number: object) -> float | None:
    if number is None:
        return None
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(_wrong(name, "a number", number))
    return number


def _wrong(name: str, wanted: str, given: object) -> str:
    return (
        f"report(): {name} must be {wanted}, not {type(given).__name__}; write"
        " report(3, 10, 'rows')"
    )


_RAW_JSON = ("msgspec", "Raw")
"""A type of any JSON, by module and name: the domain does not import it."""


def takes_null(payload_type: Any) -> bool:
    """Return True if null fits the type of a payload, as far as its annotation tells."""
    return any(map(_is_null, _alternatives(payload_type)))


def _alternatives(kind: Any) -> Iterator[Any]:
    """Yield the types that a type stands for: those of a union, an alias or a type variable."""
    if get_origin(kind) in (Union, UnionType):
        inner = get_args(kind)
    elif get_origin(kind) is Annotated:
        inner = get_args(kind)[:1]
    elif isinstance(kind, TypeVar):
        inner = kind.__constraints__ or (kind.__bound__ or Any,)
    elif isinstance(kind, NewType):
        inner = (kind.__supertype__,)
    elif hasattr(kind, "__value__") and not isinstance(kind, type):  # `type Alias = ...`
        inner = (kind.__value__,)
    else:
        yield kind
        return
    for each in inner:
        yield from _alternatives(each)


def _is_null(kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return None in get_args(kind)
    if kind is None or kind is Any:
        return True
    if get_origin(kind) is not None or not isinstance(kind, type):
        return False
    if (kind.__module__, kind.__qualname__) == _RAW_JSON:
        return True
    try:
        return isinstance(None, kind)
    except TypeError:  # a TypedDict or another protocol
        return False


def storable(text: str) -> str:
    """Return a text in a form that every ledger can store."""
    # Postgres stores neither NUL nor lone surrogates as text.
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
