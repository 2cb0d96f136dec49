"""Tests of the problems of a configuration as values."""

import pytest

from viralfx.core.errors import ConfigurationError, Problem
from viralfx.domain.doctor import Area, finding_of, warned

LINES = {
    "PORT: 'x' is not a whole number": Problem("PORT", "'x' is not a whole number"),
    "PORT: it is in use; choose another": Problem("PORT", "it is in use", "choose another"),
    "A: one; two; three": Problem("A", "one; two", "three"),
    "--queue: there is no queue named 'a: b'; did you mean c?": Problem(
        "--queue", "there is no queue named 'a: b'", "did you mean c?"
    ),
    "there is no settled name": Problem("", "there is no settled name"),
    "no name; set one": Problem("", "no name", "set one"),
    "A: ends with a semicolon; ": Problem("A", "ends with a semicolon; "),
    "; nothing before": Problem("", "; nothing before"),
    "A: ": Problem("", "A: "),
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_is_a_problem_and_the_problem_is_the_line(line: str) -> None:
    """Lines of applications become values, and no character of them changes."""
    error = ConfigurationError([line])

    assert error.details == (LINES[line],)
    assert error.problems == (line,) == (str(LINES[line]),)


def test_an_error_takes_values_and_lines() -> None:
    """Its text has all of them, in their order."""
    error = ConfigurationError([Problem("A", "is odd", "unset it"), "B: is even"])

    assert error.problems == ("A: is odd; unset it", "B: is even")
    assert str(error) == "A: is odd; unset it; B: is even"


def test_a_finding_has_one_line_and_a_remedy() -> None:
    """A value of several lines is joined, and a problem without a remedy names what to correct."""
    finding = finding_of(Problem("A", "no file /one\n/two"), Area.STATE)
    warning = finding_of(Problem("A", "is odd", "unset it"), Area.STATE, warned)

    assert (finding.found, finding.remedy) == ("A: no file /one /two", "correct A")
    assert (warning.found, warning.remedy) == ("A: is odd", "unset it")
    assert (finding.verdict, warning.verdict) == ("fail", "warn")
