"""The types of settings, and their groups.

The groups are ``DB_*``, ``REDIS_*``, ``JOB_*``, ``WEBHOOK_*`` and ``HTTP_*``.
"""

import re
from collections.abc import Collection, Iterator
from typing import Annotated, Literal
from urllib.parse import unquote

import msgspec
from msgspec import Meta

from viralfx.core.errors import edits, suggest
from viralfx.domain.webhooks.signature import parse_receiver_keys, parse_secrets
from viralfx.domain.webhooks.url import parse_allowed

# Seconds; the environment has whole milliseconds, and the loader converts them. The maximum is the
# largest signed 32-bit number: 24 days, and no timer or date overflows with it.
_MAX_SECONDS = (2**31 - 1) / 1000
Duration = Annotated[float, Meta(ge=0.0, le=_MAX_SECONDS)]
PositiveDuration = Annotated[float, Meta(ge=0.001, le=_MAX_SECONDS)]
# The length of sun_path less its end.
_MAX_SOCKET_BYTES = 107
Threshold = Annotated[int, Meta(ge=1, le=1000)]
Attempts = Annotated[int, Meta(ge=1, le=10_000)]
Port = Annotated[int, Meta(ge=0, le=65535)]
RemotePort = Annotated[int, Meta(ge=1, le=65535)]
Names = tuple[Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_-]*$")], ...]
Modules = tuple[
    Annotated[
        str,
        Meta(
            pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)*$",
            examples=["orders.tasks,billing.tasks"],
        ),
    ],
    ...,
]
Hosts = tuple[
    # Entries are validated one by one later; the pattern keeps a password out of messages.
    Annotated[str, Meta(pattern=r"^[^\s@]+$", examples=["hooks.example.com,*.example.org"])],
    ...,
]
Networks = tuple[
    # Each is parsed in `contradictions`.
    Annotated[
        str,
        Meta(pattern=r"^[0-9A-Fa-f:.]+(/[0-9]{1,3})?$", examples=["10.0.0.0/24,192.0.2.7"]),
    ],
    ...,
]
Endpoints = tuple[
    Annotated[
        str,
        Meta(
            # A port has at most five digits; its range is checked in `contradictions`.
            pattern=r"^(\[[0-9A-Fa-f:.]+\]|[^\s\[\]:/@]+):[0-9]{1,5}$",
            examples=["host1:26379,host2:26379"],
        ),
    ],
    ...,
]


def is_possible_host(host: str) -> bool:
    """Return True if a name can be resolved: no empty label, none that is too long."""
    if host.startswith("/"):
        return True
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return True


def milliseconds(seconds: float) -> int:
    """Return a duration as the environment has it."""
    return round(seconds * 1000)


MIN_SECRET_CHARACTERS = 8
"""A shorter secret may be an ordinary word, so log lines may show it."""


class Secret(msgspec.Struct, frozen=True):
    """A value that is masked in logs, tracebacks and ``viralfx env``."""

    value: str
    file: str | None = None
    """The file that holds the value, if the variable ``*_FILE`` names one."""

    def __repr__(self) -> str:
        return "Secret('***')"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)


def meaning(text: str) -> Meta:
    """Return the description of a setting, for ``viralfx env`` and the documentation."""
    return Meta(description=text)


PoolSize = Annotated[int, Meta(ge=0, le=10_000)]
PositivePoolSize = Annotated[int, Meta(ge=1, le=10_000)]

POOL_PROFILES = {"small": (2, 10), "medium": (5, 20), "large": (10, 50)}
"""Minimum and maximum of connections by load: 1-10, 10-100, 100+ requests/s."""


class DatabaseSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Use of the database in DATABASE_URL. A field's variable is ``DB_`` and its name."""

    password: Annotated[
        Secret | None, meaning("Password of the database user, if DATABASE_URL holds none")
    ] = None
    tls_mode: Annotated[
        Literal["disable", "prefer", "require", "verify-ca", "verify-full"],
        meaning("TLS to Postgres, as libpq's sslmode; verify-full if DB_TLS_CA_FILE is set"),
    ] = "prefer"
    tls_ca_file: Annotated[
        str | None, meaning("CA certificates (PEM) for Postgres; unset: those of the system")
    ] = None
    tls_cert_file: Annotated[
        str | None, meaning("Client certificate (PEM) for Postgres; needs DB_TLS_KEY_FILE")
    ] = None
    tls_key_file: Annotated[
        str | None,
        meaning("Private key (PEM) of DB_TLS_CERT_FILE; sslpassword in the address unlocks it"),
    ] = None
    pooler: Annotated[
        Literal["none", "session", "transaction"],
        meaning("Mode of a pooler such as PgBouncer between the program and Postgres"),
    ] = "none"
    schema: Annotated[
        # Postgres truncates a name after 63 bytes, and keeps those with pg_ for itself.
        Annotated[str, Meta(pattern=r"^(?!pg_)[a-z_][a-z0-9_]{0,62}$")],
        meaning("Schema of the program's tables; `viralfx migrate` creates it"),
    ] = "viralfx_ops"
    pool_min: Annotated[PoolSize, meaning("Minimum number of open connections")] = 2
    pool_max: Annotated[PositivePoolSize, meaning("Maximum number of open connections")] = 10
    pool_timeout: Annotated[
        PositiveDuration, meaning("Maximum wait for a connection of the pool")
    ] = 30.0
    connection_timeout: Annotated[
        PositiveDuration, meaning("Maximum time to open a connection")
    ] = 30.0
    max_lifetime: Annotated[
        Duration,
        meaning("Age after which a connection is replaced, less up to a tenth at random; 0: never"),
    ] = 1800.0
    statement_timeout: Annotated[
        Duration, meaning("Time after which Postgres cancels a statement; 0: never")
    ] = 60.0
    slow_query_threshold: Annotated[
        Duration, meaning("Duration from which a query is logged as slow; 0: never")
    ] = 1.0
    health_check_interval: Annotated[
        PositiveDuration,
        meaning("Time between two runs of the database check while it passes"),
    ] = 30.0
    max_reconnect_attempts: Annotated[
        Attempts, meaning("Attempts to connect at start-up before the start fails")
    ] = 5
    reconnect_delay: Annotated[
        Duration, meaning("Time between two attempts to connect at start-up")
    ] = 5.0

    def contradictions(self) -> Iterator[tuple[frozenset[str], str]]:
        """Yield each problem with the variables that cause it."""
        if self.tls_ca_file is not None and self.tls_mode in {"disable", "prefer"}:
            problem = f"has no effect with DB_TLS_MODE={self.tls_mode}; set it to verify-full"
            yield frozenset({"DB_TLS_CA_FILE", "DB_TLS_MODE"}), f"DB_TLS_CA_FILE: {problem}"
        pair = {"DB_TLS_CERT_FILE": self.tls_cert_file, "DB_TLS_KEY_FILE": self.tls_key_file}
        missing = [name for name, path in pair.items() if path is None]
        if len(missing) == 1:
            other = next(name for name in pair if name not in missing)
            yield frozenset(pair), f"{missing[0]}: {other} needs it; set both, or neither"


REDIS_SCHEMES = ("redis", "rediss", "unix", "valkey", "valkeys")


class RedisSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Address and use of Redis. A field's variable is ``REDIS_`` and its name."""

    url: Annotated[
        Secret | None,
        meaning("Address that sets the variables below: rediss://user:password@host:6379/0"),
    ] = None
    host: Annotated[
        # A whole address is a frequent mistake, and it may hold a password.
        Annotated[str, Meta(pattern=r"^(\[?[0-9A-Fa-f:.]+\]?|[^\s\[\]:/@]+)$")] | None,
        meaning("Redis host; unset, and without socket or Sentinel: the cache is in memory"),
    ] = None
    port: Annotated[RemotePort, meaning("Redis port")] = 6379
    socket: Annotated[
        Annotated[str, Meta(pattern=r"^/")] | None,
        meaning("Path of the Unix socket of Redis, in place of REDIS_HOST and REDIS_PORT"),
    ] = None
    username: Annotated[str | None, meaning("Redis ACL user; unset: the default user")] = None
    password: Annotated[Secret | None, meaning("Redis password")] = None
    db: Annotated[int, Meta(ge=0, le=10_000), meaning("Number of the Redis database")] = 0
    sentinel_enabled: Annotated[bool, meaning("Find the Redis primary through Sentinel")] = False
    sentinels: Annotated[Endpoints, meaning("Addresses of the Sentinels")] = ()
    sentinel_name: Annotated[
        str, Meta(min_length=1), meaning("Name of the primary in the Sentinels' configuration")
    ] = "mymaster"
    sentinel_username: Annotated[str | None, meaning("ACL user of the Sentinels")] = None
    sentinel_password: Annotated[Secret | None, meaning("Password of the Sentinels")] = None
    tls_enabled: Annotated[bool, meaning("Use TLS to Redis and to the Sentinels")] = False
    tls_reject_unauthorized: Annotated[
        bool, meaning("Verify the certificate of Redis; false: any certificate is accepted")
    ] = True
    tls_ca_file: Annotated[
        str | None, meaning("CA certificates (PEM) for Redis; unset: those of the system")
    ] = None

    @property
    def address(self) -> str:
        """The host, without the brackets of an IPv6 address; empty if there is none."""
        return (self.host or "").strip("[]")

    @property
    def in_use(self) -> bool:
        """True if Redis is configured; otherwise the memory adapters are used."""
        return self.sentinel_enabled or self.host is not None or self.socket is not None

    @property
    def sentinel_addresses(self) -> tuple[tuple[str, int], ...]:
        """The Sentinels as host and port."""
        pairs = (endpoint.rpartition(":") for endpoint in self.sentinels)
        return tuple((host.strip("[]"), int(port)) for host, _, port in pairs)

    def contradictions(self) -> Iterator[tuple[frozenset[str], str]]:
        """Yield each problem with the variables that cause it."""
        if self.sentinel_enabled and not self.sentinels:
            problem = (
                "REDIS_SENTINELS: REDIS_SENTINEL_ENABLED=true needs addresses, such as"
                " host1:26379,host2:26379"
            )
            yield frozenset({"REDIS_SENTINELS", "REDIS_SENTINEL_ENABLED"}), problem
        if self.tls_ca_file is not None and not self.tls_enabled:
            yield (
                frozenset({"REDIS_TLS_CA_FILE", "REDIS_TLS_ENABLED"}),
                "REDIS_TLS_CA_FILE: has no effect without REDIS_TLS_ENABLED=true",
            )
        alone = self.socket if self.socket is not None and not self.sentinel_enabled else ""
        if alone and self.host is not None:
            yield (
                frozenset({"REDIS_SOCKET", "REDIS_HOST"}),
                "REDIS_SOCKET: REDIS_HOST is set too; keep one of them",
            )
        if alone and len(alone.encode()) > _MAX_SOCKET_BYTES:
            yield (
                frozenset({"REDIS_SOCKET"}),
                f"REDIS_SOCKET: the path of a socket has at most {_MAX_SOCKET_BYTES} bytes",
            )
        if alone and self.tls_enabled:
            yield (
                frozenset({"REDIS_SOCKET", "REDIS_TLS_ENABLED"}),
                "REDIS_SOCKET: a Unix socket has no TLS; unset REDIS_TLS_ENABLED",
            )
        if not is_possible_host(self.address or "redis"):
            yield (
                frozenset({"REDIS_HOST"}),
                f"REDIS_HOST: {self.host!r} is not a valid host name; check the spelling",
            )
        for host, port in self.sentinel_addresses:
            if not 1 <= port <= 65535:  # noqa: PLR2004 - the range of ports
                yield (
                    frozenset({"REDIS_SENTINELS"}),
                    f"REDIS_SENTINELS: {host}:{port} has no port from 1 to 65535",
                )


