"""Prints the words of the old dialect that prose or names hold, as advice: `just words`.

The project speaks the language of the field. This file quotes the words; no other file should.
"""

import io
import re
import sys
import tokenize
from bisect import bisect_right
from collections.abc import Iterator
from functools import cache
from itertools import accumulate
from pathlib import Path

ROOT = Path(__file__).parents[1]
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

SHAPELESS = {"utils", "util", "common", "helpers", "helper", "base", "misc"}
"""Names of files that do not name a subject."""

QUOTATIONS = ("tests/words.py",)


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


def main(root: Path = ROOT) -> int:
    """Print each word with its file and line; return an exit code, 1 with words."""
    count = 0
    for path in files(root):
        name = path.relative_to(root).as_posix()
        if path.stem in SHAPELESS:
            count += 1
            print(f"{name}: names no subject")
        if name not in QUOTATIONS:
            for word in found_in(name, path.read_text(encoding="utf-8")):
                count += 1
                print(f"{name}:{word}")
    print(f"{count} words of the old dialect")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
