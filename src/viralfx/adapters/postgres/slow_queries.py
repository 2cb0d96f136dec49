"""The log of slow queries: each once, without the values in it."""

import logging
import re

from asyncpg.connection import LoggedQuery

from viralfx.domain.operation_times import OperationListener, ignore_operation

_logger = logging.getLogger("viralfx.database")

_LONGEST_OPERATION = 20
"""Characters, and more than any word that a statement may begin with."""
_READ, _LONGEST = 10_000, 2_000
"""Characters of a statement that are looked at, and that are logged."""

# Names as Postgres's own scanner reads them: every character beyond ASCII may be in one. In doubt
# too much counts as a value: where a backslash stands before a quote, a setting of the server
# decides what it means, and what is in a comment in a comment is not worth a stack.
_FIRST, _NEXT = r"[A-Za-z_\x80-\U0010FFFF]", r"\w\x80-\U0010FFFF"
_PARTS = re.compile(
    rf"""
    (?P<comment> --[^\n\r]*+ | /\*(?:[^*/]|\*(?!/)|/(?!\*))*+\*/ )
  | (?P<value>
        [eE]'(?:[^'\\]|\\.|'')*+'
      | (?:[bBxXnN]|[uU]&)?'(?:[^'\\]|\\(?!')|'')*+'
      | \$(?P<tag>(?:{_FIRST}[{_NEXT}]*+)?)\$ .*? \$(?P=tag)\$
      | \.?[0-9](?:[eE][+-](?=[0-9])|[\w.])*+
    )
  | (?P<kept> (?:[uU]&)?"(?:[^"]|"")*+" | \$[0-9]++ | {_FIRST}[{_NEXT}$]*+ )
  | (?P<endless> (?: ['"] | /\* | \$(?:{_FIRST}[{_NEXT}]*+)?\$ ) .* )
    """,
    re.VERBOSE | re.DOTALL,
)


class SlowQueryLog:
    """Looks at each query that ended: counts and logs the slow ones.

    It is called by the driver after the query, in the context of the task that made it. About
    cursors, prepared statements and COPY the driver says nothing, nor about a query that ended
    with its connection.
    """

    def __init__(self, threshold: float) -> None:
        """Take the ``threshold`` in seconds (0: nothing is slow)."""
        self._threshold = threshold
        self.observe: OperationListener = ignore_operation
        """Is told of every query, slow or not."""
        self.count = 0
        """How many there were."""

    def __call__(self, query: LoggedQuery) -> None:
        """Take in one query."""
        self.observe(_operation(query.query), query.elapsed, query.exception)
        if not self._threshold or query.elapsed < self._threshold:
            return
        self.count += 1
        extra: dict[str, object] = {
            "statement": without_values(query.query),
            "duration": round(query.elapsed * 1000),
        }
        if query.exception is not None:
            extra["error"] = type(query.exception).__name__
        _logger.warning("Slow query", extra=extra)


def _operation(statement: str) -> str:
    word = statement.lstrip()[:_LONGEST_OPERATION].split(None, 1)
    return word[0].upper().rstrip(";") if word and word[0].rstrip(";").isalpha() else "_OTHER"


def without_values(statement: str) -> str:
    """Replace literals in SQL by ``?``, drop comments, and put it on one line.

    Values sent beside the statement are in none of it anyway. What cannot be understood to its
    end is left out from there.
    """
    text = _PARTS.sub(_replacement, statement[:_READ])
    text = " ".join(text.split())
    whole = len(statement) <= _READ and len(text) <= _LONGEST
    return text if whole else text[:_LONGEST] + " ..."


def _replacement(match: re.Match[str]) -> str:
    if match["comment"] is not None:
        return " "
    return match["kept"] or "?"
