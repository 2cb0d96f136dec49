"""taskiq's stream broker, for bells: read is done with, and a loss is made good by itself.

Redis keeps no list of who read what: a bell is a hint, and whoever read one and was killed is
covered by the ledger. So there is nothing that dead readers could leave behind, but for entries
that were read and are still in the stream; everybody removes all of those that they see.
"""

import contextlib
import logging
import random
from collections.abc import AsyncGenerator
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError
from taskiq import BrokerMessage
from taskiq_redis import RedisStreamBroker

from viralfx.domain.clock import Clock
from viralfx.domain.resilience.backoff import Backoff, Jitter

_logger = logging.getLogger("viralfx.queues")

GROUP = CONSUMER = "workers"
"""All workers are one consumer: entries that are done with when they are read need no owner."""
FIELD = b"data"
BLOCK = 1.0
"""Seconds for which a read waits; a frozen server is noticed a second later."""
_BACKOFF = Backoff(base=0.1, cap=5.0, jitter=Jitter.EQUAL)
_NOTHING = b"0-0"


class BellBroker(RedisStreamBroker):
    """One queue's stream. It serves one :meth:`listen` at a time, and any number of ``kick``."""

    def __init__(
        self,
        queue: str,
        stream: str,
        *,
        senders: Redis,
        readers: Redis,
        backlog: int,
        tidy_every: float,
        clock: Clock,
    ) -> None:
        super().__init__(
            # The pool that is made of it opens nothing, and is not used.
            url="redis://",
            queue_name=stream,
            consumer_group_name=GROUP,
            consumer_name=CONSUMER,
            consumer_id="0",  # what was rung before anybody listened is heard, too
            maxlen=backlog,
            xread_block=round(BLOCK * 1000),
        )
        self.queue = queue
        self.reading = False
        """Whether the last read had an answer, and there will be another one."""
        self.closed = False
        """Set to end :meth:`listen` with the read that is under way."""
        self.slots = 1
        """How many bells may be held at once."""
        self.held = 0
        """How many are: each that is yielded, until who heard it counts it off."""
        self._senders = senders
        self._readers = readers
        self._tidy_every = tidy_every
        self._clock = clock
        # Spreads load only; nothing depends on it being unpredictable.
        self._rng = random.Random()  # noqa: S311
        self._lost = False

    async def kick(self, message: BrokerMessage) -> None:
        """Put a message into the stream; raises redis-py's errors.

        Beyond the backlog the oldest make room: nobody listens, or all are busy, and whoever comes
        to listen looks for jobs first.
        """
        await self._senders.xadd(
            self.queue_name, {FIELD: message.message}, maxlen=self.maxlen, approximate=True
        )

    async def listen(self) -> AsyncGenerator[bytes, None]:  # type: ignore[override]
        """Yield what is put into the stream, each by one listener, until closed.

        Never raises for Redis being away, empty or refusing: it says so once, and tries again.
        """
        failures = 0
        try:
            while not self.closed:
                try:
                    await self._join()
                    block = None  # whether it can be read at all is to be known at once
                    tidy_at = self._clock.monotonic() + self._tidy_every
                    while not self.closed:
                        found = await self._read(block)
                        block, failures = self.block, 0
                        self._is_heard()
                        for data in found:
                            self.held += 1
                            yield data
                        if self._clock.monotonic() >= tidy_at:
                            tidy_at += self._tidy_every
                            await self._tidy()
                except (RedisError, OSError) as error:
                    if self.closed:
                        return
                    failures += 1
                    self._is_lost(error)
                await self._clock.sleep(_BACKOFF.delay(max(1, failures), self._rng))
        finally:
            self.reading = False

    async def _join(self) -> None:
        """Make sure that there are the stream and its group: at the start and after data loss."""
        try:
            await self._readers.xgroup_create(
                self.queue_name, self.consumer_group_name, id=self.consumer_id, mkstream=True
            )
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
        await self._tidy()

    async def _read(self, block: int | None) -> list[bytes]:
        reply: Any = await self._readers.xreadgroup(
            self.consumer_group_name,
            self.consumer_name,
            {self.queue_name: ">"},
            count=max(1, self.slots - self.held),
            block=block,
            noack=True,
        )
        entries = [entry for _, entries in reply for entry in entries]
        if entries:
            # If this fails, the next read will say why; what was read is heard all the same.
            with contextlib.suppress(RedisError, OSError):
                await self._remove(entries[-1][0])
        return [fields.get(FIELD, b"") for _, fields in entries]

    async def _tidy(self) -> None:
        """Remove what readers took and did not live to remove."""
        groups = await self._readers.xinfo_groups(self.queue_name)
        for group in groups:
            last = group["last-delivered-id"]
            if group["name"] == self.consumer_group_name.encode() and last != _NOTHING:
                await self._remove(last)

    async def _remove(self, last: bytes) -> None:
        """Remove everything up to the entry ``last``: it was given to somebody, in order."""
        milliseconds, _, number = last.decode().partition("-")
        await self._readers.xtrim(
            self.queue_name, minid=f"{milliseconds}-{int(number) + 1}", approximate=False
        )

    def _is_heard(self) -> None:
        self.reading = True
        if self._lost:
            self._lost = False
            _logger.info("Bells are heard again", extra={"queue": self.queue})

    def _is_lost(self, error: Exception) -> None:
        self.reading = False
        if not self._lost:
            self._lost = True
            _logger.warning(
                "Bells are not heard, workers look for jobs by themselves",
                extra={"queue": self.queue, "reason": f"{type(error).__name__}: {error}"},
            )
