"""Equality of JSON documents, which decides whether a repeated request is the same one."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viralfx.jobs.codec import same_json


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (b"[1, 2]", b"[1,2]"),
        (b' {"a": 1,\n"b": [ ]}', b'{"b":[],"a":1}'),
        (b"1", b"1.0"),
        (b"1", b"10e-1"),
        (b"0", b"-0.0"),
        (b"1E400", b"1e+400"),
        (b"1e99999999999999999999", b"1e99999999999999999999"),
        (b"9" * 5000, b"9" * 5000 + b".0"),
        (rb'"\u00fc\/"', '"ü/"'.encode()),
        (rb'"\ud83d\ude00"', '"😀"'.encode()),
        (rb'"\uD800"', rb'"\ud800"'),
        (b'{"a":1,"a":2}', b'{"a":2}'),
        (b"[" * 500 + b"]" * 500, b"[" * 500 + b" " + b"]" * 500),
    ],
)
def test_equal_values_in_other_notations_are_the_same(one: bytes, other: bytes) -> None:
    """White space, the order of names, escapes and number formats do not matter."""
    assert same_json(one, other)
    assert same_json(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (b"[1,2]", b"[2,1]"),
        (b"1", b"true"),
        (b"0", b"false"),
        (b"1", b'"1"'),
        (b"null", b"false"),
        (b"{}", b"[]"),
        (b'{"a":null}', b"{}"),
        (b'"\xc3\xbc"', b'"u\xcc\x88"'),
        (b"123456789012345678901234567890", b"123456789012345678901234567891"),
        (b"0.1", b"0.1000000000000000055511151231257827"),
        (b"1e400", b"1e401"),
        (b"1e99999999999999999999", b"1e99999999999999999998"),
        (b'{"a":2,"a":1}', b'{"a":2}'),
        (b'["number",1]', b"1"),
    ],
)
def test_different_values_are_not_the_same(one: bytes, other: bytes) -> None:
    """Types differ, numbers are exact, and text is compared by code points."""
    assert not same_json(one, other)
    assert not same_json(other, one)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(JSON, JSON)
def test_a_value_equals_itself_in_every_encoding(value: Any, other: Any) -> None:
    """Indented, sorted or in ASCII; it never equals another value."""
    plain = json.dumps(value).encode()
    indented = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)

    assert same_json(plain, indented.encode("utf-8"))
    assert same_json(plain, json.dumps(other).encode()) is (_typed(value) == _typed(other))


def _typed(value: Any) -> Any:
    """Return a value in which true is not a number."""
    if isinstance(value, list):
        return [_typed(each) for each in value]
    if isinstance(value, dict):
        return {name: _typed(each) for name, each in value.items()}
    return (type(value), value)
