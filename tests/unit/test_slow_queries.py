"""Statements in the log: without values."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viralfx.postgres.pool import without_values

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("statement", "logged"),
    [
        ("SELECT 'hunter2'", "SELECT ?"),
        ("SELECT 'it''s hunter2', 1", "SELECT ?, ?"),
        ("SELECT '', ''''", "SELECT ?, ?"),
        (r"SELECT E'it\'s hunter2', 1", "SELECT ?, ?"),
        (r"SELECT e'\\', a", "SELECT ?, a"),
        (r"SELECT 'C:\hunter2', a", "SELECT ?, a"),
        ("SELECT B'1010', X'1F', N'hunter2'", "SELECT ?, ?, ?"),
        ("SELECT U&'d\\0061t' UESCAPE '!'", "SELECT ? UESCAPE ?"),
        ("SELECT $$hunter2$$, $tag$ $$ hunter2 $tag$", "SELECT ?, ?"),
        ("SELECT $1, $12::int", "SELECT $1, $12::int"),
        ("SELECT 1, -2.5, .5, 6., 1e10, 2.5E-3", "SELECT ?, -?, ?, ?, ?, ?"),
        ("SELECT 1_000, 0x1F, 0o17, 0b11", "SELECT ?, ?, ?, ?"),
        ("SELECT t1.c2, col_3 FROM table4 t1", "SELECT t1.c2, col_3 FROM table4 t1"),
        ('SELECT "a ""b"" 1", U&"d\\0061t"', 'SELECT "a ""b"" 1", U&"d\\0061t"'),
        ("SELECT größe, naïve$1 FROM 表5", "SELECT größe, naïve$1 FROM 表5"),
        ("SELECT 'x'::text, '{1,2}'::int[]", "SELECT ?::text, ?::int[]"),
        ("SELECT ARRAY[1,2], a[3], b[1:2]", "SELECT ARRAY[?,?], a[?], b[?:?]"),
        ("SELECT a->>'k', a #> '{b,1}', a -> 0", "SELECT a->>?, a #> ?, a -> ?"),
        ("SELECT 1 -- hunter2\n, 2 /* hunter2 */, 3", "SELECT ? , ? , ?"),
        ("SELECT '-- no comment', '/*', a", "SELECT ?, ?, a"),
        ("  SELECT\n\ta\r\n  FROM b  ", "SELECT a FROM b"),
        ("INSERT INTO a VALUES (1,'x'),(2,'y')", "INSERT INTO a VALUES (?,?),(?,?)"),
        ("SELECT date'2020-01-01', name'hunter2'", "SELECT date?, name?"),
        ("SELECT 'a'\n  'b'", "SELECT ? ?"),
        ("SELECT a FROM b WHERE c=1AND d='x'", "SELECT a FROM b WHERE c=? d=?"),
        ("", ""),
    ],
)  # fmt: skip
def test_literals_are_replaced(statement: str, logged: str) -> None:
    """By question marks; comments are dropped, the rest stays."""
    assert without_values(statement) == logged


@pytest.mark.parametrize(
    ("statement", "logged"),
    [
        ("SELECT a, 'hunter2", "SELECT a, ?"),
        ("SELECT a, E'hunter2\\'", "SELECT a, E?"),
        ("SELECT a, $$hunter2", "SELECT a, ?"),
        ("SELECT a, $x$hunter2$$ $y$", "SELECT a, ?"),
        ('SELECT a, "hunter2', "SELECT a, ?"),
        ("SELECT a, /* hunter2", "SELECT a, ?"),
    ],
)
def test_unterminated_literals_are_dropped(statement: str, logged: str) -> None:
    """The text is omitted from there."""
    assert without_values(statement) == logged


@pytest.mark.parametrize(
    "statement",
    [
        # With standard_conforming_strings off, the string goes on after the backslash.
        r"SELECT 'it\'s hunter2', 1",
        # The second part of such a string has escapes like the first.
        "SELECT E'a'\n'it\\'s hunter2'",
        # Not an escape: these letters are the end of a type's name.
        r"SELECT date'\', 'hunter2', 'x'",
        # Comments nest in Postgres.
        "SELECT /* a /* b */ hunter2 */ 1",
        "SELECT 0o17hunter2",
        "SELECT a$b$, 'hunter2', $b$",
        "SELECT $1$$hunter2$$",
        "SELECT 1$$hunter2$$",
        "SELECT \N{GRINNING FACE}$$, 'hunter2', $$",
        "SELECT $\N{GRINNING FACE}$hunter2$\N{GRINNING FACE}$",
    ],
)
def test_ambiguous_text_counts_as_a_value(statement: str) -> None:
    """In doubt, too little is logged."""
    assert SECRET not in without_values(statement)


def test_long_statement_is_truncated() -> None:
    """Before it is parsed."""
    logged = without_values("SELECT " + ", ".join(f"column_{n}" for n in range(10**6)))

    assert logged.startswith("SELECT column_0, column_1, ")
    assert len(logged) < 2100
    assert logged.endswith(" ...")


def test_value_at_the_truncation_is_hidden() -> None:
    """No part of it is logged."""
    for padding in range(9_950, 10_020):
        logged = without_values(f"SELECT {' ' * padding}'{SECRET * 3}', 'x'")
        assert "hunter" not in logged


_BETWEEN = st.sampled_from(
    ["a", "b1", ", ", "\n", "1", "'x'", "$1", "::text", "->>", "--c\n", "/*c*/", '"q"', "(", ")"]
)  # fmt: skip
_QUOTED = st.sampled_from(
    ["'{}'", "'a''{}'", "E'\\'{}'", "e'{}\\\\'", "$${}$$", "$t${}$t$", "U&'{}'", "B'{}'",
     "N'{}'", "-- {}\n", "/* {} */"]
)  # fmt: skip
_ENDLESS = st.sampled_from(["", "'{}", "E'{}", "$${}", "$t${}$$", "/* {}", "/* /* {} */"])


@given(st.lists(st.one_of(_BETWEEN, _QUOTED), max_size=12), _ENDLESS)
def test_literal_never_survives(parts: list[str], last: str) -> None:
    """In any surrounding text."""
    # Separated from the text before: after a word, a quote may start another token.
    statement = " ".join([*parts, last]).replace("{}", SECRET)

    assert SECRET not in without_values(statement)


@given(st.text(alphabet="aeE1'\"$\\/*-&U\n; é", max_size=30))
def test_any_text_gives_one_line(statement: str) -> None:
    """Without a quote of a value in it."""
    logged = without_values(statement)

    assert "\n" not in logged
    assert "'" not in re.sub(r'"[^"]*"', "", logged)
