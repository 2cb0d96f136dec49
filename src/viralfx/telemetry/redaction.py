"""Keeps secrets out of log lines, whoever wrote them and however they came into the text."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import quote, quote_plus, unquote, urlsplit

from viralfx.settings import Settings, fields
from viralfx.settings.kinds import Secret
from viralfx.telemetry.tracing.variables import secrets as secrets_of_exporters

_MASK = "***"
_LEAST = 4
"""Characters of a secret: less would black out half of every text, and protects nothing."""
_LEAST_OF_A_PATH = 16
"""Characters of an address's path from which on it is taken for a secret: a token is longer."""

_NESTED = 3
"""How often a text may have been written into another: JSON in JSON, and that in a console."""
_ADDRESS = r"://[^\s/@:]*:[^\s/@]+@"
_BEARER = r"(?:[Bb]earer|BEARER)\s+[\w.~+/=-]{4,}"
_OURS = frozenset({"timestamp", "level", "context"})
"""Fields that nobody else writes."""
_NAMES = _OURS | {"message", "correlationId", "userId", "traceId", "spanId"}


class Redaction:
    """Replaces the secrets it was told of, user and password in any address, and bearer tokens.

    A secret is found as it is and as Python, JSON and addresses write it.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        """Take the secrets; one of less than four characters is left alone."""
        found = {form for secret in secrets if len(secret) >= _LEAST for form in _forms(secret)}
        # Of two secrets of which one begins with the other, the longer is replaced.
        self._words = sorted(found, key=lambda form: (-len(form), form))
        self._pattern = re.compile("|".join([*map(re.escape, self._words), _ADDRESS, _BEARER]))
        # Searching for each word is several times as fast as one expression with all of them.
        self._suspicious = (b"earer", b"BEARER", *dict.fromkeys(map(_in_json, self._words)))

    def text(self, text: str) -> str:
        """Return a text without secrets."""
        return self._pattern.sub(_mask, text)

    def suspects(self, line: bytes) -> bool:
        """Tell whether a line of JSON, ASCII alone, may hold a secret."""
        if b"@" in line and b"://" in line:
            return True
        for word in self._suspicious:  # noqa: SIM110 - a generator would cost as much again
            if word in line:
                return True
        return False

    def line(self, line: bytes) -> bytes:
        """Return a line of JSON, ASCII alone, without secrets: JSON still, whatever they are."""
        if not self.suspects(line):
            return line
        event: dict[str, Any] = json.loads(line)
        # One by one, or a secret that looks like JSON would leave none.
        clean = {
            name if name in _NAMES else self.text(name): (
                value if name in _OURS else self._value(value)
            )
            for name, value in event.items()
        }
        return json.dumps(clean, separators=(",", ":")).encode()

    def _value(self, value: object) -> object:
        match value:
            case str():
                return self.text(value)
            case dict():
                return {self.text(str(name)): self._value(one) for name, one in value.items()}
            case list():
                return [self._value(one) for one in value]
            case bool() | None:
                return value
            case _:
                return _MASK if self._pattern.search(str(value)) else value


def secrets_of(settings: Settings) -> Iterator[str]:
    """Yield every secret of the settings, and what those that are addresses or lists hold.

    So are those of OpenTelemetry's variables, which are no settings and are read by its SDK.
    """
    yield from secrets_of_exporters(os.environ)
    for field in fields():
        value = field.of(settings)
        if isinstance(value, Secret):
            yield value.value.strip()
            yield from value.value.replace(",", " ").split()
            yield from _inside(value.value.strip())


def _inside(address: str) -> Iterator[str]:
    try:
        parts = urlsplit(address)
    except ValueError:
        return
    if parts.scheme and parts.netloc:
        if parts.password:
            yield unquote(parts.password)
            yield parts.password
        # Of who was given an address to post to, the path is often the credential.
        if len(parts.path) >= _LEAST_OF_A_PATH and parts.scheme in {"http", "https"}:
            yield parts.path
        if len(parts.query) >= _LEAST_OF_A_PATH:
            yield parts.query


def _forms(secret: str) -> set[str]:
    forms = {secret, quote(secret, safe=""), quote(secret, safe="/"), quote_plus(secret)}
    for _ in range(_NESTED):
        forms |= _written(forms)
    return forms


def _written(texts: set[str]) -> set[str]:
    """Return texts as Python and JSON write them, without the quotation marks."""
    return {repr(text)[1:-1] for text in texts} | {_json_text(text) for text in texts}


def _json_text(text: str) -> str:
    return json.dumps(text)[1:-1]


def _in_json(text: str) -> bytes:
    return _json_text(text).encode()


def _mask(found: re.Match[str]) -> str:
    text = found[0]
    if text.startswith("://") and text.endswith("@"):
        return f"://{_MASK}@"
    if text[1:6].lower() == "earer" and text[6:7].isspace():
        return f"{text[:6]} {_MASK}"
    return _MASK
