"""Connections, their pool, discovery of the primary, and counters of requests.

This module changes six behaviours of redis-py 8.1:

* redis-py opens connections with retries of their own before the attempts of a request begin, which
  may double them. Here the pool provides a closed connection; opening it is part of the attempt.
* Behind Sentinel, redis-py reopens a lost connection to the same address for the duration of the
  request, even if the primary has moved. Here each opening asks Sentinel for the primary.
* redis-py closes gracefully, which never ends with unsent data and a frozen server. Here the
  connection is aborted.
* redis-py writes under ``wait_for``, which up to Python 3.11 may swallow a cancellation.
* redis-py resolves names in threads of the event loop, which a name server that hangs keeps from
  all other code. Here a lookup has a thread of its own.
* redis-py uses any server that answers. Here the greeting decides: a cluster node and a Sentinel
  are refused, and a server that became a replica is left.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypeVar, cast

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection, Connection, ConnectionPool
from redis.asyncio.sentinel import MasterNotFoundError
from redis.exceptions import (
    AuthenticationError,
    MaxConnectionsError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.maint_notifications import MaintNotificationsConfig

from viralfx.adapters.redis.credentials import Account, Login, TlsContext
from viralfx.adapters.redis.errors import (
    ClientClosedError,
    DemotedError,
    IdleConnectionError,
    RedisProblem,
    WrongServerError,
    is_unavailable,
    refuses_writes,
)
from viralfx.core.events import OperationListener, ignore_operation
from viralfx.core.loops import ForeignLoopError, HomeLoop
from viralfx.core.threads import NameLookups
from viralfx.domain.cache import SingleFlight

T = TypeVar("T")

Address = tuple[str, int]
"""A host and a port."""


@dataclass(slots=True, kw_only=True)
class Traffic:
    """Counters that all connections and requests of one client share.

    A request is a command, a pipeline or a transaction. Requests of cancelled callers and the pings
    of the health check are not counted.
    """

    on_suspected_outage: Callable[[], object]
    """Called when a failed request suggests an outage."""
    successful: int = 0
    failed: int = 0
    failed_attempts: int = 0
    """Consecutive failures to open a connection."""
    responses: int = 0
    """Number of responses, including those to pings and error replies."""
    available: bool = True
    """True if Redis is considered available; initially True."""
    writes_refused: bool = False
    """True if Redis refuses writes, by the last reply to a request or check that tells."""
    epoch: int = 0
    """Connections of an earlier epoch are closed before their next request."""
    closed: bool = False
    observe: OperationListener = ignore_operation
    """Called for every request, except those of cancelled callers."""

    def responded(self) -> None:
        """Record a response."""
        self.responses += 1
        self.available = True

    def timed_out(self, responses_before: int, *, notify: bool) -> None:
        """Record a timed-out request. ``responses_before`` is the response count when it started.

        If other requests got responses meanwhile, Redis stays available. With ``notify``, calls
        ``on_suspected_outage`` unless the outage is known already.
        """
        known = not self.available
        if self.responses == responses_before:
            self.available = False
        if notify and not known and not self.closed:
            self.on_suspected_outage()

    def request_failed(self, error: Exception, responses_before: int) -> None:
        """Count a request that failed for good."""
        self.failed += 1
        if is_unavailable(error):
            self.timed_out(responses_before, notify=True)
        elif isinstance(error, ResponseError):
            self.responded()
            if refuses_writes(error) and not self.writes_refused:
                self.writes_refused = True
                self.on_suspected_outage()

    def leave_connections(self) -> None:
        """Close every open connection before its next request: its server was replaced or lost."""
        self.epoch += 1

    def require_open(self) -> None:
        """Raise :class:`ClientClosedError` once the client is closed."""
        if self.closed:
            raise ClientClosedError("the Redis client is closed: the application has stopped")


_logger = logging.getLogger("viralfx.redis")


class Primary:
    """Asks the sentinels, one after the other, for the primary called ``name``.

    Concurrent openings share one search. A sentinel that does not respond moves to the end.
    """

    def __init__(self, name: str, sentinels: Sequence[Redis]) -> None:
        self.address: Address | None = None
        """Address found by the last search."""
        self._name = name
        self._sentinels = list(sentinels)
        self._search: SingleFlight[Address] = SingleFlight()

    async def find(self) -> Address:
        """Return the current address of the primary.

        Raises ``MasterNotFoundError`` if no sentinel responds or none reports a primary that is up,
        :class:`WrongServerError` if none monitors a primary of that name, and the sentinel's
        ``ResponseError`` if it refuses the command.
        """
        return await self._search.run(self._name, self._find)

    async def _find(self) -> Address:
        reason: RedisError | None = None
        unknown: ResponseError | None = None
        for sentinel in tuple(self._sentinels):
            try:
                reply = await sentinel.sentinel_master(self._name)
            except ResponseError as error:
                unknown = error
            except RedisError as error:
                reason = error
            else:
                state = cast("dict[str, Any]", reply)
                if state["is_master"] and not state["is_sdown"] and not state["is_odown"]:
                    return self._found((str(state["ip"]), int(state["port"])))
            self._sentinels.remove(sentinel)
            self._sentinels.append(sentinel)
        if unknown is not None and reason is None:
            if "No such master" in str(unknown):
                raise WrongServerError(
                    RedisProblem.UNKNOWN_PRIMARY,
                    f"Sentinel knows no primary named {self._name!r}; correct REDIS_SENTINEL_NAME",
                ) from unknown
            raise unknown
        raise MasterNotFoundError(f"no sentinel knows a primary {self._name!r} that is up") from (
            reason
        )

    def _found(self, address: Address) -> Address:
        if self.address is not None and self.address != address:
            _logger.warning(
                "Redis primary moved",
                extra={"old": _text(self.address), "new": _text(address)},
            )
        self.address = address
        return address


def _text(address: Address) -> str:
    return f"{address[0]}:{address[1]}"


TLS_HANDSHAKE_SECONDS = 1.5
"""Shorter than the timeout of the health check, so that the check can report it."""
IDLE_SECONDS = 5.0
"""Idle time after which a connection that does not answer may have been dropped silently."""
REPLICA_SECONDS = 1.0
"""Age from which a connection to a replica is opened again: the name may lead to a primary now."""


class ServerConnection(Connection):
    """A connection to a server, or to the current ``primary`` at the time of opening.

    ``socket_path`` replaces host and port. ``any_server`` also accepts cluster nodes and Sentinels.
    """

    def __init__(
        self,
        *,
        traffic: Traffic,
        names: NameLookups,
        tls: TlsContext | None = None,
        primary: Primary | None = None,
        account: Account | None = None,
        socket_path: str | None = None,
        any_server: bool = False,
        **options: Any,
    ) -> None:
        self._login = None if account is None else Login(account)
        super().__init__(credential_provider=self._login, **options)
        self.is_replica = False
        """True if the server was a replica when the connection was opened."""
        self._traffic = traffic
        self._names = names
        self._place: Address = "", 0
        self._tls = tls
        self._primary = primary
        self._socket_path = socket_path
        self._any_server = any_server
        self._is_opening = False
        self._opened_at = self._used_at = 0.0
        self._idle_for = 0.0
        self._epoch = 0

    @property
    def outdated(self) -> bool:
        """True if the server is known to be the wrong one by now."""
        if self._epoch != self._traffic.epoch:
            return True
        if self.is_replica and perf_counter() - self._opened_at >= REPLICA_SECONDS:
            return True
        return self._primary is not None and self._primary.address != (self.host, self.port)

    def _connection_arguments(self) -> Mapping[str, Any]:
        host, port = self._place
        arguments = {**super()._connection_arguments(), "host": host, "port": port}
        if self._tls is not None:
            arguments["ssl"], arguments["server_hostname"] = self._tls.context, self.host
            arguments["ssl_handshake_timeout"] = TLS_HANDSHAKE_SECONDS
        return arguments

    async def _connect(self) -> None:
        async with asyncio.timeout(self.socket_connect_timeout):
            if self._socket_path is None:
                await self._connect_to(await self._names.places(self.host, self.port))
                return
            opened = await asyncio.open_unix_connection(self._socket_path)
        self._reader, self._writer = opened

    async def _connect_to(self, places: Sequence[Address]) -> None:
        failures: list[OSError] = []
        for place in places:
            self._place = place
            try:
                await super()._connect()  # type: ignore[no-untyped-call]
            except OSError as error:
                failures.append(error)
            else:
                return
        raise failures[0]

    def _host_error(self) -> str:
        return self._socket_path or super()._host_error()

    async def connect_check_health(
        self,
        check_health: bool = True,  # noqa: FBT001, FBT002 - redis-py's signature
        retry_socket_connect: bool = True,  # noqa: ARG002, FBT001, FBT002 - unused: the request retries
    ) -> None:
        """Open the connection if it is closed, in one attempt.

        If the server refuses a password, and there is another one by then, that is tried at once.
        """
        if self.is_connected:
            return
        self._traffic.require_open()
        try:
            try:
                await self._open(check_health)
            except AuthenticationError:
                if self._login is None or not await self._login.renewed():
                    raise
                await self._open(check_health)
        except RedisError:
            self._traffic.failed_attempts += 1
            raise
        except BaseException:
            self.cut()
            raise
        self._traffic.failed_attempts = 0

    async def _open(self, check_health: bool) -> None:  # noqa: FBT001 - as redis-py
        self._is_opening, self.is_replica = True, False
        self._epoch = self._traffic.epoch
        self._opened_at = self._used_at = perf_counter()
        if self._primary is not None:
            self.host, self.port = await self._primary.find()
        await super().connect_check_health(check_health, retry_socket_connect=False)
        self._is_opening = False

    def _greeted(self, greeting: Mapping[bytes, Any]) -> None:
        mode = greeting.get(b"mode")
        self.is_replica = greeting.get(b"role") in {b"replica", b"slave"}
        if self._any_server:
            return
        if mode == b"cluster":
            raise WrongServerError(RedisProblem.CLUSTER)
        if mode == b"sentinel":
            raise WrongServerError(RedisProblem.SENTINEL)
        if self.is_replica and self._primary is not None:
            raise DemotedError("Sentinel still names a server that is a replica")

    async def send_packed_command(
        self,
        command: bytes | str | Iterable[bytes],
        check_health: bool = True,  # noqa: ARG002, FBT001, FBT002 - redis-py's signature
    ) -> None:
        """Write a command; opens the connection first if it is closed."""
        if not self.is_connected:
            await self.connect_check_health(check_health=False)
        if isinstance(command, str):
            command = command.encode()
        if (writer := self._writer) is None:
            raise RedisConnectionError("the connection was cut")
        now = perf_counter()
        self._idle_for, self._used_at = now - self._used_at, now
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
            self.cut()  # the command may have been sent in part
            raise

    async def read_response(self, *args: Any, **options: Any) -> Any:
        """Read a reply; a primary that became a replica is a lost connection."""
        try:
            reply = await super().read_response(*args, **options)
        except ReadOnlyError as error:
            if self.is_replica:
                raise  # a new connection would meet the same answer
            self._traffic.leave_connections()
            self.cut()
            raise DemotedError("the primary has become a replica") from error
        except AuthenticationError:
            self.cut()
            raise
        except RedisTimeoutError as error:
            if self._idle_for < IDLE_SECONDS:
                raise
            # A firewall drops the other idle connections, too.
            self._traffic.leave_connections()
            raise IdleConnectionError(str(error)) from error
        if self._is_opening and isinstance(reply, dict) and b"mode" in reply:
            self._greeted(reply)
        return reply

    async def disconnect(
        self,
        nowait: bool = False,  # noqa: ARG002, FBT001, FBT002 - redis-py's signature; never waits
        error: Exception | None = None,
        failure_count: int | None = None,
        health_check_failed: bool = False,  # noqa: FBT001, FBT002 - redis-py's signature
    ) -> None:
        """Close the connection at once, without sending buffered data."""
        writer = self._writer
        try:
            await super().disconnect(True, error, failure_count, health_check_failed)
        finally:
            if writer is not None:
                writer.transport.abort()

    def cut(self) -> None:
        """Close the connection at once and synchronously."""
        self._parser.on_disconnect()  # type: ignore[no-untyped-call]
        writer, self._writer, self._reader = self._writer, None, None
        if writer is not None:
            writer.close()
            writer.transport.abort()

    def forget(self) -> None:
        """Leave the socket to the garbage collector: its event loop has ended."""
        self._parser.on_disconnect()  # type: ignore[no-untyped-call]
        self._writer = self._reader = None


class WaitingPool(ConnectionPool):
    """Pool of up to ``size`` connections; further requests wait up to ``max_wait`` seconds.

    Releasing never yields to the event loop, so that a cancellation cannot leak a connection.
    """

    def __init__(
        self,
        *,
        traffic: Traffic,
        size: int,
        max_wait: float,
        home: HomeLoop | None = None,
        **connection_options: Any,
    ) -> None:
        """``home`` is the event loop of the connections; until it is known, that of each caller."""
        super().__init__(
            connection_class=ServerConnection,
            max_connections=size,
            # Vendor-specific, and costs one command per connection.
            maint_notifications_config=MaintNotificationsConfig(enabled=False),
            traffic=traffic,
            **connection_options,
        )
        self.traffic = traffic
        self.waiting = 0
        """Number of waiting requests."""
        self._max_wait = max_wait
        self._slots = asyncio.Semaphore(size)
        self._released = asyncio.Event()
        self.home = home or HomeLoop()
        """The event loop of the connections."""
        self._loop: asyncio.AbstractEventLoop | None = None

    async def get_connection(
        self, command_name: object = None, *keys: object, **options: object
    ) -> AbstractConnection:
        """Return a connection, which may be closed.

        Raises ``MaxConnectionsError`` if none becomes free in time, and
        :class:`ForeignLoopError` on another event loop than that of the application.
        """
        del command_name, keys, options  # redis-py's signature
        self.traffic.require_open()
        self._use_loop()
        await self._acquire_slot()
        try:
            connection = cast("AbstractConnection", self.get_available_connection())  # type: ignore[no-untyped-call]
        except BaseException:
            self._slots.release()
            raise
        try:
            await self.ensure_connection(connection)
        except BaseException:
            await self.release(connection)
            raise
        return connection

    def _use_loop(self) -> None:
        if self._loop is (here := asyncio.get_running_loop()):
            return
        if self.home.is_known and not self.home.is_here:
            raise ForeignLoopError(
                "a connection to Redis works on the event loop of the application only; send"
                " commands and pipelines through the client, or open a client for this loop"
            )
        # The loop of the former connections has ended: callers use one loop at a time.
        for connection in self._available_connections:
            cast("ServerConnection", connection).forget()
        self._loop = here
        self._slots, self._released = asyncio.Semaphore(self.max_connections), asyncio.Event()

    async def _acquire_slot(self) -> None:
        if not self._slots.locked():
            await self._slots.acquire()  # does not wait
            return
        self.waiting += 1
        try:
            async with asyncio.timeout(self._max_wait):
                await self._slots.acquire()
        except TimeoutError:
            raise MaxConnectionsError(
                f"all {self.max_connections} connections were in use for {self._max_wait:g} s"
            ) from None
        finally:
            self.waiting -= 1

    async def ensure_connection(self, connection: AbstractConnection) -> None:
        """Close a connection that is no longer usable; the next request reopens it."""
        own = cast("ServerConnection", connection)
        if not own.is_connected:
            return
        with contextlib.suppress(RedisConnectionError):
            # Readable data before a request means end of file or a stale reply.
            if not own.outdated and not await own.can_read():
                return
        own.cut()

    async def release(self, connection: AbstractConnection) -> None:
        """Return a connection to the pool."""
        self._in_use_connections.remove(connection)
        self._available_connections.append(connection)
        self._slots.release()
        self._released.set()

    @property
    def in_use(self) -> int:
        """Number of connections in use."""
        return len(self._in_use_connections)

    async def all_released(self) -> None:
        """Wait until no connection is in use."""
        while self._in_use_connections:
            self._released.clear()
            await self._released.wait()

    def cut(self) -> None:
        """Close all connections at once, including those in use."""
        for connection in (*self._available_connections, *self._in_use_connections):
            cast("ServerConnection", connection).cut()