_REDIS_SHAPE = "expected redis://user:password@host:6379/0, rediss:// for TLS, or unix:///path"
_REDIS_KINDS = {
    "sentinel": "an address of Sentinels is not supported; set REDIS_SENTINEL_ENABLED,"
    " REDIS_SENTINELS and REDIS_SENTINEL_NAME",
    "cluster": "Redis Cluster is not supported; name a single server or Sentinels",
}
_REDIS_WORDS = {
    "db": "REDIS_DB",
    "username": "REDIS_USERNAME",
    "password": "REDIS_PASSWORD",
    "ssl_ca_certs": "REDIS_TLS_CA_FILE",
    "ssl_cert_reqs": "REDIS_TLS_REJECT_UNAUTHORIZED",
}
_VERIFIES = {"none": "false", "cert_none": "false", "required": "true", "cert_required": "true"}
_REDIS_ENCODE = "percent-encode @ : / ? # in the password, or put it into REDIS_PASSWORD"


def unknown_parameter(name: str, known: Collection[str], *, trusted: bool) -> str:
    """Return the line about a parameter; raise ``ValueError`` with it for a typing error."""
    # Unless it is trusted, the name may be a part of a password.
    close = suggest(name, known)
    shown = f" {name!r}" if name.isidentifier() and (close or trusted) else ""
    line = f"unknown parameter{shown}; {close or 'remove it'}"
    if any(edits(name, other, limit=1) <= 1 for other in known):
        raise ValueError(line)
    return line


def parse_redis_url(url: str, unknown: list[str] | None = None) -> dict[str, str]:
    """Return the variables that a Redis address sets, with their texts.

    Raises ``ValueError`` with the remedy; its text holds no part of the URL that may be secret.
    ``unknown`` takes the lines about parameters that only other clients know.
    """
    scheme, separator, rest = url.strip().partition("://")
    scheme = scheme.lower()
    for word, problem in _REDIS_KINDS.items():
        if word in scheme:
            raise ValueError(problem)
    if not separator or scheme not in REDIS_SCHEMES:
        raise ValueError(f"is not a Redis address; {_REDIS_SHAPE}")
    place, _, query = rest.partition("?")
    authority, slash, path = place.partition("/")
    login, _, server = authority.rpartition("@")
    # A user such as user@server has an @ itself: a later one may still be that before the host.
    names = [pair.partition("=")[0] for pair in query.split("&") if "@" in pair]
    if "#" in rest or "@" in path or any(name not in _REDIS_WORDS for name in names):
        raise ValueError(f"the host cannot be found; {_REDIS_ENCODE}")
    user, colon, password = login.partition(":")
    found = {"REDIS_USERNAME": unquote(user), "REDIS_PASSWORD": unquote(password)}
    if scheme == "unix":
        if server or not path:
            raise ValueError(f"names no socket; {_REDIS_SHAPE}")
        found["REDIS_SOCKET"] = unquote(slash + path)
    else:
        found |= _redis_server(server, path)
    if scheme in {"rediss", "valkeys"}:
        found["REDIS_TLS_ENABLED"] = "true"
    found |= _redis_parameters(query, [] if unknown is None else unknown, trusted=bool(colon))
    return {name: text for name, text in found.items() if text}


def _redis_server(server: str, path: str) -> dict[str, str]:
    if "," in server:
        raise ValueError("names several hosts; name one, or set REDIS_SENTINELS")
    parts = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\s\[\]:]*)(?::([0-9]{0,5}))?", server)
    if parts is None or not is_possible_host(parts[1].strip("[]") or "localhost"):
        raise ValueError(f"the host or port cannot be parsed; {_REDIS_ENCODE}")
    if not re.fullmatch(r"[0-9]{0,5}/?", path):
        raise ValueError(f"the database is not a number; {_REDIS_SHAPE}")
    return {
        "REDIS_HOST": parts[1] or "localhost",
        "REDIS_PORT": parts[2] or "",
        "REDIS_DB": path.strip("/"),
    }


