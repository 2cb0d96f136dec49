"""The strength of bearer tokens: which ones a program of guesses finds soon.

An estimate of bits, as guessing programs try candidates: a letter of a word counts less than a
random one, and a character that follows from the ones before counts nothing.
"""

import math
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise

from viralfx.settings.tokens import Token, place_of

MIN_TOKEN_CHARACTERS = 16
MIN_DISTINCT_CHARACTERS = 6
MIN_BITS = 50.0
"""16 random hexadecimal digits have 64 bits, four random words 44."""

_JUDGED_CHARACTERS = 1024
"""The rest of a longer token is not judged: a file may hold anything, and the time grows with the
square of the length."""

_PLACEHOLDER = re.compile(r"<.*>|\$?\{.*\}|\[.*\]|%.*%|\$\(.*\)")
_COMMON = re.compile(
    "change|replace|placeholder|example|sample|default|random|generate|insert|please|your|this|here"
    "|todo|fixme|secret|token|passw(?:or)?d|pass|key|bearer|admin|root|user|login|letmein|welcome"
    "|management|console|production|staging|development|test|demo|api|viralfx|openssl|rand|hex|me"
)
"""Words of placeholders and of bad tokens, which each guess begins with."""
_COMMON_WORD_BITS = 4.0
_BITS_OF_LETTER = 1.75
"""A letter of a word: one of 2048 words, 11 bits, has six letters."""
_LEET = str.maketrans("013457@$!", "oleastasi")
_ROWS = ("1234567890", "qwertyuiop", "asdfghjkl", "zxcvbnm")

# The most frequent pairs of letters in English words. They are 85 % of the pairs of words, and 21 %
# of random pairs.
_FOLLOWING = {
    "a": "bcdgiklmnrst",
    "b": "el",
    "c": "aehklot",
    "d": "aeios",
    "e": "acdeflmnprstvx",
    "f": "aio",
    "g": "er",
    "h": "aeio",
    "i": "cdeglmnorstv",
    "k": "es",
    "l": "aeilos",
    "m": "aeiop",
    "n": "acdeginost",
    "o": "bcdlmnoprstuw",
    "p": "aelort",
    "q": "u",
    "r": "aeiosty",
    "s": "aehiostu",
    "t": "aehiorst",
    "u": "elnrst",
    "v": "ei",
    "w": "aehio",
}
_LETTERS = re.compile(r"[A-Z]?[a-z]{3,}|[A-Z]{4,}|(?<![A-Za-z0-9\0])[A-Za-z]{1,2}(?![A-Za-z0-9\0])")
_MIN_SHARE = 0.6
"""Frequent pairs among those of a word."""

REMEDY = "set it to the output of `openssl rand -hex 32`"


def weakness(token: str) -> str | None:
    """Return why a bearer token is too weak, as a predicate; None for a strong one."""
    token = token.strip()[:_JUDGED_CHARACTERS]
    if _PLACEHOLDER.fullmatch(token):
        return "is a placeholder"
    if len(token) < MIN_TOKEN_CHARACTERS:
        return f"has fewer than {MIN_TOKEN_CHARACTERS} characters"
    if len(set(token)) < MIN_DISTINCT_CHARACTERS:
        return "repeats a few characters and can be guessed"
    if bits(token) < MIN_BITS:
        return "consists of words, sequences or repetitions and can be guessed"
    return None


def bits(token: str) -> float:
    """Return an estimate of the logarithm, to base 2, of the guesses that find a token."""
    token = _unit(token)
    found, rest = 0.0, token
    lowered = token.lower()
    # Common words also with digits for letters, as in p4ssw0rd.
    for text in dict.fromkeys((lowered, lowered.translate(_LEET))):
        spans = [match.span() for match in _COMMON.finditer(text)]
        for start, end in spans:
            if "\0" not in rest[start:end]:
                found += _COMMON_WORD_BITS
                rest = rest[:start] + "\0" * (end - start) + rest[end:]
    for match in _LETTERS.finditer(rest):
        if _is_word(match[0].lower()):
            found += _BITS_OF_LETTER * len(match[0])
            rest = rest[: match.start()] + "\0" * len(match[0]) + rest[match.end() :]
    left = rest.replace("\0", "")
    return found + (math.log2(_alphabet(left)) * _surprises(rest) if left else 0.0)


def _unit(token: str) -> str:
    """Return the part that a token repeats, or all of it."""
    for length in range(1, len(token) // 2 + 1):
        unit = token[:length]
        if (unit * (len(token) // length + 1)).startswith(token):
            return unit
    return token


def _is_word(letters: str) -> bool:
    pairs = [b in _FOLLOWING.get(a, "") for a, b in pairwise(letters)]
    return sum(pairs) >= _MIN_SHARE * len(pairs)


def _alphabet(token: str) -> int:
    """Return the number of characters that a guess has to try for each place."""
    if re.fullmatch(r"[0-9a-f]+|[0-9A-F]+", token):
        return 10 if token.isdigit() else 16
    sizes = ((r"[a-z]", 26), (r"[A-Z]", 26), (r"[0-9]", 10), (r"[^A-Za-z0-9]", 2))
    return sum(size for pattern, size in sizes if re.search(pattern, token))


def _surprises(text: str) -> int:
    """Count the characters that do not continue a repetition, or a sequence of three and more."""
    count, steps = 0, (0, 0)
    for place, character in enumerate(text):
        steps = (steps[1], _step(text[place - 1].lower(), character.lower()) if place else 0)
        continues = steps[1] != 0 and steps[0] == steps[1]
        # A separator is as easy to guess as the end of a word.
        if character not in "\0 -_.:/" and not continues:
            count += 1
    return count


_REPEATED, _UP, _DOWN, _RIGHT, _LEFT = range(1, 6)


def _step(before: str, character: str) -> int:
    """Return in which order a character follows another one; 0: in none."""
    distance = ord(character) - ord(before)
    if distance in {0, 1, -1}:
        return {0: _REPEATED, 1: _UP, -1: _DOWN}[distance]
    pair = before + character
    if any(pair in row for row in _ROWS):
        return _RIGHT
    return _LEFT if any(pair[::-1] in row for row in _ROWS) else 0


def weaknesses(tokens: Iterable[Token]) -> Iterator[tuple[str, str]]:
    """Yield the name of each token that production refuses, and why, as a predicate.

    A secret that two names have is refused, too: its holder has the rights of both.
    """
    holders: dict[bytes, str] = {}
    for token in tokens:
        name = token.principal.name
        problems = [weakness(secret.decode("utf-8", "surrogateescape")) for secret in token.secrets]
        others = [holders.setdefault(secret, name) for secret in token.secrets]
        problems += [f"is that of {place_of(other)}, too" for other in others if other != name]
        yield from ((name, problem) for problem in dict.fromkeys(problems) if problem)
