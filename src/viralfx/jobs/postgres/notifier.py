"""Notifies workers over LISTEN and NOTIFY, where there is no Redis (ADR-0044)."""

import asyncio
import logging
import math
import secrets
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any, Final

import asyncpg
import msgspec
from asyncpg.connection import Connection

from viralfx.core.clock import Clock, SystemClock, default_rng, supervised, wait_for
from viralfx.jobs.notifier import (
    JobNotification,
    NotificationNotSentError,
    deliver_notifications,
)
from viralfx.postgres.connections import Connector, run_query
from viralfx.postgres.database import PostgresDatabase
from viralfx.postgres.errors import DATABASE_ERRORS, unavailable
from viralfx.postgres.migrations import channel_of
from viralfx.postgres.pool import IS_READ_ONLY, end_of_life
from viralfx.resilience.policy import Backoff, Jitter

_logger = logging.getLogger("viralfx.queues")

# Qualified, because an application's function of that name could come first in the search path.
NOTIFY: Final = "SELECT pg_catalog.pg_notify($1, $2)"

_MAX_PAYLOAD_BYTES = 7_900
"""Postgres refuses a payload of 8000 bytes."""
_MAX_WAITING = 1_000
"""Notifications that wait for a slot of a listener; workers find the jobs of others by polling."""

SILENCE_SECONDS = 5.0
"""Time without a notification after which the server is asked whether it is still there."""
_ANSWER_SECONDS = 2.0
"""For a send, and for the answer to that question."""
_PROOF_SECONDS = 5.0
"""For the arrival of a notification that proves delivery; a busy machine needs some of it."""
_UNKNOWN_LOG_SECONDS = 60.0
"""Time between two lines about unknown messages; each has the number since the one before."""
_BACKOFF = Backoff(base=0.1, cap=5.0, jitter=Jitter.EQUAL)
_UNDELIVERED_BACKOFF = Backoff(base=1.0, cap=60.0, jitter=Jitter.EQUAL)

UNDELIVERED: Final = (
    "the address delivers no notification, as a pooler in transaction mode or another database;"
    " set DATABASE_LISTEN_URL to the address of the server itself"
)
NOT_PAST_POOLER: Final = (
    "DB_POOLER is transaction, and such a pooler delivers no notification; set"
    " DATABASE_LISTEN_URL to the address of the server itself"
)


class _Message(msgspec.Struct, frozen=True, omit_defaults=True):
    # Unknown fields are ignored: during a deployment a later release notifies older workers.
    queue: str | None = None
    ids: tuple[str, ...] = ()
    proof: str | None = None
    """Set instead of a queue: a listener sends it to see whether it arrives."""


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_Message).decode


def encode(notification: JobNotification) -> str:
    """Return a notification as JSON; without the ids if they are too long for a payload."""
    queue = notification.queue
    payload = _encode(_Message(queue=queue, ids=tuple(notification.ids)))
    if len(payload) > _MAX_PAYLOAD_BYTES:
        payload = _encode(_Message(queue=queue))
    return payload.decode()


class UndeliveredError(Exception):
    """A notification that was sent did not arrive on the listening connection."""