def _redis_parameters(query: str, unknown: list[str], *, trusted: bool) -> dict[str, str]:
    found = {}
    for pair in query.split("&") if query else ():
        word, _, text = pair.partition("=")
        if word not in _REDIS_WORDS:
            unknown.append(unknown_parameter(word, _REDIS_WORDS, trusted=trusted))
            continue
        if word == "ssl_cert_reqs":
            if text.lower() not in _VERIFIES:
                raise ValueError("ssl_cert_reqs is not none or required; correct it")
            text = _VERIFIES[text.lower()]
        found[_REDIS_WORDS[word]] = unquote(text)
    return found


# Ten years; no timer uses it, so it need not fit into one.
Retention = Annotated[float, Meta(ge=0.0, le=315_360_000.0)]

# A worker renews it several times, also while the database is slow.
Lease = Annotated[float, Meta(ge=1.0, le=_MAX_SECONDS)]
# A job that was not announced waits for the next poll.
PollInterval = Annotated[float, Meta(ge=0.001, le=60.0)]

# Postgres reads messages of up to 1 GiB, and a process holds a result several times.
ResultBytes = Annotated[int, Meta(ge=1024, le=256 * 2**20)]

MemoryJobs = Annotated[int, Meta(ge=1, le=1_000_000)]


class JobSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Execution and retention of jobs. A field's variable is ``JOB_`` and its name."""

    concurrency: Annotated[
        Threshold,
        meaning("Maximum number of jobs of a queue that a worker runs at once; QUEUES can differ"),
    ] = 10
    timeout: Annotated[
        PositiveDuration,
        meaning("Time limit of an attempt; default for tasks without `timeout`"),
    ] = 300.0
    max_attempts: Annotated[
        Attempts, meaning("Attempts before a job fails; default for tasks without `retry`")
    ] = 3
    max_crashes: Annotated[
        Attempts, meaning("Crashes of workers during a job before the job fails")
    ] = 5
    lease: Annotated[
        Lease, meaning("Time without a renewal after which a worker counts as dead")
    ] = 30.0
    sweep_interval: Annotated[
        PositiveDuration, meaning("Time between two sweeps for jobs of dead workers")
    ] = 5.0
    unknown_patience: Annotated[
        PositiveDuration,
        meaning("How long a due job waits for a worker that knows its task and payload"),
    ] = 3_600.0
    poll_interval: Annotated[
        PollInterval,
        meaning("How often a worker polls for jobs that were not announced; rarer if many do"),
    ] = 5.0
    retention: Annotated[
        Retention,
        meaning("Time for which a completed or cancelled job is kept; 0: it is never deleted"),
    ] = 604_800.0
    retention_failed: Annotated[
        Retention, meaning("Time for which a failed job is kept; 0: it is never deleted")
    ] = 604_800.0
    max_result_bytes: Annotated[
        ResultBytes,
        meaning("Maximum size of a result, and of a payload from code, in bytes of JSON"),
    ] = 2**20
    memory_max_jobs: Annotated[
        MemoryJobs,
        meaning("Maximum number of unfinished jobs in memory; more are refused with 503"),
    ] = 10_000
    backlog_warn: Annotated[
        Duration,
        meaning("Time for which a job may be overdue before the queues check warns; 0: never"),
    ] = 60.0

    def contradictions(self) -> Iterator[tuple[frozenset[str], str]]:
        """Yield each problem with the variables that cause it."""
        if self.sweep_interval > self.lease:
            problem = (
                f"JOB_SWEEP_INTERVAL: {milliseconds(self.sweep_interval)} is more than"
                f" JOB_LEASE={milliseconds(self.lease)}, so jobs of dead workers would be found"
                " late; lower it, or raise JOB_LEASE"
            )
            yield frozenset({"JOB_SWEEP_INTERVAL", "JOB_LEASE"}), problem


class WebhookSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of ``notifications.webhook``. A field's variable is ``WEBHOOK_`` and its name."""

    allowed_hosts: Annotated[Hosts, meaning("Hosts to which webhooks may be sent")] = ()
    secret: Annotated[
        Secret | None,
        meaning(
            "Secret that the keys of receivers and alerts are derived from (whsec_...); unset: only"
            " alerts and receivers of WEBHOOK_KEYS are sent anything"
        ),
    ] = None
    keys: Annotated[
        Secret | None,
        meaning("Keys of receivers that have one of their own: hooks.example.com=whsec_..."),
    ] = None
    shared_secret: Annotated[
        Secret | None,
        meaning("Former key that receivers share (whsec_...): it signs everything in addition"),
    ] = None
    timeout: Annotated[PositiveDuration, meaning("Time limit for sending one webhook")] = 10.0

    @property
    def signs(self) -> bool:
        """True if there is a key for webhooks, of any kind."""
        return any((self.secret, self.keys, self.shared_secret))

    def contradictions(self) -> Iterator[tuple[frozenset[str], str]]:
        """Yield each problem with the variables that cause it."""
        for entry in self.allowed_hosts:
            try:
                parse_allowed(entry)
            except ValueError as error:
                yield frozenset({"WEBHOOK_ALLOWED_HOSTS"}), f"WEBHOOK_ALLOWED_HOSTS: {error}"
        valid: dict[str, tuple[bytes, ...]] = {}
        for variable, secret in (
            ("WEBHOOK_SECRET", self.secret),
            ("WEBHOOK_SHARED_SECRET", self.shared_secret),
        ):
            try:
                valid[variable] = () if secret is None else parse_secrets(secret.value)
            except ValueError as error:
                yield frozenset({variable}), f"{variable}: {error}"
        if len(valid) > 1 and set(valid["WEBHOOK_SECRET"]) & set(valid["WEBHOOK_SHARED_SECRET"]):
            # A receiver that knows the secret derives the keys of all others.
            problem = "it is also a part of WEBHOOK_SECRET; make a new secret for that"
            yield frozenset(valid), f"WEBHOOK_SHARED_SECRET: {problem}"
        try:
            _ = self.keys and parse_receiver_keys(self.keys.value)
        except ValueError as error:
            yield frozenset({"WEBHOOK_KEYS"}), f"WEBHOOK_KEYS: {error}"


HeadBytes = Annotated[int, Meta(ge=1024, le=16 * 2**20)]
HeaderCount = Annotated[int, Meta(ge=1, le=10_000)]
Connections = Annotated[int, Meta(ge=0, le=2**20)]


class HttpSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Limits on clients of ``viralfx serve`` and ``viralfx worker``.

    A field's variable is ``HTTP_`` and its name.
    """

    max_head_bytes: Annotated[
        HeadBytes,
        meaning("Maximum size of request line and headers together, in bytes; beyond it: 431"),
    ] = 65536
    max_headers: Annotated[
        HeaderCount, meaning("Maximum number of headers of a request; beyond it: 431")
    ] = 100
    head_timeout: Annotated[
        PositiveDuration, meaning("Time for the head of a request to arrive; beyond it: 408")
    ] = 10.0
    keep_alive_timeout: Annotated[
        PositiveDuration, meaning("Time after which an idle connection is closed")
    ] = 75.0
    body_timeout: Annotated[
        PositiveDuration,
        meaning("Longest pause of a client while it sends a body; beyond it: 408"),
    ] = 30.0
    max_websocket_bytes: Annotated[
        HeadBytes,
        meaning("Maximum size of a WebSocket message in bytes; beyond it: close code 1009"),
    ] = 2**20
    max_connections: Annotated[
        Connections,
        meaning(
            "Maximum number of open connections to the API; beyond it: 503;"
            " 0: from the limits of descriptors and memory"
        ),
    ] = 0
