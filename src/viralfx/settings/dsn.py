"""Parses ``DATABASE_URL`` and its siblings by libpq's rules, and validates host names."""

import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote

from viralfx.core.errors import suggest
from viralfx.settings.groups import is_possible_host, unknown_parameter
from viralfx.settings.rotation import check_passfile, read_service

IMPLIED = {
    "sslmode": "DB_TLS_MODE",
    "sslrootcert": "DB_TLS_CA_FILE",
    "sslcert": "DB_TLS_CERT_FILE",
    "sslkey": "DB_TLS_KEY_FILE",
    "connection_limit": "DB_POOL_MAX",
    "pool_timeout": "DB_POOL_TIMEOUT",
    "connect_timeout": "DB_CONNECTION_TIMEOUT",
    "statement_timeout": "DB_STATEMENT_TIMEOUT",
    "pgbouncer": "DB_POOLER",
}
"""Parameters that correspond to a variable."""

_IN_SECONDS = {"pool_timeout", "connect_timeout"}

TARGETS = ("any", "read-write", "read-only", "primary", "standby", "prefer-standby")
"""Values of ``target_session_attrs``."""

SCHEMES = ("postgresql", "postgres", "postgis", "pgsql")
_DRIVERS = ("asyncpg", "psycopg", "psycopg2", "psycopg_async", "pg8000")
_DEFAULT_PORT, _MAX_PORT = 5432, 65535

_HONOURED = (
    *("host", "hostaddr", "port", "user", "password", "dbname"),
    *("application_name", "fallback_application_name", "options"),
    *("target_session_attrs", "load_balance_hosts"),
    *("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count"),
    *("tcp_user_timeout", "channel_binding", "passfile", "service", "servicefile"),
    *("sslpassword", "ssl_min_protocol_version", "ssl_max_protocol_version", "ssl", "sslaccept"),
)
_HARMLESS = frozenset(
    {
        "sslcompression",
        "sslsni",
        "gssdelegation",
        "min_protocol_version",
        "max_protocol_version",
        # Added by Prisma, SQLAlchemy, node-postgres and providers for clients of their own.
        "statement_cache_size",
        "prepared_statement_cache_size",
        "async_fallback",
        "uselibpqcompat",
        "supa",
        "workaround",
    }
)
"""Parameters without a meaning for this program, and without a risk if they have no effect."""

_ONLY = {
    "client_encoding": ({"utf8", "utf-8", "unicode", "auto"}, "text is always UTF-8"),
    "gssencmode": ({"disable", "prefer"}, "there is no encryption by GSSAPI; use TLS"),
    "replication": (
        {"false", "off", "no", "0"},
        "a connection for replication takes no statements",
    ),
}
"""Parameters of which only some values (in lower case) can be kept, and the reason."""

_REFUSED = {
    "requirepeer": "remove it: the owner of a socket is not verified",
    "require_auth": "remove it, and verify the server by sslmode=verify-full",
    "sslcrl": "remove it: revocation lists are not read",
    "sslcrldir": "remove it: revocation lists are not read",
    "sslidentity": "convert the file to PEM, and set DB_TLS_CERT_FILE and DB_TLS_KEY_FILE",
    **dict.fromkeys(
        (
            *("scram_client_key", "scram_server_key"),
            *("oauth_issuer", "oauth_client_id", "oauth_client_secret", "oauth_scope"),
        ),
        "put the password into DB_PASSWORD",
    ),
}
"""Parameters whose demands this program cannot meet, each with the remedy."""

_WITHOUT_EFFECT = {
    "krbsrvname": "there is no login by Kerberos",
    "gsslib": "there is no login by Kerberos",
    "sslnegotiation": "TLS begins after a request to the server",
    "sslcertmode": "a client certificate is sent if the server asks for it",
    "socket_timeout": "DB_STATEMENT_TIMEOUT limits statements",
    # Prisma's, of the application's tables: its migrations would drop others in it.
    "schema": "DB_SCHEMA names the schema of the program's tables",
    "sslkeylogfile": "keys are not logged",
}
"""Parameters without an effect that deserve a warning, each with the reason."""

_DEFAULTS = {"sslnegotiation": {"postgres"}, "sslcertmode": {"allow", "disable"}}
"""Their values that demand the usual behaviour, and need no warning."""

