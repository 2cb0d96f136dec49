"""The log of slow queries: each once, without the values in it."""

import logging
import re
from collections.abc import Callable

from asyncpg.connection import LoggedQuery

from viralfx.adapters.postgres.errors import is_loss

_logger = logging.getLogger("viralfx.database")

_LONGEST = 2000
"""Characters of a statement that are logged."""

# In the order in which one hides another: comments and quoted text before numbers.
_PARTS = re.compile(
    r"""
    (?P<comment> --[^\n]* | /\*.*?\*/ )
  | (?P<name> "(?:[^"]|"")*" | \$[0-9]+ | [^\W\d][\w$]* (?<!\b[eE]) (?<!\b[uU]&) (?!') )
  | (?P<value>
        [eE]'(?:[^'\\]|\\.|'')*' | (?:[bBxXnN]|[uU]&)?'(?:[^']|'')*'
      | \$(?P<tag>[^\W\d]\w*)?\$.*?\$(?(tag)(?P=tag))\$
      | (?:0[xX][0-9a-fA-F_]+|[0-9][0-9_]*\.?[0-9_]*(?:[eE][+-]?[0-9]+)?|\.[0-9]+)
    )
  | (?P<open> ' .* )
    """,
    re.VERBOSE | re.DOTALL,
)


class SlowQueryLog:
    """Looks at each query that ended: counts and logs the slow, and reports what looks like loss.

    It is called by the driver after the query, in the context of the task that made it.
    """

    def __init__(self, threshold: float, on_doubt: Callable[[], None]) -> None:
        """Take the ``threshold`` in seconds (0: nothing is slow)."""
        self._threshold = threshold
        self._on_doubt = on_doubt
        self.count = 0
        """How many there were."""

    def __call__(self, query: LoggedQuery) -> None:
        """Take in one query."""
        if query.exception is not None and is_loss(query.exception):
            self._on_doubt()
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


def without_values(statement: str) -> str:
    """Replace literals in SQL by ``?``, drop comments, and put it on one line.

    Values sent beside the statement are in none of it anyway. What cannot be understood to its
    end is left out from there.
    """
    text = _PARTS.sub(_replacement, statement)
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."


def _replacement(match: re.Match[str]) -> str:
    if match["comment"] is not None:
        return " "
    if match["name"] is not None:
        return match["name"]
    return "?"
