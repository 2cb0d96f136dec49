"""Keeps secrets out of log lines, whoever wrote them and however they came into the text."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import quote, quote_plus, unquote, urlsplit

from viralfx.settings import Settings, fields
from viralfx.settings.kinds import Secret
from viralfx.telemetry.tracing.credentials import secrets as secrets_of_exporters

_MASK = "***"
_LEAST = 4
"""Characters of a secret: less would black out half of every text, and protects nothing."""
_LEAST_OF_A_PATH = 16
"""Characters of an address's path from which on it is taken for a secret: a token is longer."""

_NESTED = 3
"""How often a text may have been written into another: JSON in JSON, and that in a console."""
_BEARER = re.compile(r"([Bb]earer|BEARER)\s+[\w.~+/=-]{4,}")
_SLASHES = re.compile(r"(:\\*/\\*/)")
"""Where an address begins; some write slashes in JSON with a backslash before each."""
_END = re.compile(r"""[\s"'](?:(?<=\s)|(?=[\s,:;)\]}\\]|$))""")
"""Where one ends for sure: a quotation mark may be one of a password, unless it seems to close."""
_AUTHORITY = re.compile(r"""[^\s/?#\\"'<>(),;]*""")
_AFTER_HOST = re.compile(r"[/?#]")
_PORT = re.compile(r"[0-9]{1,5}\\*/")
_IPV6 = re.compile(r"\[[0-9A-Fa-f:.]+\](?::[0-9]{1,5})?(?:[/?#\\]|$)")
"""A host with colons of its own, and no user before it."""
_ESCAPE = re.compile(r"%[0-9A-F]{2}")
_LISTS = frozenset({"WEBHOOK_SECRET"})
"""Variables that may hold several secrets, with commas or spaces between them."""
_OURS = frozenset({"timestamp", "level", "context"})
"""Fields that nobody else writes."""
_NAMES = _OURS | {"message", "correlationId", "userId", "traceId", "spanId"}


class Redaction:
    """Replaces the secrets it was told of, user and password in any address, and bearer tokens.

    A secret is found as it is and as Python, JSON and addresses write it. A text that was cleaned
    stays as it is when it is cleaned again, unless a secret is of asterisks. In an address that is
    written by hand a password may hold what no address may, but for what seems to end it: a
    quotation mark before a space or comma, or a number before a slash, which seems to be a port.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        """Take the secrets; one of less than four characters is left alone."""
        found = {form for secret in secrets if len(secret) >= _LEAST for form in _forms(secret)}
        # Of two secrets of which one is in the other, the longer is replaced.
        self._words = sorted(found, key=lambda form: (-len(form), form))
        # Where a form is in another, looking for the shorter finds both.
        least = [w for w in self._words if not any(o in w for o in self._words if o != w)]
        self._suspicious = (b"earer", b"BEARER", *dict.fromkeys(map(_in_json, least)))

    def text(self, text: str) -> str:
        """Return a text without secrets, in a time that grows with its length and no faster."""
        # Word by word: that is many times as fast as one expression with all of them.
        for word in self._words:
            text = text.replace(word, _MASK)
        if "@" in text and ("://" in text or "\\/" in text):
            pieces = _SLASHES.split(text)
            pieces[2::2] = map(_without_user, pieces[2::2])
            text = "".join(pieces)
        if "earer" in text or "BEARER" in text:
            text = _BEARER.sub(rf"\1 {_MASK}", text)
        return text

    def suspects(self, line: bytes) -> bool:
        """Tell whether a line of JSON, ASCII alone, may hold a secret."""
        if b"@" in line and (b"://" in line or b"\\/" in line):
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
                text = str(value)
                return value if self.text(text) == text else _MASK


def secrets_of(settings: Settings) -> Iterator[str]:
    """Yield every secret of the settings, and what those that are addresses or lists hold.

    So are those of OpenTelemetry's variables, which are no settings and are read by its SDK.
    """
    yield from secrets_of_exporters(os.environ)
    for field in fields():
        value = field.of(settings)
        if isinstance(value, Secret):
            yield value.value.strip()
            if field.variable in _LISTS:
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
    # Not only what is UTF-8: an environment may hold any bytes.
    quoted = {quote(secret, safe, errors="surrogatepass") for safe in ("", "/")}
    quoted.add(quote_plus(secret, errors="surrogatepass"))
    quoted |= {_ESCAPE.sub(lambda found: found[0].lower(), text) for text in quoted}
    forms = {secret, *quoted}
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


def _without_user(address: str) -> str:
    """Mask user and password in what follows ``://``, and whatever stands after the address."""
    if "@" not in address:
        return address
    found = _END.search(address)
    end = found.start() if found else len(address)
    if _IPV6.match(address, 0, end):
        return address
    user, colon, rest = address[:end].partition(":")
    # Who writes a password into an address by hand often leaves its slashes and @ as they are, so
    # it ends at the last @. Where a port stands, the @ is one of the path.
    if colon and not _AFTER_HOST.search(user) and not _PORT.match(rest):
        at = address.rfind("@", 0, end)
    else:
        found = _AUTHORITY.match(address)
        at = address.rfind("@", 0, found.end() if found else 0)
    return address if at < 0 else f"{_MASK}{address[at:]}"
