"""Connections and their pool: opened within a request's attempts, lent in turn, cut when in doubt.

Four things of redis-py 8.1 are done differently here. It opens connections with retries of their
own before a request's attempts begin, so that a request could have twice as many; here the pool
lends a closed connection, and opening it is part of the attempt. Behind Sentinel it opens a lost
connection to the same address again for as long as the request lasts, also when the primary has
moved; here each opening asks where the primary is. It closes politely, which with unsent data and
a frozen server never ends; here a connection is cut. And it writes under ``wait_for``, which up to
Python 3.11 swallows a cancellation that comes as the write ends.
"""

import asyncio
import contextlib
import ssl
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, cast

from redis.asyncio.connection import AbstractConnection, Connection, ConnectionPool
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import MaxConnectionsError, ReadOnlyError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.maint_notifications import MaintNotificationsConfig

from viralfx.adapters.redis.config import RedisTls
from viralfx.adapters.redis.sentinel import Primary
from viralfx.adapters.redis.traffic import Traffic

_HANDSHAKE = 1.5
"""Seconds for a TLS handshake: less than a health check has, so that it can tell."""


class TlsContext:
    """The TLS context that all connections share: reading the system's trust takes its time."""

    def __init__(self, tls: RedisTls) -> None:
        self._tls = tls

    @cached_property
    def context(self) -> ssl.SSLContext:
        """The context; raises ``SSLError`` for a file that cannot be read or is no certificate."""
        try:
            context = ssl.create_default_context(cafile=self._tls.ca_file)
        except ssl.SSLError:
            raise
        except OSError as error:
            raise ssl.SSLError(f"cannot read {self._tls.ca_file}: {error.strerror}") from error
        if not self._tls.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


