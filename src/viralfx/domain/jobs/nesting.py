"""How deep a JSON document is nested: readers of JSON recurse, and a stack is finite."""

import re

MOST = 500
"""Levels that a payload may have: what every reader and printer of JSON here can take."""

_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[{\]}]', re.DOTALL).finditer


def is_too_deep(document: bytes) -> bool:
    """Tell whether a document has more than :data:`MOST` levels; it may be malformed, too."""
    if document.count(b"[") + document.count(b"{") <= MOST:  # by far the most
        return False
    depth = 0
    for token in _TOKENS(document):
        match token[0]:
            case b"[" | b"{":
                depth += 1
                if depth > MOST:
                    return True
            case b"]" | b"}":
                depth -= 1
            case _:
                pass  # a text
    return False