class PostgresNotifier:
    """Implements ``JobNotifier``: one channel for each ledger, which every listener receives.

    It sends over the pool. All listeners of a process share one connection outside the pool, which
    is opened for the first of them. Before it counts as connected, a notification that was sent
    over the pool must arrive on it. At ``DB_MAX_LIFETIME`` a new one replaces it.
    """

    broadcasts = True

    def __init__(
        self,
        database: PostgresDatabase,
        *,
        connector: Connector | None = None,
        may_listen: bool = True,
        clock: Clock | None = None,
        silence: float = SILENCE_SECONDS,
    ) -> None:
        """Prepare it; nothing is connected before the first listener.

        ``connector`` opens the listening connection; None: ``database`` does. ``may_listen`` is
        False if only a pooler in transaction mode can be reached. After ``silence`` seconds
        without a notification the connection is tested.
        """
        self._database = database
        self._connector = connector
        self._may_listen = may_listen
        self._clock = clock or SystemClock()
        self._silence = silence
        self._channel = channel_of(database.config.settings.schema)
        self._rng = default_rng()
        self._listeners: defaultdict[str, set[asyncio.Queue[JobNotification]]] = defaultdict(set)
        self._session: asyncio.Task[None] | None = None
        self._connected = False
        self._closed = False
        self._failures = 0
        self._lost = self._renews = False
        self._last_at = 0.0
        self._unknown, self._unknown_logged_at = 0, -math.inf
        self._awaited_proof: str | None = None
        self._proven = asyncio.Event()

    async def notify(self, notification: JobNotification) -> None:
        """Send a notification within 2 s; raises :class:`NotificationNotSentError`."""
        if self._closed:
            raise NotificationNotSentError("the notifier is closed")
        await self._send(encode(notification))

    async def listen(
        self,
        queue: str,
        on_notification: Callable[[JobNotification], Awaitable[None]],
        slots: int,
    ) -> None:
        """Receive notifications until cancelled; none arrives after :meth:`close`."""
        waiting: asyncio.Queue[JobNotification] = asyncio.Queue(_MAX_WAITING)
        self._listeners[queue].add(waiting)
        self._start()
        try:
            await deliver_notifications(waiting, on_notification, slots)
        finally:
            self._listeners[queue].remove(waiting)
            if not any(self._listeners.values()):
                await self._stop()

    def is_connected(self, queue: str) -> bool:
        """Return True if the queue has a listener and the listening connection is open."""
        return self._connected and bool(self._listeners.get(queue))

    async def close(self) -> None:
        """Stop sending and receiving, and close the listening connection."""
        self._closed = True
        await self._stop()

    # -- sending -----------------------------------------------------------------------------

    async def _send(self, payload: str) -> None:
        try:
            async with (
                asyncio.timeout(_ANSWER_SECONDS),
                self._database.acquire(reset=False) as connection,
            ):
                await connection.execute(NOTIFY, self._channel, payload)
        except DATABASE_ERRORS as error:
            raise NotificationNotSentError(str(unavailable(error))) from error

    # -- listening ---------------------------------------------------------------------------

    def _start(self) -> None:
        if self._session is not None or self._closed:
            return
        if self._may_listen:
            self._session = supervised(self._keep_listening(), "job-notifications")
        else:
            self._set_disconnected(NOT_PAST_POOLER)

    async def _stop(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.cancel()
            await asyncio.wait({session})

    async def _keep_listening(self) -> None:
        """Listen until cancelled; restore a lost connection, and replace an old one at once."""
        while True:
            backoff = _BACKOFF
            try:
                await self._listen_until_lost()
                self._renews = True
                continue
            except UndeliveredError:
                self._set_disconnected(UNDELIVERED)
                backoff = _UNDELIVERED_BACKOFF
            except (NotificationNotSentError, *DATABASE_ERRORS) as error:
                sent = isinstance(error, NotificationNotSentError)
                self._set_disconnected(str(error if sent else unavailable(error)))
            except Exception as error:  # noqa: BLE001 - workers poll meanwhile
                # A driver may fail in any way on a server that is not Postgres.
                self._set_disconnected(f"{type(error).__name__}: {error}", error)
            self._failures += 1
            await self._clock.sleep(backoff.delay(self._failures, self._rng))

    async def _listen_until_lost(self) -> None:
        """Listen on a new connection until its greatest age; raise an error if it is lost."""
        lost = asyncio.Event()

        def on_closed(_: object) -> None:
            self._connected = False
            lost.set()

        connection = await self._connect()
        ends_at = end_of_life(self._database.config.settings.max_lifetime)
        try:
            connection.add_termination_listener(on_closed)
            async with asyncio.timeout(_ANSWER_SECONDS):
                await connection.add_listener(self._channel, self._on_payload)
            await self._test(connection)
            await self._prove_delivery()
            self._set_connected()
            await self._keep_alive(connection, lost, ends_at)
        except UndeliveredError:
            # The session in the server goes on if it belongs to a pooler.
            async with asyncio.timeout(_ANSWER_SECONDS):
                await connection.remove_listener(self._channel, self._on_payload)
            raise
        finally:
            self._connected = False
            # Its end says nothing about the next connection.
            connection.remove_termination_listener(on_closed)
            connection.terminate()

    async def _connect(self) -> "Connection[Any]":
        if self._connector is None:
            return await self._database.connect("listen", cut=True)
        return await self._connector.connect(purpose="listen")

    async def _prove_delivery(self) -> None:
        """Send a notification over the pool; raise :class:`UndeliveredError` unless it arrives.

        Not over the listening connection: a pooler may happen to deliver it there.
        """
        self._awaited_proof = secrets.token_hex(8)
        self._proven.clear()
        await self._send(_encode(_Message(proof=self._awaited_proof)).decode())
        if not await wait_for(self._proven, _PROOF_SECONDS, self._clock):
            raise UndeliveredError

    async def _keep_alive(
        self, connection: "Connection[Any]", lost: asyncio.Event, ends_at: float
    ) -> None:
        """Test the connection whenever it was silent; raise an error once it is lost.

        Returns when the event loop's time is ``ends_at``.
        """
        loop = asyncio.get_running_loop()
        self._last_at = self._clock.monotonic()
        while (left := ends_at - loop.time()) > 0:
            silent = self._clock.monotonic() - self._last_at
            if await wait_for(lost, min(left, max(0.0, self._silence - silent)), self._clock):
                raise ConnectionError("the server closed the connection")
            if self._clock.monotonic() - self._last_at >= self._silence:
                await self._test(connection)
                self._last_at = self._clock.monotonic()

    async def _test(self, connection: "Connection[Any]") -> None:
        """Raise an error unless the server answers and is the primary, as that of the pool is."""
        async with asyncio.timeout(_ANSWER_SECONDS):
            read_only = await run_query(connection, connection.fetchval(IS_READ_ONLY))
        if read_only != "off":
            raise asyncpg.ReadOnlySQLTransactionError("the server accepts no writes")

    def _on_payload(self, _: object, _pid: int, _channel: str, payload: object) -> None:
        self._last_at = self._clock.monotonic()
        try:
            message = _decode(str(payload))
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            self._drop_unknown(str(error))
            return
        if message.proof is not None and message.proof == self._awaited_proof:
            self._proven.set()
        elif message.queue is not None:
            self._deliver(JobNotification(queue=message.queue, ids=message.ids))

    def _drop_unknown(self, reason: str) -> None:
        """Log it, at most once a minute: any user of the database may send any number."""
        self._unknown += 1
        if (now := self._clock.monotonic()) < self._unknown_logged_at + _UNKNOWN_LOG_SECONDS:
            return
        _logger.warning(
            "Unknown message dropped from the notification channel",
            extra={"reason": reason, "count": self._unknown},
        )
        self._unknown, self._unknown_logged_at = 0, now

    def _deliver(self, notification: JobNotification) -> None:
        for waiting in self._listeners.get(notification.queue, ()):
            if not waiting.full():
                waiting.put_nowait(notification)

    def _set_connected(self) -> None:
        self._connected = True
        self._failures = 0
        if self._lost:
            _logger.info("Job notifications are received again")
        if self._lost or self._renews:
            for queue in self._listeners:
                # Of jobs that were accepted meanwhile the notification is lost.
                self._deliver(JobNotification(queue=queue, ids=()))
        self._lost = self._renews = False

    def _set_disconnected(self, reason: str, error: Exception | None = None) -> None:
        if not self._lost:
            self._lost = True
            _logger.warning(
                "Job notifications are not received; workers poll",
                exc_info=error,
                extra={"reason": reason},
            )
