"""Redacts secrets in log lines, of any logger and in any encoding."""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import quote, quote_plus, unquote, urlsplit

from viralfx.settings import DatabaseAddress, Settings, fields
from viralfx.settings.groups import MIN_SECRET_CHARACTERS, Secret
from viralfx.settings.rotation import mask_new_secrets
from viralfx.telemetry.tracing.variables import secrets as secrets_of_exporters

_MASK = "***"
_MIN_VALUE_CHARACTERS = 4
"""Shorter secrets are not redacted: they occur in ordinary text and protect nothing."""
_MIN_PATH_CHARACTERS = 16
"""A path or query in a secret address is itself treated as a secret from this length on."""

_MAX_ADDED = 8
_NESTING_LEVELS = 3
"""How many levels of escaping are recognised, such as JSON in JSON in console output."""
_BEARER = re.compile(r"([Bb]earer|BEARER)\s+[\w.~+/=-]{4,}")
_SLASHES = re.compile(r"(:\\*/\\*/)")
"""Where an address begins. Some JSON encoders escape slashes with a backslash."""
_END = re.compile(r"""[\s"'](?:(?<=\s)|(?=[\s,:;)\]}\\]|$))""")
"""Where an address ends. A quotation mark counts only where it closes: a password may have one."""
_AUTHORITY = re.compile(r"""[^\s/?#\\"'<>(),;]*""")
_AFTER_HOST = re.compile(r"[/?#]")
_PORT = re.compile(r"[0-9]{1,5}\\*/")
_IPV6 = re.compile(r"\[[0-9A-Fa-f:.]+\](?::[0-9]{1,5})?(?:[/?#\\]|$)")
"""A host that contains colons itself, without a user before it."""
_ESCAPE = re.compile(r"%[0-9A-F]{2}")
_LISTS = frozenset(
    {
        "WEBHOOK_SECRET",
        "WEBHOOK_SHARED_SECRET",
        "WEBHOOK_KEYS",
        "ALERT_WEBHOOK_SECRET",
        "MANAGEMENT_TOKEN",
        "API_TOKEN",
    }
)
"""Variables that may hold several secrets, separated by commas or spaces, after a name and =."""
_NAMED = re.compile(r"[^=]*=(?=whsec_)")
_OWN_FIELDS = frozenset({"timestamp", "level", "context"})
"""Fields that only the formatter sets, so that they hold no secret."""
_KNOWN_FIELDS = _OWN_FIELDS | {"message", "correlationId", "userId", "traceId", "spanId"}


