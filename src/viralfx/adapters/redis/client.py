"""The client: one pool, one retry, its counters, and the answer for when Redis is away."""

import asyncio
import functools
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from redis.asyncio import Redis
from redis.exceptions import TimeoutError as RedisTimeoutError

from viralfx.adapters.redis.config import Address, RedisConfig
from viralfx.adapters.redis.connections import ServerConnection, TlsContext, WaitingPool
from viralfx.adapters.redis.errors import is_away, is_exhausted
from viralfx.adapters.redis.memory import MemoryQuestion
from viralfx.adapters.redis.retry import request_retry
from viralfx.adapters.redis.sentinel import Primary
from viralfx.adapters.redis.traffic import CountingRedis, Traffic
from viralfx.domain.clock import Clock, SystemClock, finished_within
from viralfx.domain.resilience.fallback import with_fallback
from viralfx.domain.resilience.guardable import operation_name, refuse_uncallable

_logger = logging.getLogger("viralfx.redis")

CLIENT_NAME = "viralfx"

T = TypeVar("T")
F = TypeVar("F")


class RedisClient:
    """Requests to Redis, standalone or behind Sentinel. Nothing is opened before the first one.

    :attr:`redis` is redis-py's asynchronous client, with bytes as answers. Every request has its
    retries inside; a second retry around it would only multiply them. A request that is retried
    may have taken effect the first time.

    ``on_doubt`` is called, synchronously, when a request finds Redis away; it should have the
    health check run, because that is what finds it back.
    """

    def __init__(
        self,
        config: RedisConfig,
        *,
        clock: Clock | None = None,
        on_doubt: Callable[[], object] = lambda: None,
    ) -> None:
        self.config = config
        self._clock = clock or SystemClock()
        self._traffic = Traffic(on_doubt=on_doubt)
        self.memory = MemoryQuestion(self._clock)
        """What the health check asks the server about its memory."""
        self._sentinel_traffic = Traffic(on_doubt=lambda: None)
        tls = None if config.tls is None else TlsContext(config.tls)
        self._sentinels = [
            WaitingPool(
                traffic=self._sentinel_traffic,
                size=1,
                patience=config.sentinel_timeout,
                host=host,
                port=port,
                **_sentinel_options(config, tls),
            )
            for host, port in config.sentinels
        ]
        self._primary = (
            Primary(config.sentinel_name, [CountingRedis.from_pool(p) for p in self._sentinels])
            if self._sentinels
            else None
        )
        options = _server_options(config, tls, self._primary)
        self._pool = WaitingPool(
            traffic=self._traffic,
            size=config.pool_size,
            patience=config.pool_timeout,
            retry=request_retry(config.retries, config.retry_base, config.retry_cap),
            **options,
        )
        self._own: list[ServerConnection] = []
        self._own_options = options
        self._further: list[WaitingPool] = []
        self.redis = CountingRedis.from_pool(self._pool)

    # -- reading -----------------------------------------------------------------------------

    @property
    def available(self) -> bool:
        """Whether Redis is believed to be there.

        False once a request failed on it after its retries, or the health check did; True again
        after the first answer to either.
        """
        return self._traffic.available

    @property
    def traffic(self) -> Traffic:
        """The counters, live."""
        return self._traffic

    @property
    def active(self) -> int:
        """How many connections are in use."""
        return self._pool.lent

    @property
    def waiting(self) -> int:
        """How many requests wait for a connection, all of them being in use."""
        return self._pool.waiting

    @property
    def address(self) -> Address:
        """Host and port of the server; behind Sentinel those of the current primary.

        Before the primary was found for the first time, its name and port 0.
        """
        if self._primary is None:
            return self.config.host, self.config.port
        return self._primary.address or (self.config.sentinel_name, 0)

    # -- requests ----------------------------------------------------------------------------

    async def get_with_graceful_degradation(
        self, operation: Callable[[], Awaitable[T]], fallback: F
    ) -> T | F:
        """Return what ``operation`` returns, or ``fallback`` when Redis is down.

        Known to be down, that is at once, and the operation is not called. Otherwise it is cut
        after ``RedisConfig.degrade_after`` (1 s): unless Redis answered somebody meanwhile, it is
        then known. Running out of connections gives the fallback, too. Errors that are not Redis
        being away reach the caller. Raises ``TypeError`` for what is no function.
        """
        refuse_uncallable(operation)
        if not self._traffic.available:
            return fallback
        return await with_fallback(
            functools.partial(self._cut_off, operation),
            fallback,
            on=_degrades,
            name=operation_name(operation),
        )

    async def _cut_off(self, operation: Callable[[], Awaitable[T]]) -> T:
        before, limit = self._traffic.answers, self.config.degrade_after
        timeout = asyncio.timeout(limit)
        try:
            async with timeout:
                return await operation()
        except TimeoutError as error:
            if not timeout.expired():
                raise  # the operation's own
            cut = RedisTimeoutError(f"no answer within {limit:g} s")
            # Its request was cancelled and so not counted, but that was our doing.
            self._traffic.request_failed(cut, before)
            raise cut from error

    # -- connections -------------------------------------------------------------------------

    def own_connection(self) -> ServerConnection:
        """Return a connection for somebody's sole use: not of the pool, without retries, not open.

        It is kept, to be opened as often as need be, and cut when this client is closed.
        """
        connection = ServerConnection(traffic=self._traffic, **self._own_options)
        self._own.append(connection)
        return connection

    def further_client(self, *, size: int, socket_timeout: float, connect_timeout: float) -> Redis:
        """Return a client of the same server, or primary, with ``size`` connections of its own.

        For requests that wait otherwise than a cache does. Each has one attempt, and counts; its
        durations are seconds. It is cut when this client is closed.
        """
        options = {"socket_timeout": socket_timeout, "socket_connect_timeout": connect_timeout}
        pool = WaitingPool(
            traffic=self._traffic,
            size=size,
            patience=socket_timeout,
            retry=request_retry(0, 0.0, 0.0),
            **{**self._own_options, **options},
        )
        self._further.append(pool)
        return CountingRedis.from_pool(pool)

    async def close(self, patience: float = 0.0) -> None:
        """Refuse new requests, let those under way end for ``patience`` seconds, and cut the rest.

        May be called repeatedly, and before anything was opened.
        """
        self._traffic.closed = self._sentinel_traffic.closed = True
        try:
            if self._pool.lent:
                given_back = asyncio.ensure_future(self._pool.all_given_back())
                try:
                    await finished_within(given_back, patience, self._clock)
                finally:
                    given_back.cancel()
        finally:
            if self._pool.lent:
                _logger.warning("Redis requests were cut", extra={"requests": self._pool.lent})
            for pool in (self._pool, *self._further, *self._sentinels):
                pool.cut()
            for connection in self._own:
                connection.cut()
        await self._clock.sleep(0)  # the turn in which the loop closes the sockets


