"""The codec: payloads by type, what is refused and where, and results that have no JSON."""

from typing import Annotated, Any

import msgspec
import pytest

from viralfx.adapters.codec import MsgspecCodec
from viralfx.domain.jobs.codec import PayloadError, ResultError


class Address(msgspec.Struct):
    """A part of a payload."""

    street: str


class Order(msgspec.Struct, forbid_unknown_fields=True):
    """A payload."""

    number: int
    to: list[Address] = []


class Loose(msgspec.Struct):
    """A payload that passes over what it does not know."""

    number: int = 0


@pytest.fixture
def codec() -> MsgspecCodec:
    """Return a codec."""
    return MsgspecCodec()


def refusal(codec: MsgspecCodec, payload: bytes, type_: Any = Order) -> str:
    """Return why a payload is refused."""
    with pytest.raises(PayloadError) as caught:
        codec.decode(payload, type_)
    return str(caught.value)


def test_a_payload_becomes_its_type(codec: MsgspecCodec) -> None:
    """Nested types as well, and the second time with the same decoder."""
    for street in ("A", "Bö"):
        decoded = codec.decode(f'{{"number":1,"to":[{{"street":"{street}"}}]}}'.encode(), Order)

        assert decoded == Order(1, [Address(street)])


def test_a_type_that_cannot_be_hashed_works(codec: MsgspecCodec) -> None:
    """Annotations may hold anything."""
    assert codec.decode(b"[1]", Annotated[list[int], {"some": "note"}]) == [1]


@pytest.mark.parametrize(
    ("payload", "told"),
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
def test_a_payload_that_does_not_fit_is_told_with_its_place(
    codec: MsgspecCodec, payload: bytes, told: str
) -> None:
    """What is wrong, and the path of where."""
    assert told in refusal(codec, payload)


def test_text_that_is_not_utf8_is_refused_even_where_nobody_reads_it(codec: MsgspecCodec) -> None:
    """No ledger would take it."""
    assert refusal(codec, b'{"unknown":"\xff"}', Loose) == "it is not UTF-8 text"
    assert refusal(codec, b'"\xff"', Any) == "it is not UTF-8 text"


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_nesting_is_bounded(codec: MsgspecCodec, opening: bytes, closing: bytes) -> None:
    """500 levels are taken, one more is not, and brackets inside of texts are no levels."""
    deepest = opening * 500 + b"1" + closing * 500

    assert codec.decode(deepest, Any)
    assert refusal(codec, opening + deepest + closing, Any) == (
        "it is nested more than 500 levels deep"
    )
    assert codec.decode(b'["' + b"[" * 501 + b'\\"{",' + b"[]," * 600 + b"1]", Any)


def test_a_type_without_json_is_told_when_it_is_learned(codec: MsgspecCodec) -> None:
    """Not only when the first job comes."""
    with pytest.raises(TypeError, match="not supported"):
        codec.learn(Order | Loose)
    codec.learn(Order)


def test_results_become_json(codec: MsgspecCodec) -> None:
    """Any type that msgspec knows."""
    results = (None, Order(1), {"a": [1]})

    assert [codec.encode(r) for r in results] == [b"null", b'{"number":1,"to":[]}', b'{"a":[1]}']


def test_a_result_without_json_is_refused(codec: MsgspecCodec) -> None:
    """Unknown types, keys, surrogates and endless structures."""
    endless: list[object] = []
    endless.append(endless)
    for result in (object(), {object(): 1}, "\ud800", endless):
        with pytest.raises(ResultError, match=f"{type(result).__name__} has no JSON: "):
            codec.encode(result)