class Redaction:
    """Replaces known secrets, user and password in any address, and bearer tokens by ``***``.

    A secret is found verbatim and as Python, JSON and URLs encode it. Redaction is idempotent
    unless a secret consists of asterisks. A password in a hand-written address may contain
    characters that URLs forbid, except those that look like the end of the user part: a quotation
    mark before a space or comma, and a number before a slash, which looks like a port.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        """Secrets of fewer than four characters are ignored.

        Those of fewer than eight may be ordinary words, so they are replaced only as a value: as
        the whole text, or after a punctuation mark, as in ``key=value`` or ``'value'``.
        """
        self._given = frozenset(secrets)
        self._added: tuple[str, ...] = ()
        self._prepare()
        mask_new_secrets(self)

    def add(self, secret: str) -> None:
        """Replace one more secret. Of those added, the last eight are replaced.

        Passwords and tokens change while the program runs, and each costs time in each line.
        """
        if secret not in self._given and secret not in self._added:
            self._added = (*self._added, secret)[-_MAX_ADDED:]
            self._prepare()

    def _prepare(self) -> None:
        found: set[str] = set()
        short: set[str] = set()
        for secret in (*self._given, *self._added):
            if len(secret) >= MIN_SECRET_CHARACTERS:
                found |= _forms(secret)
            elif len(secret) >= _MIN_VALUE_CHARACTERS:
                short |= _forms(secret)
        # If one secret contains another, the longer one is replaced first.
        words, values = (
            sorted(all_, key=lambda f: (-len(f), f)) for all_ in (found, short - found)
        )
        # If one form contains another, searching for the shorter one finds both.
        every = [*words, *values]
        shortest = [w for w in every if not any(o in w for o in every if o != w)]
        # The thread that writes the log may read them at any time.
        self._words = words
        self._values = _values_of(values) if values else None
        self._markers = (b"earer", b"BEARER", *dict.fromkeys(map(_in_json, shortest)))

    def text(self, text: str) -> str:
        """Return the text without secrets; the time is linear in its length."""
        # One replacement per secret is many times as fast as one regular expression for all.
        for word in self._words:
            text = text.replace(word, _MASK)
        if self._values is not None:
            text = self._values.sub(_MASK, text)
        if "@" in text and ("://" in text or "\\/" in text):
            pieces = _SLASHES.split(text)
            pieces[2::2] = map(_without_user, pieces[2::2])
            text = "".join(pieces)
        if "earer" in text or "BEARER" in text:
            text = _BEARER.sub(rf"\1 {_MASK}", text)
        return text

    def may_hold_secret(self, line: bytes) -> bool:
        """Return True if a line of ASCII-only JSON may hold a secret."""
        if b"@" in line and (b"://" in line or b"\\/" in line):
            return True
        for word in self._markers:  # noqa: SIM110 - a generator would double the cost
            if word in line:
                return True
        return False

    def line(self, line: bytes) -> bytes:
        """Return a line of ASCII-only JSON without secrets; the result is always valid JSON."""
        if not self.may_hold_secret(line):
            return line
        event: dict[str, Any] = json.loads(line)
        # Value by value: replacing a secret that looks like JSON in the line would break it.
        clean = {
            name if name in _KNOWN_FIELDS else self.text(name): (
                value if name in _OWN_FIELDS else self._value(value)
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
    """Yield every secret of the settings, and the secret parts of addresses and lists.

    Includes the secrets in OpenTelemetry's variables, which its SDK reads and no setting holds.
    """
    yield from secrets_of_exporters(os.environ)
    for field in fields():
        value = field.of(settings)
        if isinstance(value, Secret):
            yield value.value.strip()
            if field.variable in _LISTS:
                for each in value.value.replace(",", " ").split():
                    yield _NAMED.sub("", each, count=1)
            yield from _secret_parts(value.value.strip())
    with contextlib.suppress(ValueError):
        for token in settings.token_book.tokens:
            for secret in token.secrets:
                yield secret.decode("utf-8", "surrogateescape")
    # A password may also be a parameter, or beside hosts that `urlsplit` cannot split.
    for name in ("database_address", "database_migration_address", "database_listen_address"):
        with contextlib.suppress(ValueError):
            address: DatabaseAddress | None = getattr(settings, name)
            if address is not None:
                yield from filter(None, (address.password, address.key_password))


def _secret_parts(address: str) -> Iterator[str]:
    try:
        parts = urlsplit(address)
    except ValueError:
        return
    if parts.scheme and parts.netloc:
        if parts.password:
            yield unquote(parts.password)
            yield parts.password
        # In the address of a webhook the path is often the credential.
        if len(parts.path) >= _MIN_PATH_CHARACTERS and parts.scheme in {"http", "https"}:
            yield parts.path
        if len(parts.query) >= _MIN_PATH_CHARACTERS:
            yield parts.query


def _values_of(words: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of words as values: the whole text, or after a punctuation mark."""
    any_of = "|".join(map(re.escape, words))
    return re.compile(rf"\A(?:{any_of})\Z|(?<=[^\w\s])(?:{any_of})(?!\w)")


def _forms(secret: str) -> set[str]:
    # Environment variables may hold bytes that are not UTF-8.
    quoted = {quote(secret, safe, errors="surrogatepass") for safe in ("", "/")}
    quoted.add(quote_plus(secret, errors="surrogatepass"))
    quoted |= {_ESCAPE.sub(lambda found: found[0].lower(), text) for text in quoted}
    forms = {secret, *quoted}
    for _ in range(_NESTING_LEVELS):
        forms |= _written(forms)
    return forms


def _written(texts: set[str]) -> set[str]:
    """Return texts as Python and JSON escape them, without quotation marks."""
    return {repr(text)[1:-1] for text in texts} | {_json_text(text) for text in texts}


def _json_text(text: str) -> str:
    return json.dumps(text)[1:-1]


def _in_json(text: str) -> bytes:
    return _json_text(text).encode()


def _without_user(address: str) -> str:
    """Mask user and password in text that follows ``://``; text after the address stays."""
    if "@" not in address:
        return address
    found = _END.search(address)
    end = found.start() if found else len(address)
    if _IPV6.match(address, 0, end):
        return address
    user, colon, rest = address[:end].partition(":")
    # Hand-written addresses often contain unescaped slashes and @ in the password, so the password
    # ends at the last @. After a port, an @ belongs to the path.
    if colon and not _AFTER_HOST.search(user) and not _PORT.match(rest):
        at = address.rfind("@", 0, end)
    else:
        found = _AUTHORITY.match(address)
        at = address.rfind("@", 0, found.end() if found else 0)
    return address if at < 0 else f"{_MASK}{address[at:]}"
