"""The health check: one ping on a connection of its own, or now and then a question instead."""

import asyncio
import contextlib

from redis.exceptions import RedisError, ResponseError

from viralfx.adapters.redis.client import RedisClient
from viralfx.adapters.redis.connections import ServerConnection
from viralfx.adapters.redis.errors import MESSAGES, Trouble, trouble
from viralfx.domain.clock import Clock, timestamp
from viralfx.domain.health import Observation, Status


class RedisHealthCheck:
    """Health check of a Redis server, or of the current primary behind Sentinel.

    Its connection is not the pool's, so that a busy application does not hide a healthy server,
    and has no retries: the next check is one. A connection that was lost since the last check is
    replaced once. What it sees makes the client available or not; ``failedAttempts`` counts the
    connections, the application's and its own, that could not be opened since the last one that
    could. Every half minute a question for its memory takes the place of the ping.
    """

    def __init__(self, client: RedisClient, clock: Clock, *, timeout: float | None = None) -> None:
        """``timeout`` in seconds should be shorter than the monitor's.

        The check then says for itself that there is no answer, with the counters; the monitor,
        which cuts it off, could not.
        """
        self._timeout = timeout
        self._client = client
        self._clock = clock
        self._connection = client.own_connection()
        self._memory = client.memory
        # A forced round may come beside a scheduled one; replies must not be mixed up.
        self._turn = asyncio.Lock()

    async def check(self) -> Observation:
        """Ask once."""
        async with self._turn:
            traffic = self._client.traffic
            before = traffic.answers
            try:
                async with asyncio.timeout(self._timeout):
                    await self._ask_once()
            except (RedisError, TimeoutError) as error:
                self._memory.failed()
                return self._failed(error, before)
            except asyncio.CancelledError:
                self._memory.failed()
                # Cut for taking too long, most likely: nobody answered in that time.
                traffic.unanswered(before, doubt=False)
                raise
            traffic.answered()
        if waiting := self._client.waiting:
            return Observation(
                status=Status.WARN,
                message=f"Redis is healthy, but {waiting} requests wait for a connection",
                details=self._details(connected=True),
                code=str(Trouble.POOL_EXHAUSTED),
            )
        return Observation(
            status=Status.PASS,
            message="Redis is healthy",
            details=self._details(connected=True),
        )

    def _failed(self, error: Exception, answers_before: int) -> Observation:
        code = trouble(error)
        refused = isinstance(error, ResponseError) and code is Trouble.ERROR
        if refused:
            # It is there, whatever it does not like.
            self._client.traffic.answered()
        else:
            self._client.traffic.unanswered(answers_before, doubt=False)
        if refused and str(error).startswith("MISCONF"):
            return Observation(
                status=Status.WARN,
                message="Redis refuses writes: it cannot save its data",
                details=self._details(connected=True),
                code="writes_refused",
                error=error,
            )
        return Observation(
            status=Status.FAIL,
            message=MESSAGES[code],
            details=self._details(connected=False),
            code=str(code),
            error=error,
        )

    async def _ask_once(self) -> None:
        connection = self._connection
        if connection.is_connected and not connection.outdated:
            try:
                await self._ask(connection)
            except RedisError as error:
                # Only a connection that broke is worth another: a server that does not answer, or
                # answers with an error, will do so again.
                if trouble(error) is not Trouble.LOST:
                    raise
            else:
                return
        connection.cut()
        self._memory.failed()
        await self._ask(connection)

    async def _ask(self, connection: ServerConnection) -> None:
        try:
            await connection.connect_check_health()
            if self._memory.due:
                # Not allowed, or renamed; whether anything is wrong the ping will tell.
                with contextlib.suppress(ResponseError):
                    await connection.send_command("INFO", "memory")
                    self._memory.answered(await connection.read_response())
                    return
                self._memory.forbidden()
            await connection.send_command("PING")
            await connection.read_response()
        except BaseException:
            # Nobody knows what would be read from it next.
            connection.cut()
            raise
        self._memory.pinged()

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
            "config": {"host": host, "port": port, "db": self._client.config.db},
        }
