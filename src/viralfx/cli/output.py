"""The output of commands, tables and JSON that cannot control a terminal, and their questions."""

import re
import shutil
import sys
from collections.abc import Sequence

import msgspec

_MIN_WIDTH = 40


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells below each other; in a terminal a line is cut at its width."""
    cleaned = [[plain(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cleaned) for column in range(len(cleaned[0]) - 1)]
    limit = None
    if sys.stdout.isatty():
        limit = max(_MIN_WIDTH, shutil.get_terminal_size().columns)
    for row in cleaned:
        cells = [cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)]
        line = "  ".join(cells).rstrip()
        print(line if limit is None or len(line) <= limit else f"{line[: limit - 1]}…")


def print_json(value: object) -> None:
    """Print a value as JSON in ASCII, with indentation."""
    document = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    # Every other character is in a string, where an escape means the same.
    print(_NOT_PRINTABLE_ASCII.sub(_escape_in_json, document))


_NOT_PRINTABLE_ASCII = re.compile(r"[^\x20-\x7e\n]")


def _escape_in_json(found: re.Match[str]) -> str:
    units = found.group().encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))


def readable(document: bytes) -> str:
    """Return JSON as text; bytes that are no UTF-8 are escaped."""
    return document.decode("utf-8", "backslashreplace")


def plain(text: str) -> str:
    """Return a text in one line that cannot control a terminal."""
    encoding = sys.stdout.encoding or "utf-8"
    visible = "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )
    return visible.encode(encoding, "backslashreplace").decode(encoding)


def hint_of(payload: bytes) -> str:
    """Return how to write a payload that is no JSON; nothing for one that is."""
    try:
        msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return """; the payload is JSON, such as '{"name": "Ada"}', '"Ada"' or null"""
    return ""


def agrees(question: str) -> bool:
    """Ask an operator; return True for a yes."""
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}
