"""The transport of bells over Redis streams."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Protocol

from redis.asyncio import Redis
from redis.exceptions import RedisError
from taskiq import BrokerMessage

from viralfx.adapters.taskiq.broker import BLOCK, BellBroker
from viralfx.adapters.taskiq.message import encode
from viralfx.adapters.taskiq.receiver import BellReceiver
from viralfx.domain.clock import Clock, SystemClock
from viralfx.domain.errors import ViralFXError
from viralfx.domain.jobs.transport import Bell

_logger = logging.getLogger("viralfx.queues")

PREFIX = "viralfx:bells:"
_TASK = "bell"
_PATIENCE = 1.0
"""Seconds for opening a connection, and for each reply on it."""
_LIMIT = 2.0
"""Seconds for all of it, when sentinels have to be asked, too."""
_SENDERS = 4
_LISTENERS = 64
_PAUSE = 1.0
"""Seconds before listening anew after what nobody expected."""


class BellNotRungError(ViralFXError):
    """The bell could not be sent."""


class Client(Protocol):
    """What makes connections to Redis, and knows whether it is there."""

    @property
    def available(self) -> bool:
        """Whether Redis is believed to be there."""
        ...

    def further_client(self, *, size: int, socket_timeout: float, connect_timeout: float) -> Redis:
        """Return a client with connections and waits of its own, and one attempt per request."""
        ...


class StreamTransport:
    """Implements ``JobTransport``: a stream per queue, read by all workers as one group.

    Nothing is opened before the first bell or listener. ``backlog`` is how many bells of a queue
    are kept, about, while nobody has time for them; ``tidy_every`` how often, in seconds, a
    listener that hears nothing looks for what others left behind.
    """

    def __init__(
        self,
        client: Client,
        *,
        clock: Clock | None = None,
        prefix: str = PREFIX,
        backlog: int = 10_000,
        tidy_every: float = 60.0,
    ) -> None:
        self._client = client
        self._clock = clock or SystemClock()
        self._prefix = prefix
        self._backlog = backlog
        self._tidy_every = tidy_every
        self._senders = client.further_client(
            size=_SENDERS, socket_timeout=_PATIENCE, connect_timeout=_PATIENCE
        )
        self._readers = client.further_client(
            size=_LISTENERS, socket_timeout=BLOCK + _PATIENCE, connect_timeout=_PATIENCE
        )
        self._bells: dict[str, BellBroker] = {}
        self._listening: defaultdict[str, set[BellBroker]] = defaultdict(set)
        self._closed = False

    async def ring(self, bell: Bell) -> None:
        """Send a bell, within 2 s; at once not, while Redis is known to be away.

        Raises :class:`BellNotRungError` or ``TimeoutError``.
        """
        if self._closed:
            raise BellNotRungError("the transport was closed")
        if not self._client.available:
            raise BellNotRungError("Redis is away")
        broker = self._bells.get(bell.queue)
        if broker is None:
            broker = self._bells[bell.queue] = self._broker(bell.queue)
        message = BrokerMessage(
            task_id=broker.id_generator(), task_name=_TASK, message=encode(bell), labels={}
        )
        try:
            async with asyncio.timeout(_LIMIT):
                await broker.kick(message)
        except RedisError as error:
            raise BellNotRungError(f"{type(error).__name__}: {error}") from error

    async def listen(self, queue: str, hear: Callable[[Bell], Awaitable[None]], slots: int) -> None:
        """Hear bells until cancelled; after :meth:`close` there are none."""
        while not self._closed:
            broker = self._broker(queue)
            self._listening[queue].add(broker)
            try:
                await BellReceiver(broker, hear, slots).run()
            except Exception:
                # The broker has answers to all that Redis may do. What is left are errors of our
                # own or of a library: no reason to be deaf for good, and none to be fast.
                _logger.exception("Listening to bells failed", extra={"queue": queue})
                await self._clock.sleep(_PAUSE)
            finally:
                self._listening[queue].remove(broker)
        await asyncio.Event().wait()

    def hears(self, queue: str) -> bool:
        """Tell whether somebody reads the stream of a queue, and had an answer to the last read."""
        return any(broker.reading for broker in self._listening.get(queue, ()))

    async def close(self) -> None:
        """Send and hear no more, and cut the connections."""
        self._closed = True
        for brokers in self._listening.values():
            for broker in brokers:
                broker.closed = True
                broker.reading = False
        await self._senders.aclose()
        await self._readers.aclose()

    def _broker(self, queue: str) -> BellBroker:
        return BellBroker(
            queue,
            self._prefix + queue,
            senders=self._senders,
            readers=self._readers,
            backlog=self._backlog,
            tidy_every=self._tidy_every,
            clock=self._clock,
        )
