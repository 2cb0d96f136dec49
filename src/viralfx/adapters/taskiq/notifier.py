"""Notifies workers over Redis streams, by taskiq's stream broker and receiver (ADR-0023).

Redis keeps no record of which reader took a notification. Each reader removes the entries that it
reads, at once. An entry that stays is lost: its reader was killed, or its event loop is blocked.
Another reader then takes it over.
"""

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, Protocol, Self

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError
from taskiq import AckableMessage, AsyncBroker, BrokerMessage
from taskiq.receiver import Receiver
from taskiq_redis import RedisStreamBroker

from viralfx.adapters.taskiq.messages import (
    UnknownMessageError,
    decode_notification,
    encode_notification,
)
from viralfx.core.clock import Clock, SystemClock, default_rng
from viralfx.jobs.notifier import JobNotification, NotificationNotSentError
from viralfx.resilience.policy import Backoff, Jitter

_logger = logging.getLogger("viralfx.queues")

GROUP = CONSUMER = "workers"
"""All workers share one consumer: entries are done once they are read and need no owner."""
FIELD = b"data"
READ_BLOCK_SECONDS = 1.0
"""Time that a read waits for entries; the reply timeout of a frozen server starts after it."""
LOST_AFTER_SECONDS = 0.015
"""Age at which another reader takes an entry over, as a hedged request: if the first one is only
late, its claim finds the job taken. A reader removes an entry within a few milliseconds."""
_MAX_LEFT = 100  # entries of other readers that one read looks at
_BACKOFF = Backoff(base=0.1, cap=5.0, jitter=Jitter.EQUAL)


_Entry = tuple[bytes, dict[bytes, bytes]]  # its id, and its fields


class _Entries(bytes):
    """The entries of one read, as a message of taskiq."""

    def __new__(cls, entries: Sequence[bytes]) -> Self:
        message = super().__new__(cls)
        message.entries = tuple(entries)
        return message

    entries: tuple[bytes, ...]


_UNKNOWN_LOG_SECONDS = 60.0
"""Time between two lines about unknown messages; each has the number since the one before."""
_MAX_REASON_CHARACTERS = 200