def _degrades(error: Exception) -> bool:
    return is_away(error) or is_exhausted(error)


def _server_options(
    config: RedisConfig, tls: TlsContext | None, primary: Primary | None
) -> dict[str, Any]:
    return {
        "host": config.host,
        "port": config.port,
        "db": config.db,
        "username": config.username,
        "password": config.password,
        "socket_timeout": config.socket_timeout,
        "socket_connect_timeout": config.connect_timeout,
        "primary": primary,
        **_common_options(config, tls),
    }


def _sentinel_options(config: RedisConfig, tls: TlsContext | None) -> dict[str, Any]:
    return {
        "username": config.sentinel_username,
        "password": config.sentinel_password,
        "socket_timeout": config.sentinel_timeout,
        "socket_connect_timeout": config.sentinel_timeout,
        **_common_options(config, tls),
    }


def _common_options(config: RedisConfig, tls: TlsContext | None) -> dict[str, Any]:
    return {
        "client_name": CLIENT_NAME,
        "socket_keepalive": True,
        "socket_keepalive_options": _keep_alive(config.keep_alive),
        "tls": tls,
    }


def _keep_alive(idle: float) -> dict[int, int]:
    # The name differs by platform; where there is none, the system's own idle time holds.
    name = "TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE"
    wanted = {name: max(1, round(idle)), "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
    return {getattr(socket, key): value for key, value in wanted.items() if hasattr(socket, key)}
