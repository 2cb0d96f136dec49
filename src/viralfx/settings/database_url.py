"""Reads ``DATABASE_URL``: where the database is, and what else such an address may say."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from viralfx.settings.hosts import is_possible_host

IMPLIED = {
    "sslmode": "DB_TLS_MODE",
    "sslrootcert": "DB_TLS_CA_FILE",
    "connection_limit": "DB_POOL_MAX",
    "pool_timeout": "DB_POOL_TIMEOUT",
    "connect_timeout": "DB_CONNECTION_TIMEOUT",
    "statement_timeout": "DB_STATEMENT_TIMEOUT",
}
"""Parameters that say the same as a variable."""

_IN_SECONDS = {"pool_timeout", "connect_timeout"}
_KEPT = ("host", "application_name", "schema")

_ENCODE = (
    "a character such as @ : / ? # in the user or password must be percent-encoded (/ is %2F), or"
    " put the password into DB_PASSWORD"
)
_SHAPE = "expected postgresql://user:password@host:5432/database"


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseAddress:
    """What a database URL says. None where it says nothing and libpq's default applies."""

    host: str
    """A host name or address, or the folder of a Unix socket."""
    port: int = 5432
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    database: str | None = None
    application_name: str = "viralfx"
    schema: str | None = None
    implied: Mapping[str, str] = field(default_factory=dict)
    """Parameters that are in :data:`IMPLIED`, with their values in the variable's unit."""


def parse_database_url(url: str) -> DatabaseAddress:
    """Take a ``postgresql://`` URL apart.

    Raises ``ValueError`` that says what to do and shows no part of the URL that may be a secret.
    """
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError:
        # Also what a password with a slash or a bracket looks like.
        raise ValueError(f"the host or port cannot be read; {_ENCODE}") from None
    if parts.scheme not in {"postgresql", "postgres"}:
        close = difflib.get_close_matches(parts.scheme, ["postgresql", "postgres"], n=1)
        hint = f"; did you mean {close[0]}://?" if close else ""
        raise ValueError(f"is no Postgres address: {_SHAPE}{hint}")
    if "@" not in parts.netloc and "@" in parts.path + parts.query + parts.fragment:
        raise ValueError(f"the host cannot be found; {_ENCODE}")
    if parts.fragment or "#" in url:
        raise ValueError(f"ends at a #; {_ENCODE}")
    parameters = _parameters(parts)
    host = parameters.get("host") or _host(parts)
    if not host:
        raise ValueError(f"names no host: {_SHAPE}")
    if "," in parts.netloc + host:
        raise ValueError("names several hosts; name one, or the one address in front of them")
    if not is_possible_host(host) or (":" in host and parts.hostname != host):
        raise ValueError("names no possible host; look for a typing error")
    database = unquote(parts.path.removeprefix("/"))
    if "/" in database:
        raise ValueError(f"the database's name holds a slash: {_SHAPE}")
    if port == 0:
        raise ValueError("port 0 cannot be connected to")
    return DatabaseAddress(
        host=host,
        port=5432 if port is None else port,
        user=_unquoted(parts.username),
        password=_unquoted(parts.password) or None,
        database=database or None,
        application_name=parameters.get("application_name") or "viralfx",
        schema=parameters.get("schema") or None,
        implied={
            name: _in_its_unit(name, text) for name, text in parameters.items() if name in IMPLIED
        },
    )


def _parameters(parts: SplitResult) -> dict[str, str]:
    try:
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise ValueError("what follows the ? is not name=value pairs joined by &") from None
    known = (*IMPLIED, *_KEPT)
    twice = {name for name, _ in pairs if [other for other, _ in pairs].count(name) > 1}
    if twice & set(known):
        raise ValueError(f"says {', '.join(sorted(twice & set(known)))} twice; keep one")
    for name, _ in pairs:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            # A name is only shown when it looks like one: what follows a ? may be a password.
            shown = f" {name!r}" if name.isidentifier() and close else ""
            raise ValueError(f"unknown parameter{shown}; {hint}")
    return dict(pairs)


def _in_its_unit(name: str, text: str) -> str:
    if name in _IN_SECONDS and text.isascii() and text.isdecimal():
        return str(int(text) * 1000)
    return text


def _host(parts: SplitResult) -> str | None:
    # A folder of sockets stands there encoded, as libpq has it.
    name = unquote(parts.netloc.rpartition("@")[2])
    return name.partition(":")[0] if name.startswith("/") else parts.hostname


def _unquoted(text: str | None) -> str | None:
    return None if text is None else unquote(text)
