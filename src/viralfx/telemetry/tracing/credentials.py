"""What the ``OTEL_*`` variables hold that nobody is to see: keys and passwords of collectors."""

import re
from collections.abc import Iterator, Mapping
from urllib.parse import unquote, unquote_plus

_OF_SECRETS = re.compile(
    r"(auth|authorization|authentication|cookie|credentials?|dsn|jwt|key|licen[cs]e|pass|passphrase"
    r"|passw(or)?d|pwd|secret|sig|signature|token)($|[^a-z])",
    re.IGNORECASE,
).search
"""Ends of words in names of headers and parameters by which a value of any length is a secret."""
_OF_NO_SECRETS = re.compile(
    r"(^|[^a-z])(agent|dataset|name|namespace|org|orgid|tenant|type)($|[^a-z])", re.IGNORECASE
).search
"""Those by which it is none: Content-Type, User-Agent, X-Scope-OrgID, X-Honeycomb-Dataset."""
_LEAST_OF_A_TOKEN = 16
"""Characters from which on a value is taken for a secret where its name says nothing: others are
names of teams and zones, which are words of every log."""


def secrets(environ: Mapping[str, str]) -> Iterator[str]:
    """Yield what must not be told of how telemetry is sent, also of what others in here send.

    That are values of headers, which mostly are keys, and in addresses passwords and queries.
    """
    for variable, value in environ.items():
        if not variable.startswith("OTEL_EXPORTER_OTLP_"):
            continue
        if variable.endswith("_HEADERS"):
            for name, text in pairs_of(value):
                for secret in {text, unquote(text)}:
                    # What comes before a space is the scheme, as Bearer.
                    word = secret.rpartition(" ")[2]
                    if _is_secret(unquote(name), word):
                        yield from {secret, word}
        elif variable.endswith("_ENDPOINT"):
            yield from _in_address(value)


def _in_address(address: str) -> Iterator[str]:
    if "@" in address:
        user = address.rpartition("@")[0].rpartition("://")[2]
        password = user.partition(":")[2]
        yield from {user, password, unquote(user), unquote(password)} - {""}
    for pair in address.partition("#")[0].partition("?")[2].split("&"):
        name, _, value = pair.partition("=")
        for secret in {value, unquote_plus(value)}:
            if _is_secret(unquote_plus(name), secret):
                yield secret


def _is_secret(name: str, value: str) -> bool:
    long, harmless = len(value) >= _LEAST_OF_A_TOKEN, bool(_OF_NO_SECRETS(name))
    if _OF_SECRETS(name):
        # The type of a token is none, but the token of a tenant is one.
        return bool(value) and (long or not harmless)
    return long and not harmless


def pairs_of(text: str) -> list[tuple[str, str]]:
    """Return names and values, as written; what is neither has no name."""
    pairs = [each.strip().partition("=") for each in text.split(",") if each.strip()]
    return [
        (name.strip(), value.strip()) if equals else ("", name) for name, equals, value in pairs
    ]