_KNOWN = (*IMPLIED, *_HONOURED, *_HARMLESS, *_ONLY, *_REFUSED, *_WITHOUT_EFFECT)

_TLS_MODES = {
    "allow": "prefer",
    **dict.fromkeys(("no-verify", "true", "1"), "require"),
    **dict.fromkeys(("false", "0"), "disable"),
}
"""Words of other clients for a TLS mode."""

_TLS_VERSIONS = {name.lower(): name for name in ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3")}
"""libpq's names of versions, which sort as the versions do."""

_ENCODE = (
    "a character such as @ : / ? # in the user or password must be percent-encoded (/ is %2F), or"
    " put the password into DB_PASSWORD"
)
_SHAPE = "expected postgresql://user:password@host:5432/database"


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseAddress:
    """A parsed database URL. None: not given, libpq's default applies."""

    hosts: tuple[tuple[str, int], ...]
    """At least one server: a host name, an address or the folder of a Unix socket, and a port."""
    host_addresses: Mapping[tuple[str, int], tuple[str, ...]] = field(default_factory=dict)
    """IP addresses of hosts that need no look-up; TLS verifies the name of the host."""
    target_session_attrs: str = "any"
    """The server to use, one of :data:`TARGETS`, as in libpq.

    ``read-write`` if the address has several hosts and does not say.
    """
    load_balance_hosts: bool = False
    """True: try the hosts in random order; False: in the given one."""
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    database: str | None = None
    application_name: str = "viralfx"
    server_settings: Mapping[str, str] = field(default_factory=dict)
    """Settings of the session by name: each ``-c name=value`` of ``options``."""
    options: str | None = None
    """The other words of ``options``, for a proxy such as Neon's that chooses a server by them."""
    keepalives: bool = True
    """True: idle sockets send TCP keep-alive probes."""
    keepalives_idle: int | None = None
    """Seconds of silence before the first probe."""
    keepalives_interval: int | None = None
    """Seconds between probes."""
    keepalives_count: int | None = None
    """Probes without an answer after which the connection is lost."""
    tcp_user_timeout: float | None = None
    """Seconds for which sent data may be unacknowledged; 0: the system's default."""
    channel_binding: bool = False
    """True if the address requires channel binding, which the driver cannot do."""
    passfile: str | None = None
    """File with passwords by server, in libpq's form, for an address without a password."""
    key_password: str | None = field(default=None, repr=False)
    """Passphrase of the client certificate's key."""
    tls_versions: tuple[str, str] | None = None
    """The lowest and the highest version of TLS."""
    implied: Mapping[str, str] = field(default_factory=dict)
    """Parameters that are in :data:`IMPLIED`, with their values in the variable's unit."""
    warnings: tuple[str, ...] = ()
    """One sentence for each parameter that has no effect."""
    unknown: tuple[str, ...] = ()
    """One line for each parameter that only other clients know."""

    @property
    def host(self) -> str:
        """The first host."""
        return self.hosts[0][0]

    @property
    def port(self) -> int:
        """The port of the first host."""
        return self.hosts[0][1]

    def __str__(self) -> str:
        """Return hosts, ports and database, for messages: no credentials."""
        servers = ",".join(f"{host}:{port}" for host, port in self.hosts)
        return f"{servers}/{self.database or ''}"


def is_other_database(url: str) -> bool:
    """Return True for the address of a database that is not Postgres, such as ``sqlite:///file``.

    A scheme that resembles that of Postgres counts as a typing error, not as another database.
    """
    scheme, colon, _ = url.strip().partition(":")
    name = scheme.partition("+")[0].lower()
    if not colon or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return False
    return not suggest(name, SCHEMES, cutoff=0.8)


def parse_database_url(url: str) -> DatabaseAddress:
    """Parse a ``postgresql://`` URL.

    Raises ``ValueError`` with the remedy; its text holds no part of the URL that may be secret.
    """
    if "%00" in url or "\0" in url:
        raise ValueError("holds the character %00, which Postgres takes for the end; remove it")
    authority, path, query = _split(url.strip())
    login, _, servers = authority.rpartition("@")
    user, colon, password = login.partition(":")
    given, unknown = _parameters(query, trusted=bool(colon) and "@" not in query)
    database = unquote(path.removeprefix("/"))
    given = _supported(_served(given, servers, user=user, password=password, dbname=database))
    if "/" in database:
        raise ValueError(f"the database's name holds a slash: {_SHAPE}")
    name = given.get("dbname", database)
    if "=" in name or "://" in name:
        raise ValueError(f"dbname holds an address; write it as DATABASE_URL: {_SHAPE}")
    hosts = tuple(_hosts(servers, given))
    # Jobs are written: a standby that is the first of several hosts is of no use.
    target = given.get("target_session_attrs", "any" if len(hosts) == 1 else "read-write")
    if target not in TARGETS:
        raise ValueError(f"target_session_attrs is not one of {', '.join(TARGETS)}")
    server_settings, options = _options(given.get("options", ""))
    user_timeout = _number(given, "tcp_user_timeout")
    return DatabaseAddress(
        hosts=hosts,
        host_addresses=_addresses(hosts, given),
        target_session_attrs=target,
        load_balance_hosts=_is_on(given, "load_balance_hosts", off="disable", on="random"),
        user=given.get("user") or unquote(user) or None,
        password=given.get("password") or unquote(password) or None,
        database=name or None,
        application_name=given.get("application_name")
        or given.get("fallback_application_name")
        or "viralfx",
        keepalives=_is_on(given, "keepalives", off="0", on="1", default=True),
        keepalives_idle=_number(given, "keepalives_idle"),
        keepalives_interval=_number(given, "keepalives_interval"),
        keepalives_count=_number(given, "keepalives_count"),
        tcp_user_timeout=None if user_timeout is None else user_timeout / 1000,
        channel_binding=_requires_binding(given),
        passfile=check_passfile(given.get("passfile")),
        key_password=given.get("sslpassword") or None,
        tls_versions=_tls_versions(given),
        implied=_implied(given, server_settings),
        server_settings={n: v for n, v in server_settings.items() if n not in IMPLIED},
        options=options,
        warnings=tuple(_warnings(given)),
        unknown=tuple(unknown),
    )


def _split(url: str) -> tuple[str, str, str]:
    """Return authority, path and query.

    Not by ``urlsplit``: it refuses several hosts with ports, and brackets in a password.
    """
    scheme, separator, rest = url.partition("://")
    base, _, driver = scheme.lower().partition("+")
    if not separator or base not in SCHEMES:
        close = suggest(base, SCHEMES).removesuffix("?")
        hint = f"; {close}://?" if close else ""
        raise ValueError(f"is not a Postgres address: {_SHAPE}{hint}")
    if driver and driver not in _DRIVERS:
        raise ValueError(f"names an unknown driver; {_SHAPE}")
    if "#" in rest:
        raise ValueError(f"ends at a #; {_ENCODE}")
    place, _, query = rest.partition("?")
    authority, slash, path = place.partition("/")
    # Also after an @: in user@server:12/secret@host, the / is a character of the password.
    names = [pair.partition("=")[0] for pair in query.split("&") if "@" in pair]
    if "@" in path or any(name not in _KNOWN for name in names):
        raise ValueError(f"the host cannot be found; {_ENCODE}")
    return authority, slash + path, query


def _parameters(query: str, *, trusted: bool) -> tuple[dict[str, str], list[str]]:
    """Return the parameters, and the lines about unknown ones, as :func:`unknown_parameter`."""
    pairs = [pair.partition("=") for pair in query.split("&") if pair]
    if any(not separator for _, separator, _ in pairs):
        raise ValueError("the part after the ? is not name=value pairs joined by &")
    given: dict[str, str] = {}
    unknown = []
    for encoded, _, text in pairs:
        name, value = unquote(encoded), unquote(text)
        if name not in _KNOWN and not name.startswith("oauth_"):
            unknown.append(unknown_parameter(name, _KNOWN, trusted=trusted))
            continue
        if name == "host" and name in given:
            value = f"{given[name]},{value}"  # the form of SQLAlchemy for several hosts
        elif name in given:
            raise ValueError(f"sets {name} twice; keep one")
        given[name] = value
    return given, unknown


def _supported(given: dict[str, str]) -> dict[str, str]:
    for name, value in given.items():
        if name in _REFUSED:
            raise ValueError(f"{name} is not supported; {_REFUSED[name]}")
        if name in _ONLY and value.lower() not in _ONLY[name][0]:
            raise ValueError(f"{name}: this value is not supported: {_ONLY[name][1]}; remove it")
    if given.get("sslcertmode") == "disable":
        given.pop("sslcert", None), given.pop("sslkey", None)
    return given


def _served(given: dict[str, str], servers: str, **own: str) -> dict[str, str]:
    """Return the parameters with those of their service; the other parts of the address win."""
    if not given.get("service"):
        return given
    found = read_service(given["service"], given.get("servicefile"))
    if not found.keys() <= set(_KNOWN) - {"service", "servicefile"}:
        raise ValueError("service: its file has a line without a known parameter; correct it")
    has_port = re.search(r":[0-9]+(,|$)", servers)
    parts = {"host": servers, "hostaddr": servers, "port": has_port, **own}
    return {**{name: text for name, text in found.items() if not parts.get(name)}, **given}


def _hosts(servers: str, given: Mapping[str, str]) -> Iterator[tuple[str, int]]:
    """Yield host and port of each server; the parameters win, as in libpq."""
    own = [_host_and_port(server) for server in servers.split(",")]
    has_host = any(host for host, _ in own)
    if named := given.get("host") or (not has_host and given.get("hostaddr")):
        own = [_host_and_port(server, also_bare=True) for server in named.split(",")]
    if text := given.get("port"):
        ports = text.split(",")
        if len(ports) not in {1, len(own)}:
            raise ValueError(f"port lists {len(ports)} ports for {len(own)} hosts; give one each")
        own = [
            (host, port or default)
            for (host, default), port in zip(own, ports * len(own), strict=False)
        ]
    for host, text in own:
        yield _checked_host(host), _port(text)


def _addresses(
    hosts: Sequence[tuple[str, int]], given: Mapping[str, str]
) -> dict[tuple[str, int], tuple[str, ...]]:
    """Return the addresses in ``hostaddr``, of which an empty one stands for a look-up."""
    listed = given["hostaddr"].split(",") if given.get("hostaddr") else [""] * len(hosts)
    if len(listed) != len(hosts):
        count = f"{len(listed)} addresses for {len(hosts)} hosts"
        raise ValueError(f"hostaddr lists {count}; give one each")
    found: dict[tuple[str, int], tuple[str, ...]] = {}
    for host, address in zip(hosts, listed, strict=True):
        if not address:
            continue
        try:
            ipaddress.ip_address(address)
        except ValueError:
            raise ValueError("hostaddr is not an IP address; write a name as host") from None
        found[host] = (*found.get(host, ()), address)
    return found


def _checked_host(host: str) -> str:
    if not host:
        raise ValueError(f"names no host: {_SHAPE}")
    # A name with = or a space is of host=db password=..., libpq's other form.
    if not is_possible_host(host) or (not host.startswith("/") and re.search(r"[\s=;]", host)):
        raise ValueError("names no valid host; check the spelling")
    if host.lower().endswith(".cockroachlabs.cloud"):
        raise ValueError("is an address of CockroachDB, which is not supported; use Postgres")
    return host


def _port(text: str) -> int:
    if not text:
        return _DEFAULT_PORT
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > _MAX_PORT:
        raise ValueError(f"the host or port cannot be parsed; {_ENCODE}")
    if not int(text):
        raise ValueError("port 0 cannot be connected to")
    return int(text)


def _host_and_port(server: str, *, also_bare: bool = False) -> tuple[str, str]:
    """Split one server; ``also_bare``: an IPv6 address may have no brackets."""
    if server.startswith("["):
        host, bracket, port = server[1:].partition("]")
        if not bracket or (port and not port.startswith(":")) or not _is_ipv6(host):
            raise ValueError(f"the host or port cannot be parsed; {_ENCODE}")
        return host, port.removeprefix(":")
    if also_bare and (server.startswith("/") or _is_ipv6(server)):
        return server, ""
    # A socket folder is percent-encoded in an address, as in libpq.
    host, _, port = server.partition(":")
    return unquote(host), port


def _is_ipv6(text: str) -> bool:
    return text.count(":") > 1 and re.fullmatch(r"[0-9A-Fa-f:.]+(%.+)?", text) is not None


def _options(text: str) -> tuple[dict[str, str], str | None]:
    """Split ``options`` into settings of the session and the remaining words."""
    settings: dict[str, str] = {}
    others = []
    words = iter(re.findall(r"(?:\\.|[^\\\s])+", text))
    for word in words:
        # A backslash keeps the next character, as in the server.
        one = re.sub(r"\\(.)", r"\1", word)
        if one.startswith("--"):
            one = one[2:]
        elif one.startswith("-c"):
            one = one[2:] or next(words, "")
        else:
            others.append(word)
            continue
        name, separator, value = one.partition("=")
        name = name.replace("-", "_")
        if not separator or not re.fullmatch(r"[A-Za-z_][\w.]*", name):
            raise ValueError("options are not of the form -c name=value; correct them")
        if name == "cluster":
            raise ValueError("options name a cluster of CockroachDB, which is not supported")
        settings[name] = value
    return settings, " ".join(others) or None


def _implied(given: Mapping[str, str], session: Mapping[str, str]) -> dict[str, str]:
    """Return the parameters that set a variable, in its unit and words."""
    implied = {
        name: text
        for name, text in given.items()
        if name in IMPLIED and not _is_unlimited(name, text)
    }
    if "statement_timeout" in session:
        implied.setdefault("statement_timeout", session["statement_timeout"])
    if "ssl" in given:
        implied.setdefault("sslmode", given["ssl"])
    if given.get("sslaccept") == "strict":
        implied.setdefault("sslmode", "verify-full")
    if "sslmode" in implied:
        implied["sslmode"] = _TLS_MODES.get(implied["sslmode"], implied["sslmode"])
    if implied.get("sslrootcert") == "system":
        del implied["sslrootcert"]
        if implied.setdefault("sslmode", "verify-full") != "verify-full":
            raise ValueError("sslrootcert=system needs sslmode=verify-full; set it")
    if implied.pop("pgbouncer", None) and _is_on(given, "pgbouncer", off="false", on="true"):
        implied["pgbouncer"] = "transaction"
    for name in _IN_SECONDS & implied.keys():
        if re.fullmatch(r"[0-9]{1,9}", implied[name]):
            implied[name] = str(int(implied[name]) * 1000)
    return implied


def _warnings(given: Mapping[str, str]) -> Iterator[str]:
    for name, value in given.items():
        if name in _WITHOUT_EFFECT and value not in _DEFAULTS.get(name, ()):
            yield f"{name} has no effect: {_WITHOUT_EFFECT[name]}"
        if _is_unlimited(name, value):
            yield f"{name} has no effect: there is a limit always, {IMPLIED[name]}"
    for name in ("statement_cache_size", "prepared_statement_cache_size"):
        if given.get(name) == "0" and given.get("pgbouncer") != "true":
            yield f"{name} has no effect: behind a pooler, set DB_POOLER=transaction"


def _is_unlimited(name: str, text: str) -> bool:
    # libpq waits without a limit then.
    return name in _IN_SECONDS and re.fullmatch(r"-[0-9]+|0+", text) is not None


def _requires_binding(given: Mapping[str, str]) -> bool:
    value = given.get("channel_binding", "prefer")
    if value not in {"disable", "prefer", "require"}:
        raise ValueError("channel_binding is not one of disable, prefer, require")
    return value == "require"


def _tls_versions(given: Mapping[str, str]) -> tuple[str, str] | None:
    names = ("ssl_min_protocol_version", "ssl_max_protocol_version")
    chosen = ["TLSv1.2", "TLSv1.3"]
    for index, name in enumerate(names):
        text = given.get(name) or chosen[index]
        if text.lower() not in _TLS_VERSIONS:
            raise ValueError(f"{name} is not one of {', '.join(_TLS_VERSIONS.values())}")
        chosen[index] = _TLS_VERSIONS[text.lower()]
    low, high = max("TLSv1.2", chosen[0]), chosen[1]
    if high < low:
        raise ValueError(f"ssl_max_protocol_version is below {low}, the minimum; raise it")
    return (low, high) if any(map(given.get, names)) else None


def _number(given: Mapping[str, str], name: str) -> int | None:
    text = given.get(name, "")
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(f"{name} is not a whole number of zero or more; correct it")
    # libpq takes 0 for the system's default; only a user timeout of 0 differs from none given.
    return int(text) if int(text) or name == "tcp_user_timeout" else None


def _is_on(
    given: Mapping[str, str], name: str, *, off: str, on: str, default: bool = False
) -> bool:
    value = given.get(name)
    if value is None:
        return default
    if value not in {off, on}:
        raise ValueError(f"{name} is not {off} or {on}; correct it")
    return value == on
