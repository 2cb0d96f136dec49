"""The codec: typed payloads, errors with their position, and results without JSON."""

from datetime import datetime, tzinfo
from typing import Annotated, Any, NoReturn

import msgspec
import pytest

from viralfx.adapters.codec import MsgspecCodec
from viralfx.jobs.codec import PayloadError, ResultError, encoded_result, is_too_deep


class Address(msgspec.Struct):
    """A part of a payload."""

    street: str


class Order(msgspec.Struct, forbid_unknown_fields=True):
    """A payload."""

    number: int
    to: list[Address] = []


class Loose(msgspec.Struct):
    """A payload type that ignores unknown fields."""

    number: int = 0


@pytest.fixture
def codec() -> MsgspecCodec:
    """Return a codec."""
    return MsgspecCodec()


def refusal(codec: MsgspecCodec, payload: bytes, type_: Any = Order) -> str:
    """Return the error message for a payload."""
    with pytest.raises(PayloadError) as caught:
        codec.decode(payload, type_)
    return str(caught.value)


def test_payload_is_decoded_to_its_type(codec: MsgspecCodec) -> None:
    """Nested types too; the decoder is reused."""
    for street in ("A", "Bö"):
        decoded = codec.decode(f'{{"number":1,"to":[{{"street":"{street}"}}]}}'.encode(), Order)

        assert decoded == Order(1, [Address(street)])


def test_unhashable_type_works(codec: MsgspecCodec) -> None:
    """Annotations may contain any object."""
    assert codec.decode(b"[1]", Annotated[list[int], {"some": "note"}]) == [1]


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b'{"number":"1"}', "Expected `int`, got `str` - at `$.number`"),
        (b'{"number":1,"to":[{}]}', "missing required field `street` - at `$.to[0]`"),
        (b'{"number":1,"extra":1}', "contains unknown field `extra`"),
        (b"{}", "missing required field `number`"),
        (b"[]", "Expected `object`, got `array`"),
        (b"", "truncated"),
        (b'{"number":1}x', "trailing characters"),
        (b'{"number":NaN}', "malformed"),
    ],
)
def test_error_has_the_path_of_the_problem(
    codec: MsgspecCodec, payload: bytes, message: str
) -> None:
    """With the expected type."""
    assert message in refusal(codec, payload)


def test_invalid_utf8_is_refused_in_unknown_fields(codec: MsgspecCodec) -> None:
    """No ledger could store it."""
    assert refusal(codec, b'{"unknown":"\xff"}', Loose) == "it is not UTF-8 text"
    assert refusal(codec, b'"\xff"', Any) == "it is not UTF-8 text"


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_nesting_is_limited(codec: MsgspecCodec, opening: bytes, closing: bytes) -> None:
    """500 levels are accepted, 501 are not; brackets in texts do not count."""
    deepest = opening * 500 + b"1" + closing * 500

    assert codec.decode(deepest, Any)
    assert refusal(codec, opening + deepest + closing, Any) == (
        "it is nested more than 500 levels deep"
    )
    assert codec.decode(b'["' + b"[" * 501 + b'\\"{",' + b"[]," * 600 + b"1]", Any)


def test_unsupported_type_is_refused_at_registration(codec: MsgspecCodec) -> None:
    """Not only at the first job."""
    with pytest.raises(TypeError, match="not supported"):
        codec.learn(Order | Loose)
    codec.learn(Order)


def test_result_is_encoded_as_json(codec: MsgspecCodec) -> None:
    """Any type that msgspec supports."""
    results = (None, Order(1), {"a": [1]})

    assert [codec.encode(r) for r in results] == [b"null", b'{"number":1,"to":[]}', b'{"a":[1]}']


def test_result_without_json_is_refused(codec: MsgspecCodec) -> None:
    """Unknown types, keys, surrogates and cyclic structures."""
    endless: list[object] = []
    endless.append(endless)
    for result in (object(), {object(): 1}, "\ud800", endless):
        with pytest.raises(ResultError, match=f"{type(result).__name__} has no JSON: "):
            codec.encode(result)


