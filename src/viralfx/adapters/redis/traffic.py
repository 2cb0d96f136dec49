"""What happened to the requests: counted, and taken as evidence of whether Redis is there."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol, TypeVar, cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import ResponseError

from viralfx.adapters.redis.errors import ClientClosedError, is_away
from viralfx.domain.operation_times import OperationListener, ignore_operation

T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class Traffic:
    """Counters that all connections and requests of one client share.

    A request is a command, or a pipeline or transaction as a whole; one whose caller was cancelled
    is none, since it says nothing about Redis. Health pings are none either.
    """

    on_doubt: Callable[[], object]
    """Called when a request gave reason to look after Redis."""
    successful: int = 0
    failed: int = 0
    failed_attempts: int = 0
    """Connections that could not be opened, in a row: zero while they can."""
    answers: int = 0
    """Every sign of life, a ping's and an error's included."""
    available: bool = True
    """Whether Redis is believed to be there; True until somebody finds out otherwise."""
    closed: bool = False
    observe: OperationListener = ignore_operation
    """Is told of every request, but for those whose caller was cancelled."""

    def answered(self) -> None:
        """Take in a sign of life."""
        self.answers += 1
        self.available = True

    def unanswered(self, answers_before: int, *, doubt: bool) -> None:
        """Take in that somebody waited in vain, since the answers numbered ``answers_before``.

        When others were answered meanwhile, Redis is believed to be there all the same. With
        ``doubt``, it is to be looked after, unless everybody knows already.
        """
        known = not self.available
        if self.answers == answers_before:
            self.available = False
        if doubt and not known and not self.closed:
            self.on_doubt()

    def request_failed(self, error: Exception, answers_before: int) -> None:
        """Count a request that is given up."""
        self.failed += 1
        if is_away(error):
            self.unanswered(answers_before, doubt=True)
        elif isinstance(error, ResponseError):
            self.answered()

    def require_open(self) -> None:
        """Raise :class:`ClientClosedError` once the client is closed."""
        if self.closed:
            raise ClientClosedError("the Redis client is closed")


class _Pool(Protocol):
    traffic: Traffic


class CountingRedis(Redis):
    """redis-py's client, its requests counted in the traffic of its pool."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Execute one command; see redis-py."""
        request: Awaitable[Any] = super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        return await _counted(self, _command(args), request)

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:  # noqa: FBT001, FBT002 - redis-py's signature
        """Return a pipeline that counts as one request; see redis-py."""
        return CountingPipeline(
            self.connection_pool, self.response_callbacks, transaction, shard_hint
        )


class CountingPipeline(Pipeline):
    """redis-py's pipeline: each execution counts, and what is asked at once after WATCH."""

    async def execute(self, raise_on_error: bool = True) -> list[Any]:  # noqa: FBT001, FBT002 - redis-py's signature
        """Execute what is queued; see redis-py."""
        if not self.command_stack and not self.watching:
            return []
        return await _counted(self, "PIPELINE", super().execute(raise_on_error))

    async def immediate_execute_command(self, *args: Any, **options: Any) -> Any:
        """Execute one command between WATCH and MULTI; see redis-py."""
        request: Awaitable[Any] = super().immediate_execute_command(*args, **options)  # type: ignore[no-untyped-call]
        return await _counted(self, _command(args), request)


def _command(args: tuple[Any, ...]) -> str:
    return str(args[0]).partition(" ")[0].upper() if args else "_OTHER"


async def _counted(client: Redis, operation: str, request: Awaitable[T]) -> T:
    traffic = cast("_Pool", client.connection_pool).traffic
    before, began = traffic.answers, perf_counter()
    try:
        result = await request
    except Exception as error:
        # Every kind: whatever it is, the request failed, and the error goes on to who made it.
        traffic.observe(operation, perf_counter() - began, error)
        traffic.request_failed(error, before)
        raise
    traffic.observe(operation, perf_counter() - began, None)
    traffic.successful += 1
    traffic.answered()
    return result
