"""Idempotency keys of names: none meets another name's key, or a key that has no name."""

import re

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from viralfx.core.keys import NamedKey, owner_and_text, stored_key
from viralfx.domain.access import ANONYMOUS, Principal
from viralfx.settings.tokens import API, MANAGEMENT
from viralfx.web.jobs.schemas import MAX_KEY_CHARACTERS

NAMES = st.one_of(
    st.from_regex(r"[A-Za-z][A-Za-z0-9._-]{0,63}", fullmatch=True),
    st.text(st.characters(), min_size=1, max_size=200),
    st.text("@ %:20a", min_size=1, max_size=8),
)
"""Names of TOKENS, any others, and ones that imitate the encoding."""
SENT = st.one_of(
    st.from_regex(rf"[!-~]{{1,{MAX_KEY_CHARACTERS}}}", fullmatch=True),
    st.text("@%20a", min_size=1, max_size=8),
)
"""Keys that a client of the jobs API can send."""
PLAIN = st.one_of(SENT, st.text(min_size=1), st.text("@ %20a", min_size=1, max_size=8))
"""Keys that the code of an application can give."""
NAMED = st.builds(NamedKey, NAMES, PLAIN)


@given(NAMED, NAMED)
@example(NamedKey("a", "b c"), NamedKey("a b", "c"))
@example(NamedKey("a", "x"), NamedKey("a", "@a x"))
@example(NamedKey("\ud800" * 200, "x"), NamedKey("\ud801" * 200, "x"))
def test_two_names_never_share_a_key(one: NamedKey, other: NamedKey) -> None:
    """Stored keys are equal if, and only if, names and texts are."""
    assert (stored_key(one) == stored_key(other)) == (one == other)


@given(NAMED, PLAIN)
@example(NamedKey("ann", "order-17"), "@ann order-17")
@example(NamedKey("ann", "order-17"), "@ann%20order-17")
@example(NamedKey("alert", "all:database:fail:1"), "alert all:database:fail:1")
def test_a_text_never_reaches_the_key_of_a_name(owned: NamedKey, text: str) -> None:
    """A text is stored as it is, or refused because it has the form of a name's key."""
    try:
        stored = stored_key(text)
    except ValueError as error:
        assert "belong to the names of TOKENS" in str(error)  # noqa: PT017 - most texts are fine
        assert text.startswith("@")
        assert " " in text
        return
    assert stored == text
    assert stored != stored_key(owned)


@given(SENT)
def test_a_key_that_a_client_can_send_stays_as_it_is(text: str) -> None:
    """So the holder of API_TOKEN finds the jobs of older processes under it."""
    assert [stored_key(each.key(text)) for each in (API, MANAGEMENT, ANONYMOUS)] == [text] * 3
    assert owner_and_text(text) == (None, text)


@given(NAMES, SENT)
def test_a_key_of_a_name_is_bounded_and_shows_both(name: str, text: str) -> None:
    """It fits the index of Postgres; the digest of a very long name shows in its place."""
    stored = stored_key(Principal(name=name).key(text))
    assert stored is not None
    assert len(stored.encode()) <= 130 + len(text)
    owner, shown = owner_and_text(stored)
    assert shown == text
    assert owner == name or re.fullmatch("sha256:[0-9a-f]{64}", str(owner))
    if name.isascii():
        assume(len(name) <= 40)
        assert owner == name


def test_the_names_of_tokens_are_stored_as_they_are() -> None:
    """A key in the database can be read without a tool."""
    assert stored_key(NamedKey("ann.b_c-d", "order-17")) == "@ann.b_c-d order-17"
    assert stored_key(None) is None
    assert owner_and_text(None) == (None, None)


@pytest.mark.parametrize("key", ["", 7, b"x", NamedKey("ann", "")])
def test_a_key_is_a_text_that_is_not_empty(key: object) -> None:
    """Everything else is an error."""
    with pytest.raises(ValueError, match="key must be a text that is not empty"):
        stored_key(key)


def test_a_caller_with_two_names_keeps_the_keys_of_the_first() -> None:
    """One secret of API_TOKEN and of a name has the rights of both, and the keys of API_TOKEN."""
    ann = Principal(name="ann", submits=("*",))

    assert API.joined(ann).key("k") == "k"
    assert ann.joined(API).key("k") == NamedKey("ann", "k")
