"""The Redis client: pool, retries, counters, and fallbacks during an outage."""

import asyncio
import functools
import logging
import math
import re
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol, TypeVar, cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import TimeoutError as RedisTimeoutError

from viralfx.adapters.redis.connections import (
    Address,
    Primary,
    ServerConnection,
    Traffic,
    WaitingPool,
)
from viralfx.adapters.redis.credentials import Account, TlsContext
from viralfx.adapters.redis.errors import is_pool_exhausted, is_unavailable, refuses_writes
from viralfx.adapters.redis.retry import RequestRetry, retry_policy
from viralfx.core.clock import Clock, SystemClock, finished_within
from viralfx.core.errors import require_count, require_not_negative, require_positive
from viralfx.core.loops import HomeLoop, at_home, beside_others
from viralfx.core.threads import NameLookups
from viralfx.resilience._callables import operation_name, require_callable
from viralfx.resilience.fallback import with_fallback
from viralfx.settings import CredentialsCallable, RedisSettings, Secret
from viralfx.settings.groups import parse_redis_url

MEMORY_QUERY_INTERVAL_SECONDS = 30.0
"""Memory usage changes over minutes, not seconds."""
FORBIDDEN_RETRY_SECONDS = 3600.0
"""Wait after the server refused the command; permissions change rarely."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Memory usage of a Redis server, in bytes."""

    used: int
    limit: int | None
    """None: Redis has no limit of its own."""
    evicts: bool = True
    """False: Redis refuses writes at the limit."""

    @property
    def is_full(self) -> bool:
        """True if Redis refuses writes."""
        return self.limit is not None and self.used >= self.limit and not self.evicts


class MemoryQuery:
    """Decides when to query the memory usage, and keeps the last result.

    A query needs a successful ping since the last one: a server that is loading its data, or cannot
    save it, refuses a ping but still reports its memory.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._passed = False
        self._next = -math.inf
        self.usage: MemoryUse | None = None
        """The last result; None before the first."""

    @property
    def due(self) -> bool:
        """True if the next check should query the memory."""
        return self._passed and self._clock.monotonic() >= self._next

    def pinged(self) -> None:
        """Record a successful ping."""
        self._passed = True

    def failed(self) -> None:
        """Record a failed check: the next ones ping again."""
        self._passed = False

    def replied(self, reply: object) -> None:
        """Record the reply to ``INFO memory``."""
        self._passed = False
        self._next = self._clock.monotonic() + MEMORY_QUERY_INTERVAL_SECONDS
        text = reply.decode("utf-8", "replace") if isinstance(reply, bytes) else str(reply)
        if used := re.search(r"^used_memory:(\d+)", text, re.MULTILINE):
            limit = re.search(r"^maxmemory:(\d+)", text, re.MULTILINE)
            max_bytes = int(limit[1]) if limit else 0
            evicts = "maxmemory_policy:noeviction" not in text
            self.usage = MemoryUse(used=int(used[1]), limit=max_bytes or None, evicts=evicts)

    def forbidden(self) -> None:
        """Record that the server refused the command."""
        self._next = self._clock.monotonic() + FORBIDDEN_RETRY_SECONDS


_logger = logging.getLogger("viralfx.redis")

CLIENT_NAME = "viralfx"


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisLimits:
    """Time limits and pool size of a client. Durations are seconds.

    A request has up to ``attempts`` attempts. The waits between them start at ``retry_base``,
    double each time and never exceed ``retry_cap``: by default 0.5, 1 and 2 s. An attempt opens a
    connection if there is none, within ``connect_timeout``, and waits up to ``socket_timeout`` for
    each reply, so a frozen server holds a request for at most 11.5 s. Commands that block on
    purpose need a client of their own. ``sentinel_timeout`` limits connecting to one Sentinel, and
    its reply, before the next one is asked.

    At most ``pool_size`` requests run at once, those between two attempts included. Further
    requests wait up to ``pool_timeout``, which is longer than all waits between attempts (3.5 s),
    so that a failover does not exhaust the pool. ``degrade_after`` limits how long
    :meth:`RedisClient.get_with_graceful_degradation` waits before an outage is known.
    """

    connect_timeout: float = 10.0
    keep_alive: float = 30.0
    """Idle seconds after which the kernel sends keep-alive probes."""
    socket_timeout: float = 2.0
    attempts: int = 4
    retry_base: float = 0.5
    retry_cap: float = 3.0
    sentinel_timeout: float = 1.0
    pool_size: int = 50
    pool_timeout: float = 5.0
    degrade_after: float = 1.0

    def __post_init__(self) -> None:
        """Validate the values; ``ValueError`` and ``TypeError`` name the field."""
        for name in (
            "connect_timeout",
            "keep_alive",
            "socket_timeout",
            "sentinel_timeout",
            "pool_timeout",
            "degrade_after",
        ):
            require_positive(name, getattr(self, name))
        for name in ("retry_base", "retry_cap"):
            require_not_negative(name, getattr(self, name))
        for name in ("attempts", "pool_size"):
            require_count(name, getattr(self, name))


DEFAULT_LIMITS = RedisLimits()

T = TypeVar("T")
F = TypeVar("F")


class _Pool(Protocol):
    traffic: Traffic
    home: HomeLoop


class CountingRedis(Redis):
    """redis-py's client; counts its requests in the :class:`Traffic` of its pool.

    Await its commands on any event loop of the process: they run on that of the application.
    """

    @property
    def _home(self) -> HomeLoop:
        return cast("_Pool", self.connection_pool).home

    @at_home
    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Execute one command; see redis-py."""
        request: Awaitable[Any] = super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        return await _counted(self, _command(args), request)

    @at_home
    async def aclose(self, close_connection_pool: bool | None = None) -> None:  # noqa: FBT001 - redis-py's signature
        """Close the connections that are open; see redis-py."""
        await super().aclose(close_connection_pool)

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:  # noqa: FBT001, FBT002 - redis-py's signature
        """Return a pipeline that counts as one request; see redis-py."""
        return CountingPipeline(
            self.connection_pool, self.response_callbacks, transaction, shard_hint
        )


