"""The settings of the database and of Redis: the variables ``DB_*`` and ``REDIS_*``."""

from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from viralfx.settings.hosts import is_possible_host
from viralfx.settings.kinds import (
    Attempts,
    Endpoints,
    Milliseconds,
    PositiveMilliseconds,
    RemotePort,
    Secret,
    meaning,
)

PoolSize = Annotated[int, Meta(ge=0, le=10_000)]
PositivePoolSize = Annotated[int, Meta(ge=1, le=10_000)]

POOL_PROFILES = {"small": (2, 10), "medium": (5, 20), "large": (10, 50)}
"""Least and most connections by the size of an application: 1-10, 10-100, 100+ requests/s."""


class DatabaseSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How the database of DATABASE_URL is used. A field's variable is ``DB_`` and its name."""

    password: Annotated[Secret | None, meaning("Password, where DATABASE_URL is to hold none")] = (
        None
    )
    tls_mode: Annotated[
        Literal["disable", "prefer", "require", "verify-ca", "verify-full"],
        meaning("TLS to Postgres, as libpq's sslmode; verify-full where a CA file is named"),
    ] = "prefer"
    tls_ca_file: Annotated[
        str | None, meaning("Certificates that verify Postgres's; unset: the system's trust")
    ] = None
    pool_min: Annotated[PoolSize, meaning("Connections that are always open")] = 2
    pool_max: Annotated[PositivePoolSize, meaning("Connections that are open at most")] = 10
    pool_timeout: Annotated[
        PositiveMilliseconds, meaning("Time to wait for a connection of the pool")
    ] = 30000
    connection_timeout: Annotated[
        PositiveMilliseconds, meaning("Time to wait for a new connection")
    ] = 30000
    statement_timeout: Annotated[
        Milliseconds, meaning("Time after which Postgres cancels a statement; 0: never")
    ] = 60000
    slow_query_threshold: Annotated[
        Milliseconds, meaning("Time from which a query is logged as slow; 0: none is")
    ] = 1000
    health_check_interval: Annotated[
        PositiveMilliseconds,
        meaning("Time between two attempts of the database check while it passes"),
    ] = 30000
    max_reconnect_attempts: Annotated[
        Attempts, meaning("Attempts to connect at start-up before it fails")
    ] = 5
    reconnect_delay: Annotated[
        Milliseconds, meaning("Time between two attempts to connect at start-up")
    ] = 5000

    def contradictions(self) -> Iterator[tuple[frozenset[str], str]]:
        """Yield what is wrong, each with the variables that it comes from."""
        if self.tls_ca_file is not None and self.tls_mode in {"disable", "prefer"}:
            problem = f"verifies nothing with DB_TLS_MODE={self.tls_mode}; set it to verify-full"
            yield frozenset({"DB_TLS_CA_FILE", "DB_TLS_MODE"}), f"DB_TLS_CA_FILE: {problem}"


class RedisSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How Redis is found and used. A field's variable is ``REDIS_`` and its name."""

    host: Annotated[
        # A whole address is a frequent mistake, and it may hold a password.
        Annotated[str, Meta(pattern=r"^(\[?[0-9A-Fa-f:.]+\]?|[^\s\[\]:/@]+)$")] | None,
        meaning("Redis host; unset, and without Sentinel: the cache is in memory"),
    ] = None
    port: Annotated[RemotePort, meaning("Redis port")] = 6379
    username: Annotated[str | None, meaning("Redis ACL user; unset: the default user")] = None
    password: Annotated[Secret | None, meaning("Redis password")] = None
    db: Annotated[int, Meta(ge=0, le=10_000), meaning("Number of the Redis database")] = 0
    sentinel_enabled: Annotated[bool, meaning("Ask Sentinels for the Redis primary")] = False
    sentinels: Annotated[Endpoints, meaning("Addresses of the Sentinels")] = ()
    sentinel_name: Annotated[
        str, Meta(min_length=1), meaning("Name that the Sentinels know the primary by")
    ] = "mymaster"
    sentinel_username: Annotated[str | None, meaning("ACL user of the Sentinels")] = None
    sentinel_password: Annotated[Secret | None, meaning("Password of the Sentinels")] = None
    tls_enabled: Annotated[bool, meaning("Use TLS to Redis, and to the Sentinels")] = False
    tls_reject_unauthorized: Annotated[
        bool, meaning("Verify the certificate of Redis; false: anybody's is accepted")
    ] = True
    tls_ca_file: Annotated[
        str | None, meaning("Certificates that verify Redis's; unset: the system's trust")
    ] = None

    @property
    def address(self) -> str:
        """The host, without the brackets of an IPv6 address; empty where there is none."""
        return (self.host or "").strip("[]")

    @property
    def in_use(self) -> bool:
        """Whether there is a Redis; otherwise memory stands in."""
        return self.sentinel_enabled or self.host is not None

    @property
    def sentinel_addresses(self) -> tuple[tuple[str, int], ...]:
        """The Sentinels as host and port."""
        pairs = (endpoint.rpartition(":") for endpoint in self.sentinels)
        return tuple((host.strip("[]"), int(port)) for host, _, port in pairs)

    def contradictions(self) -> Iterator[tuple[frozenset[str], str]]:
        """Yield what is wrong, each with the variables that it comes from."""
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
        if not is_possible_host(self.address or "redis"):
            yield (
                frozenset({"REDIS_HOST"}),
                f"REDIS_HOST: {self.host!r} is no possible host name; look for a typing error",
            )
        for host, port in self.sentinel_addresses:
            if not 1 <= port <= 65535:  # noqa: PLR2004 - the range of ports
                yield (
                    frozenset({"REDIS_SENTINELS"}),
                    f"REDIS_SENTINELS: {host}:{port} has no port from 1 to 65535",
                )