class ServerConnection(Connection):
    """One connection to a server, or to whatever is the ``primary`` when it is opened."""

    def __init__(
        self,
        *,
        traffic: Traffic,
        tls: TlsContext | None = None,
        primary: Primary | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._traffic = traffic
        self._tls = tls
        self._primary = primary

    @property
    def outdated(self) -> bool:
        """Whether the primary is known to be elsewhere by now."""
        return self._primary is not None and self._primary.address != (self.host, self.port)

    def _connection_arguments(self) -> Mapping[str, Any]:
        arguments = dict(super()._connection_arguments())
        if self._tls is not None:
            arguments["ssl"] = self._tls.context
            arguments["ssl_handshake_timeout"] = _HANDSHAKE
        return arguments

    async def connect_check_health(
        self,
        check_health: bool = True,  # noqa: FBT001, FBT002 - redis-py's signature
        retry_socket_connect: bool = True,  # noqa: ARG002, FBT001, FBT002 - never: the request retries
    ) -> None:
        """Open it if it is not; one attempt."""
        if self.is_connected:
            return
        self._traffic.require_open()
        try:
            if self._primary is not None:
                self.host, self.port = await self._primary.find()
            await super().connect_check_health(check_health, retry_socket_connect=False)
        except RedisError:
            self._traffic.failed_attempts += 1
            raise
        except BaseException:
            self.cut()
            raise
        self._traffic.failed_attempts = 0

    async def send_packed_command(
        self,
        command: bytes | str | Iterable[bytes],
        check_health: bool = True,  # noqa: ARG002, FBT001, FBT002 - redis-py's signature
    ) -> None:
        """Write a command, to a connection that is opened first if need be."""
        if not self.is_connected:
            await self.connect_check_health(check_health=False)
        if isinstance(command, str):
            command = command.encode()
        if (writer := self._writer) is None:
            raise RedisConnectionError("the connection was cut")
        try:
            writer.writelines([command] if isinstance(command, bytes) else command)
            async with asyncio.timeout(self.socket_timeout):
                await writer.drain()
        except TimeoutError:
            self.cut()
            raise RedisTimeoutError(f"timeout writing to {self._host_error()}") from None
        except OSError as error:
            self.cut()
            raise RedisConnectionError(f"error writing to {self._host_error()}") from error
        except BaseException:
            self.cut()  # nobody knows how much of it was sent
            raise

    async def read_response(self, *args: Any, **options: Any) -> Any:
        """Read a reply; a primary that has become a replica counts as a lost connection."""
        try:
            return await super().read_response(*args, **options)
        except ReadOnlyError as error:
            if self._primary is None:
                raise
            self.cut()
            raise RedisConnectionError("the primary has become a replica") from error

    async def disconnect(
        self,
        nowait: bool = False,  # noqa: ARG002, FBT001, FBT002 - redis-py's signature; never waits
        error: Exception | None = None,
        failure_count: int | None = None,
        health_check_failed: bool = False,  # noqa: FBT001, FBT002 - redis-py's signature
    ) -> None:
        """Close it at once, whatever is still to be sent."""
        writer = self._writer
        try:
            await super().disconnect(True, error, failure_count, health_check_failed)
        finally:
            if writer is not None:
                writer.transport.abort()

    def cut(self) -> None:
        """Close it at once, without a turn of the loop."""
        self._parser.on_disconnect()  # type: ignore[no-untyped-call]
        writer, self._writer, self._reader = self._writer, None, None
        if writer is not None:
            writer.close()
            writer.transport.abort()


class WaitingPool(ConnectionPool):
    """Lends up to ``size`` connections; who comes then waits in line, up to ``patience`` seconds.

    Giving back takes no turn of the loop, so that no cancellation can come between and keep a
    place occupied for ever.
    """

    def __init__(
        self, *, traffic: Traffic, size: int, patience: float, **connection_options: Any
    ) -> None:
        super().__init__(
            connection_class=ServerConnection,
            max_connections=size,
            # They are for one vendor's cloud, and cost every connection a command.
            maint_notifications_config=MaintNotificationsConfig(enabled=False),
            traffic=traffic,
            **connection_options,
        )
        self.traffic = traffic
        self.waiting = 0
        """How many requests are in line."""
        self._patience = patience
        self._places = asyncio.Semaphore(size)
        self._given_back = asyncio.Event()

    async def get_connection(
        self, command_name: object = None, *keys: object, **options: object
    ) -> AbstractConnection:
        """Lend a connection, not necessarily an open one.

        Raises ``MaxConnectionsError`` when the turn does not come in time.
        """
        del command_name, keys, options  # redis-py's signature
        self.traffic.require_open()
        await self._take_place()
        try:
            connection = cast("AbstractConnection", self.get_available_connection())  # type: ignore[no-untyped-call]
        except BaseException:
            self._places.release()
            raise
        try:
            await self.ensure_connection(connection)
        except BaseException:
            await self.release(connection)
            raise
        return connection

    async def _take_place(self) -> None:
        if not self._places.locked():
            await self._places.acquire()  # at once
            return
        self.waiting += 1
        try:
            async with asyncio.timeout(self._patience):
                await self._places.acquire()
        except TimeoutError:
            raise MaxConnectionsError(
                f"all {self.max_connections} connections were in use for {self._patience:g} s"
            ) from None
        finally:
            self.waiting -= 1

    async def ensure_connection(self, connection: AbstractConnection) -> None:
        """Close it if it is not fit for use any more; it is opened again by who uses it."""
        mine = cast("ServerConnection", connection)
        if not mine.is_connected:
            return
        with contextlib.suppress(RedisConnectionError):
            # Something to read before anything was asked: an end of file, or somebody's answer.
            if not mine.outdated and not await mine.can_read():
                return
        mine.cut()

    async def release(self, connection: AbstractConnection) -> None:
        """Take it back."""
        self._in_use_connections.remove(connection)
        self._available_connections.append(connection)
        self._places.release()
        self._given_back.set()

    @property
    def lent(self) -> int:
        """How many connections are in use."""
        return len(self._in_use_connections)

    async def all_given_back(self) -> None:
        """Return when no connection is in use."""
        while self._in_use_connections:
            self._given_back.clear()
            await self._given_back.wait()

    def cut(self) -> None:
        """Close all connections at once, those in use as well."""
        for connection in (*self._available_connections, *self._in_use_connections):
            cast("ServerConnection", connection).cut()