class CountingPipeline(Pipeline):
    """redis-py's pipeline; counts each execution, and immediate commands after WATCH."""

    @property
    def _home(self) -> HomeLoop:
        return cast("_Pool", self.connection_pool).home

    @at_home
    async def reset(self) -> None:  # type: ignore[override]  # it replaces a command of that name
        """Forget the queued commands, and return the connection; see redis-py."""
        await super().reset()  # type: ignore[no-untyped-call]

    @at_home
    async def execute(self, raise_on_error: bool = True) -> list[Any]:  # noqa: FBT001, FBT002 - redis-py's signature
        """Execute the queued commands; see redis-py."""
        if not self.command_stack and not self.watching:
            return []
        return await _counted(self, "PIPELINE", super().execute(raise_on_error))

    @at_home
    async def immediate_execute_command(self, *args: Any, **options: Any) -> Any:
        """Execute one command between WATCH and MULTI; see redis-py."""
        request: Awaitable[Any] = super().immediate_execute_command(*args, **options)  # type: ignore[no-untyped-call]
        return await _counted(self, _command(args), request)


def _command(args: tuple[Any, ...]) -> str:
    return str(args[0]).partition(" ")[0].upper() if args else "_OTHER"


async def _counted(client: Redis, operation: str, request: Awaitable[T]) -> T:
    traffic = cast("_Pool", client.connection_pool).traffic
    before, began = traffic.responses, perf_counter()
    try:
        result = await request
    except Exception as error:
        # Every error type counts as a failed request; the caller gets the error.
        traffic.observe(operation, perf_counter() - began, error)
        traffic.request_failed(error, before)
        raise
    traffic.observe(operation, perf_counter() - began, None)
    traffic.successful += 1
    traffic.responded()
    return result