class NotificationBroker(RedisStreamBroker):
    """The stream of one queue. Supports one :meth:`listen` at a time and concurrent ``kick``."""

    def __init__(
        self,
        queue: str,
        stream: str,
        *,
        senders: Redis,
        readers: Redis,
        backlog: int,
        lost_after: float,
        clock: Clock,
        plain: bool = False,
    ) -> None:
        """If ``plain``, use nothing of taskiq's stream broker, which lacks a part."""
        if plain:
            AsyncBroker.__init__(self)
        else:
            # taskiq creates a pool for this URL; it is never used and opens no connection.
            super().__init__(url="redis://", queue_name=stream, consumer_group_name=GROUP)
        self.queue_name = stream
        self.maxlen = backlog
        self.queue = queue
        self.reading = False
        """True if the last read succeeded and :meth:`listen` continues."""
        self.closed = False
        """Set to end :meth:`listen` after the current read."""
        self.slots = 1
        """How many notifications the receiver may hold at once."""
        self._held = 0
        """Entries that were yielded and are not processed yet."""
        self._released = asyncio.Event()
        self._senders = senders
        self._readers = readers
        self._lost_after = lost_after
        self._left: dict[bytes, float] = {}
        """When this reader first saw the entries that other readers have not removed yet."""
        self._clock = clock
        self._unknown = 0
        """Unknown messages since the last line about them."""
        self._unknown_logged_at = -_UNKNOWN_LOG_SECONDS
        self._rng = default_rng()
        self._lost = False

    def release(self, entries: int) -> None:
        """Count so many entries as processed; the receiver calls it."""
        self._held -= entries
        self._released.set()

    async def kick(self, message: BrokerMessage) -> None:
        """Append a message to the stream; raises redis-py's errors.

        Beyond the backlog Redis drops the oldest entries: all workers are busy or there is none,
        and a worker that starts polls first.
        """
        await self._senders.xadd(
            self.queue_name, {FIELD: message.message}, maxlen=self.maxlen, approximate=True
        )

    async def listen(self) -> AsyncGenerator[bytes, None]:  # type: ignore[override]
        """Yield the entries of the stream until closed; each entry goes to one listener.

        The entries of one read come as one message, a :class:`_Entries`, since taskiq's receiver
        runs several tasks for each message.

        Never raises while Redis is unavailable, empty or refuses: it logs that once and retries.
        """
        failures = 0
        try:
            while not self.closed:
                try:
                    await self._create_group()
                    block = None  # the first read returns at once, to know that reading works
                    while await self._may_read():
                        found = await self._read(block)
                        block, failures = round(READ_BLOCK_SECONDS * 1000), 0
                        if self._left:  # to take them over soon, also if no other entry comes
                            block = min(block, max(1, round(self._lost_after * 1000)))
                        self._set_connected()
                        if found:
                            self._held += len(found)
                            yield _Entries(found)
                except (RedisError, OSError) as error:
                    if self.closed:
                        return
                    failures += 1
                    self._set_disconnected(error)
                await self._clock.sleep(_BACKOFF.delay(max(1, failures), self._rng))
        finally:
            self.reading = False

    async def _may_read(self) -> bool:
        """Wait until the receiver holds fewer entries than slots; return False once closed."""
        while self._held >= self.slots and not self.closed:
            self._released.clear()
            await self._released.wait()
        return not self.closed

    async def _create_group(self) -> None:
        """Create the stream and its group unless they exist: at the start and after data loss."""
        try:
            # From the first entry: a new group also reads what is in the stream already.
            await self._readers.xgroup_create(self.queue_name, GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise

    async def _read(self, block: int | None) -> list[bytes]:
        room, began = self.slots - self._held, self._clock.monotonic()
        reply: Any = await self._readers.xreadgroup(
            GROUP,
            CONSUMER,
            {self.queue_name: ">"},
            count=room,
            block=block,
            noack=True,
        )
        read = [entry for _, entries in reply for entry in entries]
        if not read:
            read = await self._remove([], room, began)
        else:
            # If this fails, the next read fails too and is logged; these entries are still used.
            with contextlib.suppress(RedisError, OSError):
                keys = [key for key, _ in read]
                read += await self._remove(keys, room - len(read), began)
        return [fields.get(FIELD, b"") for _, fields in read]

    async def _remove(self, read: Sequence[bytes], room: int, began: float) -> list[_Entry]:
        """Remove the entries of a read; return up to ``room`` lost ones, removed as well.

        ``began`` is when the read began.

        Redis delivers in order, so other readers have all entries before the last one. After an
        empty read these are all entries. Each lost one goes to the reader that removes it.
        """
        stream, pipeline = self.queue_name, self._readers.pipeline(transaction=False)
        if read:
            _ = pipeline.xdel(stream, *read)
        _ = pipeline.xrange(stream, max=read[-1] if read else "+", count=_MAX_LEFT)
        left: list[_Entry] = (await pipeline.execute())[-1]
        now = self._clock.monotonic()
        self._left = {key: self._left.get(key, now) for key, _ in left}
        waited = now - began
        lost = [e for e in left if self._age(e[0], now, read, waited) >= self._lost_after]
        pipeline = self._readers.pipeline(transaction=False)
        for key, _ in lost[:room]:
            _ = pipeline.xdel(stream, key)
            del self._left[key]
        removed = await pipeline.execute()  # without a command it does nothing
        return [entry for entry, count in zip(lost, removed, strict=False) if count]

    def _age(self, key: bytes, now: float, read: Sequence[bytes], waited: float) -> float:
        """Return the least time for which another reader has had an entry, in seconds.

        This reader may see it for the first time. An id begins with the milliseconds of the
        server's clock, so an entry that was read after it tells how old it is. A read waits only
        while all entries have readers, so the other one has had an older entry for that long.
        """
        seen = now - self._left[key]
        if not read:
            return seen
        older = (_milliseconds(read[-1]) - _milliseconds(key)) / 1000
        return max(seen, min(older, waited))

    def drop_unknown(self, reason: str) -> None:
        """Log it, at most once a minute: any user of this Redis may send any number."""
        self._unknown += 1
        if (now := self._clock.monotonic()) < self._unknown_logged_at + _UNKNOWN_LOG_SECONDS:
            return
        _logger.warning(
            "Unknown message dropped from the notification stream",
            extra={
                "queue": self.queue,
                "reason": reason[:_MAX_REASON_CHARACTERS],
                "count": self._unknown,
            },
        )
        self._unknown, self._unknown_logged_at = 0, now

    def _set_connected(self) -> None:
        self.reading = True
        if self._lost:
            self._lost = False
            _logger.info("Job notifications are received again", extra={"queue": self.queue})

    def _set_disconnected(self, error: Exception) -> None:
        self.reading = False
        if not self._lost:
            self._lost = True
            _logger.warning(
                "Job notifications are not received; workers poll",
                extra={"queue": self.queue, "reason": f"{type(error).__name__}: {error}"},
            )


def _milliseconds(key: bytes) -> int:
    return int(key.partition(b"-")[0])


class NotificationReceiver(Receiver):
    """Calls ``on_notification`` for each notification of a broker.

    taskiq's own receiver runs tasks: it records a cancellation as the task's result, acknowledges
    cancelled messages, and returns without waiting for running calls. If ``plain``, nothing of it
    is used: it lacks a part.
    """

    def __init__(
        self,
        broker: NotificationBroker,
        on_notification: Callable[[JobNotification], Awaitable[None]],
        slots: int,
        *,
        plain: bool = False,
    ) -> None:
        self._plain = plain
        if not plain:
            super().__init__(
                broker, run_startup=False, validate_params=False, max_async_tasks=slots
            )
        broker.slots = slots
        self._stream = broker
        self._queue = broker.queue
        self._on_notification = on_notification
        self._calls: set[asyncio.Task[None]] = set()
        self._stopped = False

    async def run(self) -> None:
        """Receive until cancelled or the broker is closed, then wait for the running calls."""
        try:
            await (self._receive() if self._plain else self.listen(asyncio.Event()))
        finally:
            self._stopped = True
            # Lets calls start that are only scheduled yet; they return at once.
            await asyncio.sleep(0)
            for call in self._calls:
                call.cancel()
            if self._calls:
                await asyncio.wait(self._calls)

    async def _receive(self) -> None:
        """Start a call for each message; the broker yields no more than there are slots."""
        started: set[asyncio.Task[None]] = set()
        async for message in self._stream.listen():
            call = asyncio.create_task(self.callback(message))
            started.add(call)
            call.add_done_callback(started.discard)

    async def callback(self, message: bytes | AckableMessage, raise_err: bool = False) -> None:  # noqa: ARG002, FBT001, FBT002 - taskiq's signature
        """Process the entries of one read, as one notification."""
        call = asyncio.current_task()
        if self._stopped or call is None or not isinstance(message, _Entries):
            return
        self._calls.add(call)
        try:
            if (notification := self._decode(message.entries)) is not None:
                await self._on_notification(notification)
        except Exception:
            # One failing call must not end the listener.
            _logger.exception("Job notification failed", extra={"queue": self._queue})
        finally:
            self._calls.remove(call)
            self._stream.release(len(message.entries))

    def _decode(self, entries: Sequence[bytes]) -> JobNotification | None:
        """Return one notification with the ids of all entries; None if all are unknown."""
        ids: dict[str, None] = {}
        known = False
        for data in entries:
            try:
                ids.update(dict.fromkeys(decode_notification(self._queue, data).ids))
                known = True
            except UnknownMessageError as error:
                self._stream.drop_unknown(str(error))
        return JobNotification(queue=self._queue, ids=tuple(ids)) if known else None


PREFIX = "viralfx:notifications:"
_TASK_NAME = "notification"
_TIMEOUT_SECONDS = 1.0
"""For opening a connection, and for each reply on it."""
_SEND_SECONDS = 2.0
"""For a whole send, including the requests to sentinels."""
_SEND_CONNECTIONS, _READ_CONNECTIONS = 4, 64
_RESTART_SECONDS = 1.0
"""Pause before listening again after an unexpected error."""


class Client(Protocol):
    """Opens connections to Redis, and knows whether it is available."""

    @property
    def available(self) -> bool:
        """True if Redis answered the last time."""

    def further_client(self, *, size: int, socket_timeout: float, connect_timeout: float) -> Redis:
        """Return a client with its own pool and timeouts, and one attempt per request."""


_TEST_SECONDS = 5.0
"""For the self-test, which takes a few milliseconds."""


async def _one_message() -> AsyncGenerator[bytes, None]:
    yield _Entries([encode_notification(JobNotification(queue="", ids=("id",)))])
    await asyncio.Event().wait()


async def _receiver_problem(broker: Any) -> str:
    """Return the problem of taskiq's receiver, by a self-test; empty: none."""
    loop = asyncio.get_running_loop()
    received: asyncio.Future[None] = loop.create_future()

    async def receive(_: JobNotification) -> None:
        received.set_result(None)

    broker.listen = _one_message
    try:
        running = loop.create_task(NotificationReceiver(broker, receive, 1).run())
        ends = {running, received}
        await asyncio.wait(ends, timeout=_TEST_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            await running
        running.cancel()
        await asyncio.wait({running})
    except Exception as error:  # noqa: BLE001 - a part may be missing in any way
        return f"{type(error).__name__}: {error}"
    return "" if received.done() else "the receiver runs nothing"


class StreamNotifier:
    """Implements ``JobNotifier``: one stream per queue, which all workers read as one group.

    It opens no connection before the first notification or listener. ``backlog`` is the approximate
    number of unread notifications that a stream keeps. A notification that a listener has not
    removed after ``lost_after`` seconds goes to another one: it was killed, or its event loop is
    blocked.
    """

    broadcasts = False

    def __init__(
        self,
        client: Client,
        *,
        clock: Clock | None = None,
        prefix: str = PREFIX,
        backlog: int = 10_000,
        lost_after: float = LOST_AFTER_SECONDS,
    ) -> None:
        self._client = client
        self._clock = clock or SystemClock()
        self._prefix = prefix
        self._backlog = backlog
        self._lost_after = lost_after
        self._senders = client.further_client(
            size=_SEND_CONNECTIONS,
            socket_timeout=_TIMEOUT_SECONDS,
            connect_timeout=_TIMEOUT_SECONDS,
        )
        self._readers = client.further_client(
            size=_READ_CONNECTIONS,
            socket_timeout=READ_BLOCK_SECONDS + _TIMEOUT_SECONDS,
            connect_timeout=_TIMEOUT_SECONDS,
        )
        self._sending: dict[str, NotificationBroker] = {}
        self._listening: defaultdict[str, set[NotificationBroker]] = defaultdict(set)
        self._closed = False
        self._plain = False  # True: neither the broker nor the receiver of taskiq is used
        self._tested: asyncio.Task[None] | None = None
        try:
            self._broker("")
        except Exception as error:  # noqa: BLE001 - a part may be missing in any way
            self._do_without(f"{type(error).__name__}: {error}")

    async def notify(self, notification: JobNotification) -> None:
        """Send a notification within 2 s; fail at once while Redis is known to be unavailable.

        Raises :class:`NotificationNotSentError` or ``TimeoutError``.
        """
        if self._closed:
            raise NotificationNotSentError("the notifier is closed")
        if not self._client.available:
            raise NotificationNotSentError("Redis is unavailable")
        queue = notification.queue
        broker = self._sending.get(queue)
        if broker is None:
            broker = self._sending[queue] = self._broker(queue)
        message = BrokerMessage(
            task_id=broker.id_generator(),
            task_name=_TASK_NAME,
            message=encode_notification(notification),
            labels={},
        )
        try:
            async with asyncio.timeout(_SEND_SECONDS):
                await broker.kick(message)
        except RedisError as error:
            raise NotificationNotSentError(f"{type(error).__name__}: {error}") from error

    async def listen(
        self,
        queue: str,
        on_notification: Callable[[JobNotification], Awaitable[None]],
        slots: int,
    ) -> None:
        """Receive notifications until cancelled; none arrives after :meth:`close`."""
        if self._tested is None:
            self._tested = asyncio.create_task(self._test_receiver())
        await asyncio.shield(self._tested)
        while not self._closed:
            broker = self._broker(queue)
            self._listening[queue].add(broker)
            try:
                await NotificationReceiver(broker, on_notification, slots, plain=self._plain).run()
            except Exception:
                # The broker handles all errors of Redis. This is a defect in this code or in a
                # library, and must not end the listener.
                _logger.exception("Job notification listener failed", extra={"queue": queue})
                await self._clock.sleep(_RESTART_SECONDS)
            finally:
                self._listening[queue].remove(broker)
        await asyncio.Event().wait()

    async def _test_receiver(self) -> None:
        if not self._plain and (problem := await _receiver_problem(self._broker(""))):
            self._do_without(problem)

    def _do_without(self, lacking: str) -> None:
        self._plain = True
        _logger.warning("taskiq lacks parts for job notifications", extra={"lacking": lacking})

    def is_connected(self, queue: str) -> bool:
        """Return True if a listener reads the stream of a queue and its last read succeeded."""
        return any(broker.reading for broker in self._listening.get(queue, ()))

    async def close(self) -> None:
        """Stop sending and receiving, and close the connections."""
        self._closed = True
        for brokers in self._listening.values():
            for broker in brokers:
                broker.closed = True
                broker.reading = False
        await self._senders.aclose()
        await self._readers.aclose()

    def _broker(self, queue: str) -> NotificationBroker:
        return NotificationBroker(
            queue,
            self._prefix + queue,
            senders=self._senders,
            readers=self._readers,
            backlog=self._backlog,
            lost_after=self._lost_after,
            clock=self._clock,
            plain=self._plain,
        )
