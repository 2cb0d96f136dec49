"""Parses PromQL expressions far enough to find their series and labels."""

import re
from dataclasses import dataclass

_WORD = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_SELECTOR = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\s*(?:\{([^}]*)\})?")
_MATCHER = re.compile(r"([a-zA-Z_]\w*)\s*(?:=~|!~|!=|=)\s*\"")
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_KEYWORDS = {"and", "or", "unless", "by", "on", "bool", "offset"}


@dataclass(frozen=True)
class Asked:
    """The series and labels of an expression."""

    series: dict[str, frozenset[str]]
    """The names of series, with the labels that are compared."""
    grouped: frozenset[str]
    """The labels that it groups or joins by."""


def asked(expression: str) -> Asked:
    """Parse an expression."""
    grouped = {
        label.strip()
        for labels in _GROUPING.findall(expression)
        for label in labels.split(",")
        if label.strip()
    }
    rest = _GROUPING.sub(" ", expression)
    rest = re.sub(r"\[[^\]]*\]", " ", rest)
    series: dict[str, frozenset[str]] = {}
    for match in _SELECTOR.finditer(rest):
        name, matchers = match[1], match[2] or ""
        is_function = rest[match.end() :].lstrip().startswith("(")
        inside = rest[: match.start()].count("{") > rest[: match.start()].count("}")
        if is_function or inside or name in _KEYWORDS or not _WORD.fullmatch(name):
            continue
        quoted = rest[: match.start()].count('"') % 2
        if not quoted:
            series[name] = series.get(name, frozenset()) | set(_MATCHER.findall(matchers))
    return Asked(series, frozenset(grouped))