class RedisClient:
    """Client of Redis, standalone or behind Sentinel. It connects at the first request.

    :attr:`redis` is redis-py's asynchronous client; replies are bytes. Requests are retried
    internally; do not wrap them in another retry, which would multiply the attempts. A retried
    request may have taken effect before.

    ``on_suspected_outage`` is called, synchronously, when a request finds Redis unavailable, or
    without room for writes. It should trigger the health check, which detects when Redis is back.
    ``credentials`` is called for each connection to the server, in place of user and password of
    the settings. A client refuses cluster nodes and Sentinels unless ``any_server`` is True.
    """

    def __init__(
        self,
        settings: RedisSettings,
        limits: RedisLimits = DEFAULT_LIMITS,
        *,
        clock: Clock | None = None,
        on_suspected_outage: Callable[[], object] = lambda: None,
        credentials: CredentialsCallable | None = None,
        any_server: bool = False,
        home: HomeLoop | None = None,
    ) -> None:
        """``home`` is the event loop of the connections; None: that of each caller."""
        self._home = home or HomeLoop()
        self._credentials = credentials
        self.settings = settings
        """The settings that the client was made with."""
        self.limits = limits
        """Size of the pool, timeouts and attempts."""
        self._clock = clock or SystemClock()
        self._traffic = Traffic(on_suspected_outage=on_suspected_outage)
        self.memory = MemoryQuery(self._clock)
        """Schedule and last result of the memory query."""
        self._sentinel_traffic = Traffic(on_suspected_outage=lambda: None)
        tls = TlsContext(settings) if settings.tls_enabled else None
        names = NameLookups()
        sentinel_options = {**_sentinel_options(settings, limits, tls), "names": names}
        self._sentinels = [
            WaitingPool(
                traffic=self._sentinel_traffic,
                size=1,
                max_wait=limits.sentinel_timeout,
                home=self._home,
                host=host,
                port=port,
                **sentinel_options,
            )
            for host, port in (settings.sentinel_addresses if settings.sentinel_enabled else ())
        ]
        self._primary = (
            Primary(settings.sentinel_name, [CountingRedis.from_pool(p) for p in self._sentinels])
            if self._sentinels
            else None
        )
        options: dict[str, Any] = {
            **_server_options(settings, limits, tls, credentials),
            "primary": self._primary,
            "names": names,
            "any_server": any_server,
        }
        self._pool = WaitingPool(
            traffic=self._traffic,
            size=limits.pool_size,
            max_wait=limits.pool_timeout,
            home=self._home,
            retry=RequestRetry(retry_policy(limits.attempts, limits.retry_base, limits.retry_cap)),
            **options,
        )
        self._dedicated: list[ServerConnection] = []
        self._options = options
        self._pools: list[WaitingPool] = []
        self.redis = CountingRedis.from_pool(self._pool)
        """redis-py's asynchronous client; replies are bytes."""

    def twin(self) -> "RedisClient":
        """Return another client of the same server, for another event loop."""
        return RedisClient(
            self.settings, self.limits, clock=self._clock, credentials=self._credentials
        )

    # -- reading -----------------------------------------------------------------------------

    @property
    def available(self) -> bool:
        """True if Redis is considered available.

        False after a request failed with all its retries, or the health check failed; True again
        after the first response to a request or a check.
        """
        return self._traffic.available

    @property
    def traffic(self) -> Traffic:
        """The live counters."""
        return self._traffic

    @property
    def active(self) -> int:
        """Number of connections in use."""
        return self._pool.in_use

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a free connection."""
        return self._pool.waiting

    @property
    def address(self) -> Address:
        """Host and port of the server; behind Sentinel, of the current primary.

        With ``REDIS_SOCKET``: the path of the socket and port 0.
        Before the first discovery of the primary: its name and port 0.
        """
        if self._primary is None:
            socket_path = self.settings.socket
            return (socket_path, 0) if socket_path else (_host(self.settings), self.settings.port)
        return self._primary.address or (self.settings.sentinel_name, 0)

    # -- requests ----------------------------------------------------------------------------

    @beside_others
    async def get_with_graceful_degradation(
        self, operation: Callable[[], Awaitable[T]], fallback: F
    ) -> T | F:
        """Return the result of ``operation``, or ``fallback`` if Redis is unavailable.

        Redis that refuses writes, as a replica does, also results in the fallback.
        During a known outage it returns at once, without calling the operation. Otherwise the
        operation is cancelled after ``RedisLimits.degrade_after`` (1 s); if Redis responded to no
        other request meanwhile, that is a known outage. An exhausted pool also results in the
        fallback. Other errors are raised. Raises ``TypeError`` if ``operation`` is not callable.

        You may await it on any event loop. ``operation`` runs on that of the application, so it
        must not block, nor use a client of another loop.
        """
        require_callable(operation)
        if not self._traffic.available:
            return fallback
        return await with_fallback(
            functools.partial(self._with_time_limit, operation),
            fallback,
            on=_degrades,
            name=operation_name(operation),
        )

    async def _with_time_limit(self, operation: Callable[[], Awaitable[T]]) -> T:
        before, limit = self._traffic.responses, self.limits.degrade_after
        timeout = asyncio.timeout(limit)
        try:
            async with timeout:
                return await operation()
        except TimeoutError as error:
            if not timeout.expired():
                raise  # the operation's own
            no_reply = RedisTimeoutError(f"no answer within {limit:g} s")
            # Cancelled requests are not counted; this one was cancelled by the time limit.
            self._traffic.request_failed(no_reply, before)
            raise no_reply from error

    # -- connections -------------------------------------------------------------------------

    def dedicated_connection(self) -> ServerConnection:
        """Return an unopened connection outside the pool, without retries, for exclusive use.

        It can be reopened any number of times; closing this client closes it too.
        """
        connection = ServerConnection(traffic=self._traffic, **self._options)
        self._dedicated.append(connection)
        return connection

    def further_client(self, *, size: int, socket_timeout: float, connect_timeout: float) -> Redis:
        """Return a client of the same server or primary with a pool of ``size`` connections.

        It is for requests with other time limits, in seconds. They have one attempt each and are
        counted like those of this client. Closing this client closes it too.
        """
        options = {"socket_timeout": socket_timeout, "socket_connect_timeout": connect_timeout}
        pool = WaitingPool(
            traffic=self._traffic,
            size=size,
            max_wait=socket_timeout,
            home=self._home,
            retry=RequestRetry(retry_policy(attempts=1)),
            **{**self._options, **options},
        )
        self._pools.append(pool)
        return CountingRedis.from_pool(pool)

    async def close(self, max_wait: float = 0.0) -> None:
        """Refuse new requests, wait up to ``max_wait`` seconds for running ones, and cut the rest.

        Idempotent, also before the first request.
        """
        self._traffic.closed = self._sentinel_traffic.closed = True
        try:
            if self._pool.in_use:
                all_released = asyncio.ensure_future(self._pool.all_released())
                try:
                    await finished_within(all_released, max_wait, self._clock)
                finally:
                    all_released.cancel()
        finally:
            if self._pool.in_use:
                _logger.warning("Redis requests were cut", extra={"requests": self._pool.in_use})
            for pool in (self._pool, *self._pools, *self._sentinels):
                pool.cut()
            for connection in self._dedicated:
                connection.cut()
        await self._clock.sleep(0)  # lets the event loop close the sockets


def _degrades(error: Exception) -> bool:
    return is_unavailable(error) or is_pool_exhausted(error) or refuses_writes(error)


def _host(settings: RedisSettings) -> str:
    return settings.address or "localhost"


CREDENTIALS_OPTION = "OperationsConfig.redis_credentials"


def _account(settings: RedisSettings, credentials: CredentialsCallable | None) -> Account | None:
    username, password, url = settings.username, settings.password, settings.url
    if credentials is not None:
        return Account(CREDENTIALS_OPTION, None, None, ask=credentials)
    if username is None and password is None:
        return None
    if url is not None and (url.file is None or not _holds(url, password)):
        url = None  # it cannot change, or REDIS_PASSWORD wins
    return Account("REDIS_PASSWORD", username, password, url=url)


def _holds(url: Secret, password: Secret | None) -> bool:
    return (
        password is not None and parse_redis_url(url.value).get("REDIS_PASSWORD") == password.value
    )


def _sentinel_account(settings: RedisSettings) -> Account | None:
    username, password = settings.sentinel_username, settings.sentinel_password
    if username is None and password is None:
        return None
    return Account("REDIS_SENTINEL_PASSWORD", username, password)


def _server_options(
    settings: RedisSettings,
    limits: RedisLimits,
    tls: TlsContext | None,
    credentials: CredentialsCallable | None,
) -> dict[str, Any]:
    return {
        "host": _host(settings),
        "port": settings.port,
        "socket_path": None if settings.sentinel_enabled else settings.socket,
        "db": settings.db,
        "account": _account(settings, credentials),
        "socket_timeout": limits.socket_timeout,
        "socket_connect_timeout": limits.connect_timeout,
        **_common_options(limits, tls),
    }


def _sentinel_options(
    settings: RedisSettings, limits: RedisLimits, tls: TlsContext | None
) -> dict[str, Any]:
    return {
        "account": _sentinel_account(settings),
        "any_server": True,
        "socket_timeout": limits.sentinel_timeout,
        "socket_connect_timeout": limits.sentinel_timeout,
        **_common_options(limits, tls),
    }


def _common_options(limits: RedisLimits, tls: TlsContext | None) -> dict[str, Any]:
    return {
        "client_name": CLIENT_NAME,
        "socket_keepalive": True,
        "socket_keepalive_options": _keep_alive(limits.keep_alive),
        "tls": tls,
    }


def _keep_alive(idle: float) -> dict[int, int]:
    # The name of the option differs by platform.
    name = "TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE"
    wanted = {name: max(1, round(idle)), "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
    return {getattr(socket, key): value for key, value in wanted.items() if hasattr(socket, key)}