class Hostile(tzinfo):
    """A time zone that raises what it was given."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def utcoffset(self, _: datetime | None) -> NoReturn:
        """Raise the error; the encoder calls this."""
        raise self._error

    def dst(self, _: datetime | None) -> NoReturn:
        """Raise the error."""
        raise self._error

    def tzname(self, _: datetime | None) -> NoReturn:
        """Raise the error."""
        raise self._error


class SilentError(Exception):
    """Has no text."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    "result",
    [
        msgspec.Raw(b"nonsense"),
        msgspec.Raw(b""),
        msgspec.Raw(b'{"a": NaN}'),
        msgspec.Raw(b'"\x00"'),
        msgspec.Raw(b'"\xff"'),
        msgspec.Raw(b"[" * 100_000 + b"]" * 100_000),
        {"nested": msgspec.Raw(b"[" * 100_000 + b"]" * 100_000)},
        [[[msgspec.Raw(b"[" * 500 + b"]" * 500)]]],
        (number for number in range(3)),
        datetime(2026, 1, 1, tzinfo=Hostile(SystemExit(3))),
        datetime(2026, 1, 1, tzinfo=Hostile(SilentError())),
        datetime(2026, 1, 1, tzinfo=Hostile(MemoryError())),
    ],
)
def test_an_unusable_result_is_a_result_error(codec: MsgspecCodec, result: object) -> None:
    """Raw documents that are not JSON, and objects whose own code raises."""
    with pytest.raises(ResultError):
        codec.encode(result)


@pytest.mark.parametrize(
    ("result", "document"),
    [
        (msgspec.Raw(b"1e400"), b"1e400"),
        (float("nan"), b"null"),
        (float("inf"), b"null"),
        (msgspec.Raw(b'"\\u0000"'), b'"\\u0000"'),
        ([msgspec.Raw(b"[" * 499 + b"]" * 499)], b"[" * 500 + b"]" * 500),
    ],
)
def test_unusual_numbers_and_depths_are_kept(
    codec: MsgspecCodec, result: object, document: bytes
) -> None:
    """Postgres stores them."""
    assert codec.encode(result) == document


class Quitting(msgspec.Struct):
    """A payload whose own code raises."""

    def __post_init__(self) -> None:
        raise SystemExit(3)


def test_a_type_that_would_end_the_process_is_a_payload_error(codec: MsgspecCodec) -> None:
    """The API decodes payloads, too."""
    with pytest.raises(PayloadError, match="its type raised SystemExit"):
        codec.decode(b"{}", Quitting)


@pytest.mark.parametrize(
    ("document", "too_deep"),
    [
        (b"[]" * 10_000, False),
        (b'["[[", "\\"[[", {}],' * 1000, False),
        (b"]" * 200 + b"[" * 600, False),
        (b'["[", ' * 501, True),
        (b"[" * 501 + b"]" * 501, True),
    ],
)
def test_nesting_is_counted_outside_strings(document: bytes, *, too_deep: bool) -> None:
    """Only the depth counts, not the number of brackets."""
    assert is_too_deep(document) is too_deep


@pytest.mark.parametrize(
    "result", ["x" * 40, b"y" * 40, {"text": "x" * 40}, ["x" * 20, bytearray(20)], ("x" * 40,)]
)
def test_texts_far_beyond_the_limit_are_not_encoded(result: object) -> None:
    """Their length is a size that the JSON has at least."""

    class Untouched(MsgspecCodec):
        def encode(self, value: object, *_: Any, **__: Any) -> bytes:
            raise AssertionError(value)

    with pytest.raises(ResultError, match="the result has at least 40 bytes of JSON"):
        encoded_result(Untouched(), result, 2)


@pytest.mark.parametrize("result", ["x" * 32, ["x", 1, None], {"x": {"x": "x" * 100}}, [[]], 12345])
def test_a_result_over_the_limit_has_its_size_in_the_message(
    codec: MsgspecCodec, result: object
) -> None:
    """It is encoded first, unless its texts are much too long."""
    size = len(codec.encode(result))
    assert encoded_result(codec, result, size) == codec.encode(result)
    with pytest.raises(ResultError, match=f"the result has {size} bytes of JSON"):
        encoded_result(codec, result, min(2, size - 1) if size < 32 else size - 1)
