"""Correlation ids: precedence of the headers, validation, and binding to tasks."""

import asyncio
import contextvars
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viralfx.core.correlation import (
    bind_correlation_id,
    bind_user_id,
    choose_correlation_id,
    correlated,
    current_correlation_id,
    current_user_id,
    is_correlation_id,
    new_correlation_id,
)

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
HOSTILE = {
    "empty": "",
    "newline": "order-1\nlevel=error",
    "trailing newline": "order-1\n",
    "carriage return": "order-1\r\nX-Evil: 1",
    "10 kB": "a" * 10_240,
    "129 characters": "a" * 129,
    "not ASCII": "bestellung-ä",
    "unicode digits": "٣٤٥",
    "fullwidth letters": "ｏｒｄｅｒ",  # noqa: RUF001 - the point
    "space": "order 1",
    "markup": "<script>",
    "NUL": "order\0",
}


@pytest.mark.parametrize("text", ["a", "Z9", "order-1", "a.b_c-d", "a" * 128, "0", "..", "-"])
def test_valid_ids_are_used_unchanged(text: str) -> None:
    """Up to 128 of the allowed characters form an id."""
    assert is_correlation_id(text)
    assert text == choose_correlation_id(text, None, None)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_invalid_ids_are_replaced(text: str) -> None:
    """An invalid id is neither repaired nor echoed, in part or in whole."""
    chosen = choose_correlation_id(text, text, text)

    assert not is_correlation_id(text)
    assert re.fullmatch("[0-9a-f]{32}", chosen)


@pytest.mark.parametrize(
    ("correlation", "request_id", "parent", "chosen"),
    [
        ("first", "second", PARENT, "first"),
        (None, "second", PARENT, "second"),
        ("not fit", "second", PARENT, "second"),
        ("", "second", PARENT, "second"),
        (None, None, PARENT, TRACE),
        ("not fit", "not\nfit", PARENT, TRACE),
        ("first", None, None, "first"),
    ],
)
def test_correlation_id_precedes_request_id_and_trace_id(
    correlation: str | None, request_id: str | None, parent: str | None, chosen: str
) -> None:
    """The first valid one of the three is used."""
    assert chosen == choose_correlation_id(correlation, request_id, parent)


@pytest.mark.parametrize(
    "parent",
    [
        None,
        "",
        TRACE,
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"00-{TRACE.upper()}-00f067aa0ba902b7-01",
        f"00-{TRACE}-00f067aa0ba902b7",
        f"00-{TRACE}-00f067aa0ba902b7-01\n",
        f" {PARENT}",
        f"0x-{TRACE}-00f067aa0ba902b7-01",
        f"ff-{TRACE}-00f067aa0ba902b7-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"{PARENT}-extra",
        f"{PARENT}-",
    ],
)
def test_a_new_id_is_generated_without_a_valid_header(parent: str | None) -> None:
    """A missing or malformed ``traceparent`` leads to a new id."""
    chosen = choose_correlation_id(None, None, parent)

    assert chosen not in {TRACE, "0" * 32}
    assert re.fullmatch("[0-9a-f]{32}", chosen)


def test_later_version_of_trace_parent_may_have_more_fields() -> None:
    """A field that a later version appends is ignored, as W3C requires."""
    for version in ("01", "0f", "f0", "fe"):
        parent = f"{version}-{TRACE}-00f067aa0ba902b7-01"
        assert choose_correlation_id(None, None, parent) == TRACE
        assert choose_correlation_id(None, None, f"{parent}-extra") == TRACE
        assert choose_correlation_id(None, None, f"{parent}extra") != TRACE


@given(st.text(), st.text(), st.text())
def test_the_chosen_id_is_always_valid(correlation: str, request_id: str, parent: str) -> None:
    """For any headers, the chosen id matches the pattern."""
    assert re.fullmatch(
        r"[A-Za-z0-9._-]{1,128}", choose_correlation_id(correlation, request_id, parent), re.ASCII
    )


def test_new_ids_differ() -> None:
    """A thousand new ids are distinct."""
    assert len({new_correlation_id() for _ in range(1000)}) == 1000


def test_a_block_binds_an_id_and_restores_the_previous_one() -> None:
    """Blocks nest; outside there is no id."""
    with correlated("outer"), correlated("inner"):
        inner = current_correlation_id()
    with correlated("outer"):
        outer = current_correlation_id()

    assert (inner, outer, current_correlation_id()) == ("inner", "outer", None)


async def test_an_id_bound_in_a_task_stays_in_it() -> None:
    """Tasks that it creates inherit the id."""
    seen: list[str | None] = []

    async def child() -> None:
        seen.append(current_correlation_id())

    async def parent() -> None:
        bind_correlation_id("mine")
        await asyncio.create_task(child())

    await asyncio.create_task(parent())

    assert seen == ["mine"]
    assert current_correlation_id() is None


# -- the user ----------------------------------------------------------------------------------


def test_a_user_id_is_bound_for_the_rest_of_a_task() -> None:
    """It is cut to 128 characters; None removes it."""
    context = contextvars.copy_context()

    def bind() -> list[str | None]:
        seen = [current_user_id()]
        for user in ("user-123", "x" * 10_000, None):
            bind_user_id(user)
            seen.append(current_user_id())
        return seen

    assert context.run(bind) == [None, "user-123", "x" * 128, None]
    assert current_user_id() is None
