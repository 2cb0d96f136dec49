"""The health check: a ping, a greeting and a write that changes nothing, in one round trip."""

import asyncio
import math
from typing import Any

from redis.exceptions import NoPermissionError, RedisError, ResponseError

from viralfx.adapters.redis.cache import PREFIX
from viralfx.adapters.redis.client import FORBIDDEN_RETRY_SECONDS, RedisClient
from viralfx.adapters.redis.connections import ServerConnection
from viralfx.adapters.redis.errors import (
    MESSAGES,
    WRITE_PROBLEMS,
    DemotedError,
    RedisProblem,
    message_of,
    problem_of,
)
from viralfx.core.clock import Clock, timestamp
from viralfx.domain.health.model import Observation, Status

_PING, _MEMORY = ("PING",), ("INFO", "memory")
_GREETING = ("HELLO",)
"""Tells the server's role to every user; ``ROLE`` and ``INFO`` need permissions."""
_WRITE = ("SET", PREFIX + "viralfx:check", "", "XX")
"""Needs memory as any write, and changes nothing: the key does not exist."""

_Found = tuple[RedisProblem, Exception | None]


class RedisHealthCheck:
    """Health check of a Redis server, or of the current primary behind Sentinel.

    Its connection is not of the pool, so that a busy application does not hide a healthy server. It
    has no retries; the next check is the retry. A connection that was lost or dropped since the
    last check is reopened once. The result sets the client's availability. ``failedAttempts``
    counts consecutive failures to open a connection, by the application and the check. Every 30 s
    the memory query replaces the ping. A server that refuses writes is a warning.
    """

    def __init__(self, client: RedisClient, clock: Clock, *, timeout: float | None = None) -> None:
        """``timeout`` in seconds should be shorter than the monitor's.

        Then the check reports the timeout itself, with the counters, before the monitor cancels it.
        """
        self._timeout = timeout
        self._client = client
        self._clock = clock
        self._connection = client.dedicated_connection()
        self._memory = client.memory
        self._write_at = -math.inf
        # A forced check may run beside a scheduled one; their replies must not be mixed up.
        self._lock = asyncio.Lock()

    async def check(self) -> Observation:
        """Ping the server once. May be cancelled at any point."""
        async with self._lock:
            traffic = self._client.traffic
            before = traffic.responses
            try:
                async with asyncio.timeout(self._timeout):
                    found = await self._ask_with_reconnect()
            except (RedisError, TimeoutError) as error:
                self._memory.failed()
                return self._failed(error, before)
            except asyncio.CancelledError:
                self._memory.failed()
                # Most likely the monitor's timeout: count it as a missing response.
                traffic.timed_out(before, notify=False)
                raise
            traffic.responded()
            traffic.writes_refused = found is not None
        if found is not None:
            problem, reply = found
            return self._warning(problem, MESSAGES[problem], reply)
        if waiting := self._client.waiting:
            text = f"Redis is healthy, but {waiting} requests wait for a connection"
            return self._warning(RedisProblem.POOL_EXHAUSTED, text)
        return Observation(
            status=Status.PASS,
            message="Redis is healthy",
            details=self._details(connected=True),
        )

    def _failed(self, error: Exception, responses_before: int) -> Observation:
        code = problem_of(error)
        if isinstance(error, ResponseError) and code in {*WRITE_PROBLEMS, RedisProblem.ERROR}:
            # An error reply still proves that the server is there.
            self._client.traffic.responded()
        else:
            self._client.traffic.timed_out(responses_before, notify=False)
        if code in WRITE_PROBLEMS:
            self._client.traffic.writes_refused = True
            return self._warning(code, MESSAGES[code], error)
        return Observation(
            status=Status.FAIL,
            message=message_of(error),
            details=self._details(connected=False),
            code=str(code),
            error=error,
        )

    def _warning(
        self, code: RedisProblem, message: str, error: Exception | None = None
    ) -> Observation:
        return Observation(
            status=Status.WARN,
            message=message,
            details=self._details(connected=True),
            code=str(code),
            error=error,
        )

    async def _ask_with_reconnect(self) -> _Found | None:
        connection = self._connection
        if connection.is_connected and not connection.outdated:
            try:
                # Half of the time is left for a new connection, if this one was dropped silently.
                async with asyncio.timeout(self._timeout and self._timeout / 2):
                    return await self._ask(connection)
            except TimeoutError:
                self._client.traffic.leave_connections()
            except RedisError as error:
                code = problem_of(error)
                if code is RedisProblem.TIMEOUT:
                    self._client.traffic.leave_connections()
                elif code is not RedisProblem.LOST:
                    raise  # it would repeat
        connection.cut()
        self._memory.failed()
        return await self._ask(connection)

    async def _ask(self, connection: ServerConnection) -> _Found | None:
        """Return why the server refuses writes; None if it takes them, or hides that."""
        memory = self._memory.due
        writes = self._clock.monotonic() >= self._write_at
        commands = [_MEMORY if memory else _PING, _GREETING, *([_WRITE] if writes else ())]
        try:
            await connection.connect_check_health()
            await connection.send_packed_command(connection.pack_commands(commands))
            first, greeting, *rest = [await _reply(connection) for _ in commands]
        except BaseException:
            # An unread reply may be left on the connection.
            connection.cut()
            raise
        if memory:
            self._memory_replied(first)
        elif isinstance(first, Exception):
            raise first
        else:
            self._memory.pinged()
        if not _is_primary(greeting):
            if connection.is_replica:
                return RedisProblem.READ_ONLY, None
            # A new connection may lead to the new primary.
            self._client.traffic.leave_connections()
            raise DemotedError("the primary has become a replica")
        return self._judge_write(rest[0]) if writes else self._judge_memory()

    def _memory_replied(self, reply: object) -> None:
        if isinstance(reply, Exception):
            self._memory.forbidden()  # or the command was renamed
        else:
            self._memory.replied(reply)

    def _judge_write(self, reply: object) -> _Found | None:
        if isinstance(reply, NoPermissionError):
            self._write_at = self._clock.monotonic() + FORBIDDEN_RETRY_SECONDS
            return self._judge_memory()
        if isinstance(reply, Exception) and (code := problem_of(reply)) in WRITE_PROBLEMS:
            return code, reply
        return None

    def _judge_memory(self) -> _Found | None:
        usage = self._memory.usage
        return (RedisProblem.MEMORY_FULL, None) if usage is not None and usage.is_full else None

    def _details(self, *, connected: bool) -> dict[str, object]:
        traffic, (host, port) = self._client.traffic, self._client.address
        return {
            "isConnected": connected,
            "stats": {
                "isConnected": connected,
                "lastHealthCheck": timestamp(self._clock.now()),
                "failedAttempts": traffic.failed_attempts,
                "totalRequests": traffic.successful + traffic.failed,
                "successfulRequests": traffic.successful,
                "failedRequests": traffic.failed,
            },
            "config": {"host": host, "port": port, "db": self._client.settings.db},
        }


def _is_primary(greeting: object) -> bool:
    # A proxy may hide the greeting.
    return not isinstance(greeting, dict) or greeting.get(b"role") in {b"master", None}


async def _reply(connection: ServerConnection) -> Any:
    try:
        return await connection.read_response()
    except ResponseError as error:
        return error
