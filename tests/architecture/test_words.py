"""The project speaks the language of the field: no word of the old dialect, in prose or names.

This file quotes the words; no other file may.
"""

import io
import re
import tokenize
from bisect import bisect_right
from collections.abc import Iterator
from functools import cache
from itertools import accumulate
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("src", "docs", "adr", "tests", "benchmarks", "deploy", ".ci")
PAGES = (
    *("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"),
    *("Dockerfile", "justfile", "pyproject.toml"),
)
TEXTS = {".md", ".js", ".html", ".css", ".sql", ".yaml", ".yml", ".cfg", ".conf", ".service", ""}
FOREIGN = {"node_modules", "vendor"}

PROSE = re.compile(
    r"""\b(?:
        nobody | somebody | anybody | whoever | whatever | likewise | besides
        | all[ ]the[ ]same | of[ ]ours | of[ ]none | in[ ]vain | for[ ]ever
        | but[ ]for | for[ ]want[ ]of
        | (?:is|are|was|were|be|been)[ ]told | (?:tells?|told)[ ]of
        | (?:take|takes|took|taken|taking)[ ]in(?!to)
        | hears? | heard | hearing | bells? | ringer | ringing | rung | rings?(?![ ]buffer)
        | suspects | settlers? | coalescers? | conversations? | departures?
        | (?:a|an|the|each|every|one|no|its|his|next|last|first)[ ](?:looks?(?!-)|reach|room)
        | looks?[ ]interval | make[ ]room | enough[ ]room
        | (?:the|an|each|every|one|of)[ ]exchanges?
    )\b
    | (?:^|[.;:][ ]+)as[ ]for\b
    | (?:^|[.;:][ ]+)(?:Who|What)[ ](?![^.?!]*\?)(?=[a-z])
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""Words, and free relatives at the beginning of a sentence that is no question."""

NAMES = re.compile(
    r"""(?:^|_)(?:
        nobody | somebody | anybody | whoever | whatever | likewise | besides
        | hears? | heard | ear | bells? | ringer | ringing | rung | rings?
        | suspects | settlers? | coalesc\w* | departures? | conversations? | exchanges?
        | tells? | told | in_vain | for_ever | all_the_same
    )(?:_|$)
    | ^test_(?:who|what|whose)_
    | ^_?looks?(?:_(?!up)|$)
    """,
    re.VERBOSE,
)
"""Parts of a name in lower case, between underlines."""

CONSTANTS = re.compile(
    r"^_?(?:[A-Z0-9]+_)*(?:LEAST|MOST|LONGEST|TOGETHER|MUCH|LAST_WORDS|EXACTLY|IN_A_HURRY|PATIENTLY"
    r"|OURS)(?:_[A-Z0-9]+)*$|^_(?:NOTICE|RAN|PATIENCE)$"
)
"""Constants that name neither a subject nor a unit."""

QUOTATIONS = ("tests/architecture/test_words.py",)


def files(root: Path) -> Iterator[Path]:
    """Yield the files that are read."""
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            is_text = path.suffix in {".py", *TEXTS} and path.is_file()
            if is_text and not FOREIGN & {*path.parts}:
                yield path
    yield from (root / name for name in PAGES if (root / name).exists())


def lower(name: str) -> str:
    """Return a name in lower case with underlines between its parts."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def found_in(name: str, text: str) -> list[str]:
    """Return each word of the dialect in a file, with its line."""
    return [*(_tokens(text) if name.endswith(".py") else _prose(text, 1))]


def _prose(text: str, line: int) -> Iterator[str]:
    """Search text as if it had no line breaks; ``line`` is the number of its first line."""
    lines = [re.sub(r"^[\s#|]+|^\* |\s+$", "", each) for each in text.split("\n")]
    ends = list(accumulate(len(each) + 1 for each in lines))
    for match in PROSE.finditer(" ".join(lines)):
        at = bisect_right(ends, match.end() - 1)
        yield f"{line + at}: {match[0].strip(' .;:')}"


def _tokens(text: str) -> Iterator[str]:
    comment: list[str] = []
    first = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            first = first if comment else token.start[0]
            comment.append(token.string.lstrip("#: "))
            continue
        if token.type in {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}:
            continue
        if comment:
            yield from _prose("\n".join(comment), first)
            comment = []
        if token.string == '"nobody"':
            continue  # the account of the system
        if token.type == tokenize.STRING or "FSTRING_MIDDLE" in tokenize.tok_name[token.type]:
            yield from _prose(token.string.strip("\"'rbf"), token.start[0])
        elif token.type == tokenize.NAME and _is_dialect(token.string):
            yield f"{token.start[0]}: {token.string}"


@cache
def _is_dialect(name: str) -> bool:
    return bool(NAMES.search(lower(name)) or CONSTANTS.match(name))


def test_the_dialect_is_gone() -> None:
    """No file but this one holds a word of it."""
    found = {}
    for path in files(ROOT):
        name = path.relative_to(ROOT).as_posix()
        if name not in QUOTATIONS and (words := found_in(name, path.read_text(encoding="utf-8"))):
            found[name] = words

    assert found == {}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("page.md", "A client that leaves is noticed by nobody."),
        ("page.md", "It stays\nfor ever."),
        ("page.md", "It is\ntold the state."),
        ("page.md", "That is all. Who asks shares it."),
        ("code.py", '"""Take in a line."""'),
        ("code.py", "x = 1  # all the\n# same"),
        ("code.py", "raise ValueError('whatever it is')"),
        ("code.py", "x = f'{x} is told of'"),
        ("code.py", "bell_of = 1"),
        ("code.py", "def test_who_asks_shares_it(): ..."),
        ("code.py", "class JobBell: ..."),
        ("code.py", "_LEAST = 1"),
        ("code.py", "LONGEST_SECONDS = 1"),
        ("code.py", "def _look(): ..."),
    ],
)
def test_a_word_of_the_dialect_is_found(name: str, text: str) -> None:
    """In prose over the end of a line, in strings, comments and names."""
    assert len(found_in(name, f"{text}\n")) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("page.md", "What does a probe cost? The same as for any other request."),
        ("page.md", "The spring of a string is taken into account; look it up."),
        ("code.py", "look_up = clear = DEAR = string = 1"),
    ],
)
def test_plain_words_pass(name: str, text: str) -> None:
    """Parts of other words, questions, and names that the field uses."""
    assert found_in(name, f"{text}\n") == []
