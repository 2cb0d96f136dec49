"""LISTEN and NOTIFY on real servers: lost sessions, frozen servers, poolers and wrong addresses.

The contract suite of ``JobNotifier`` has the rest.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.integration.postgres_clients import Place, config_of, opened, sessions
from tests.servers.fault_proxy import Fault, FaultProxy
from tests.servers.pgbouncer import Poolers
from tests.servers.postgres import Database, PostgresServer, transactions
from tests.servers.waiting import until

from viralfx.bootstrap import postgres
from viralfx.core.clock import SystemClock
from viralfx.jobs.notifier import JobNotification, JobNotifier, NotificationNotSentError
from viralfx.jobs.postgres import PostgresNotifier
from viralfx.jobs.postgres.notifier import NOT_PAST_POOLER, SILENCE_SECONDS, UNDELIVERED
from viralfx.postgres import Connector
from viralfx.postgres.migrations import channel_of
from viralfx.settings import DatabaseSettings, read_settings

QUEUE = "default"
LOST = "Job notifications are not received; workers poll"
FOUND = "Job notifications are received again"
LISTENER = "viralfx-listen"
SCHEMA = DatabaseSettings().schema


class Received(list[JobNotification]):
    """The notifications, in order."""

    async def __call__(self, notification: JobNotification) -> None:
        """Record a notification."""
        self.append(notification)

    @property
    def ids(self) -> list[str]:
        """The ids of all of them."""
        return [job_id for notification in self for job_id in notification.ids]


@asynccontextmanager
async def notifier_in(
    database: Database | PostgresServer,
    *,
    through: Place | None = None,
    notifier: dict[str, Any] | None = None,
    **config: Any,
) -> AsyncIterator[PostgresNotifier]:
    """Return a notifier with its own pool; both are closed at the end."""
    async with opened(config_of(database, through=through, **config)) as pool:
        made = PostgresNotifier(pool, **(notifier or {}))
        try:
            yield made
        finally:
            await made.close()


@asynccontextmanager
async def listening(
    notifier: JobNotifier,
    on_notification: Callable[[JobNotification], Awaitable[None]],
    *,
    at_once: bool = True,
) -> AsyncIterator[None]:
    """Listen until the block ends; ``at_once``: first wait until it is connected."""
    task = asyncio.create_task(notifier.listen(QUEUE, on_notification, 10))
    try:
        if at_once:
            await until(lambda: notifier.is_connected(QUEUE))
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled(), task


async def notify(notifier: JobNotifier, *ids: str) -> None:
    """Send one notification for each id."""
    for job in ids:
        await notifier.notify(JobNotification(QUEUE, (job,)))


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the messages about notifications."""
    return [each.getMessage() for each in caplog.records if each.name == "viralfx.queues"]


def reasons_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the reasons in these messages."""
    records = [each for each in caplog.records if each.getMessage() == LOST]
    return [str(each.__dict__["reason"]) for each in records]


@pytest.fixture(autouse=True)
def _all_messages(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "viralfx.queues")


# -- the connection ----------------------------------------------------------------------------


async def test_a_process_listens_over_one_connection(database: Database) -> None:
    """For all its queues, and only while it has a listener."""
    async with notifier_in(database) as notifier:
        await notify(notifier, "before")
        before = sessions(database, LISTENER)
        async with asyncio.TaskGroup() as group:
            queues = ("default", "notifications", "analytics")
            tasks = [group.create_task(notifier.listen(queue, Received(), 1)) for queue in queues]
            await until(lambda: all(map(notifier.is_connected, queues)))
            during = sessions(database, LISTENER)
            for task in tasks:
                task.cancel()
        await until(lambda: not sessions(database, LISTENER))

    assert before == []
    assert len(during) == 1


@pytest.mark.each_python
async def test_a_killed_session_is_two_log_lines(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """It is noticed at once, and the listener gets a notification without ids when it is back."""
    received = Received()
    async with notifier_in(database) as notifier, listening(notifier, received):
        await notify(notifier, "before")
        await until(lambda: received.ids == ["before"])
        (killed,) = sessions(database, LISTENER)
        database.execute(f"select pg_terminate_backend({killed})")
        await until(lambda: not notifier.is_connected(QUEUE))
        await until(lambda: notifier.is_connected(QUEUE))
        await notify(notifier, "after")
        await until(lambda: received.ids == ["before", "after"])

    assert lines_of(caplog) == [LOST, FOUND]
    assert [tuple(each.ids) for each in received] == [("before",), (), ("after",)]


async def test_an_old_connection_is_replaced(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """At DB_MAX_LIFETIME, also while notifications arrive, without a warning and without a loss."""
    received, seen, sent = Received(), set[int](), 0
    async with (
        notifier_in(database, max_lifetime=1.0) as notifier,
        listening(notifier, received),
    ):
        async with asyncio.timeout(60.0):
            while len(seen) < 3:
                seen.update(await asyncio.to_thread(sessions, database, LISTENER))
                if notifier.is_connected(QUEUE):
                    sent += 1
                    await notify(notifier, f"{sent}")
        await until(lambda: notifier.is_connected(QUEUE))
        await notify(notifier, "last")
        await until(lambda: "last" in received.ids)
        await until(lambda: len(sessions(database, LISTENER)) == 1)

    # Instead of those that were sent between two connections, one without ids makes workers poll.
    assert JobNotification(QUEUE, ()) in received
    assert lines_of(caplog) == []


async def test_a_restart_of_the_server_is_two_log_lines(
    own_postgres: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A send fails meanwhile."""
    received = Received()
    async with notifier_in(own_postgres) as notifier, listening(notifier, received):
        await asyncio.to_thread(own_postgres.kill)
        await until(lambda: not notifier.is_connected(QUEUE))
        with pytest.raises(NotificationNotSentError):
            await notify(notifier, "into nothing")
        await asyncio.to_thread(own_postgres.start)
        await until(lambda: notifier.is_connected(QUEUE), seconds=30.0)
        await notify(notifier, "after")
        await until(lambda: received.ids == ["after"])

    assert lines_of(caplog) == [LOST, FOUND]


async def test_a_frozen_server_is_noticed(
    own_postgres: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    """By the question after a silence; and a send does not wait for long."""
    received = Received()
    short = {"silence": 0.2}
    async with (
        notifier_in(own_postgres, notifier=short) as notifier,
        listening(notifier, received),
    ):
        await asyncio.to_thread(own_postgres.freeze)
        try:
            await until(lambda: not notifier.is_connected(QUEUE), seconds=20.0)
            began = time.monotonic()
            with pytest.raises(NotificationNotSentError):
                await notify(notifier, "into nothing")
            waited = time.monotonic() - began
        finally:
            await asyncio.to_thread(own_postgres.thaw)
        await until(lambda: notifier.is_connected(QUEUE), seconds=30.0)
        await notify(notifier, "after")
        await until(lambda: "after" in received.ids)

    assert waited < 20.0
    assert lines_of(caplog) == [LOST, FOUND]


async def test_a_connection_that_is_dropped_silently_is_noticed(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """A firewall forgot it: no packet comes, and no error."""
    received = Received()
    with FaultProxy(database.server.port, host=database.server.host) as proxy:
        async with (
            notifier_in(database, through=proxy, notifier={"silence": 0.2}) as notifier,
            listening(notifier, received),
        ):
            proxy.mode = Fault.DROP
            await until(lambda: not notifier.is_connected(QUEUE), seconds=20.0)
            await until(lambda: notifier.is_connected(QUEUE), seconds=30.0)

    assert lines_of(caplog) == [LOST, FOUND]


async def test_a_server_that_accepts_no_writes_is_left(
    own_postgres: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    """It was demoted: notifications go over the new primary."""
    short = {"silence": 0.2}
    async with (
        notifier_in(own_postgres, notifier=short) as notifier,
        listening(notifier, Received()),
    ):
        for value, connected in (("on", False), ("off", True)):
            own_postgres.execute(f"alter system set default_transaction_read_only = {value}")
            own_postgres.execute("select pg_reload_conf()")
            await until(lambda: notifier.is_connected(QUEUE) is connected, seconds=20.0)  # noqa: B023

    assert lines_of(caplog) == [LOST, FOUND]


async def test_a_silent_connection_costs_little(database: Database) -> None:
    """One transaction in each silence."""
    silence = 0.1
    async with (
        notifier_in(database, notifier={"silence": silence}) as notifier,
        listening(notifier, Received()),
    ):
        before, began = await asyncio.to_thread(transactions, database), time.monotonic()
        await asyncio.sleep(2.0)
        count = await asyncio.to_thread(transactions, database) - before
        most = (time.monotonic() - began) / silence

    assert 1 <= count <= most + 2
    assert SILENCE_SECONDS == 5.0


# -- where it does not work ----------------------------------------------------------------------


async def test_without_delivery_it_is_not_connected(
    database: Database, pgbouncer: Poolers, caplog: pytest.LogCaptureFixture
) -> None:
    """A pooler in transaction mode takes LISTEN and delivers nothing; one warning says so."""
    pooler = pgbouncer(database.server, "transaction")
    # Its mode is not declared.
    async with (
        notifier_in(database, through=pooler, pooler="session") as notifier,
        listening(notifier, Received(), at_once=False),
    ):
        await until(lambda: lines_of(caplog))
        await notify(notifier, "passes")
        connected = notifier.is_connected(QUEUE)

    assert connected is False
    assert lines_of(caplog) == [LOST]
    assert reasons_of(caplog) == [UNDELIVERED]
    assert "DATABASE_LISTEN_URL" in UNDELIVERED


async def test_behind_a_pooler_of_sessions_it_works(database: Database, pgbouncer: Poolers) -> None:
    """The listening connection takes one session of the server."""
    pooler = pgbouncer(database.server, "session")
    received = Received()
    async with (
        notifier_in(database, through=pooler, pooler="session") as notifier,
        listening(notifier, received),
    ):
        await notify(notifier, "one")
        await until(lambda: received.ids == ["one"])


async def test_it_listens_past_a_pooler(database: Database, pgbouncer: Poolers) -> None:
    """It sends through the pooler, and listens at the server."""
    pooler = pgbouncer(database.server, "transaction")
    received = Received()
    past = {"connector": Connector(config_of(database))}
    async with (
        notifier_in(database, through=pooler, pooler="transaction", notifier=past) as notifier,
        listening(notifier, received),
    ):
        await notify(notifier, "one")
        await until(lambda: received.ids == ["one"])


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("is_called", [False, True])
async def test_it_listens_as_its_own_user(
    database: Database, tmp_path: Path, *, is_called: bool, in_file: bool
) -> None:
    """The password in DATABASE_LISTEN_URL, or in its file, counts there.

    DB_PASSWORD is that of DATABASE_URL.
    """
    role = f"notifies_{uuid.uuid4().hex}"
    database.execute(f"create role {role} login password 'of its own'")
    server = database.server
    environ = {
        "DATABASE_URL": f"postgresql://{role}@{server.host}:{server.port}/{database.name}",
        "DATABASE_LISTEN_URL": database.url,
        "DB_POOL_MIN": "1",
    }
    if in_file:
        passwords = tmp_path / "pgpass"
        passwords.touch(mode=0o600)
        passwords.write_text(f"*:*:*:{server.user}:{server.password}\n")
        bare = database.url.replace(f":{server.password}@", "@")
        environ["DATABASE_LISTEN_URL"] = f"{bare}?passfile={passwords}"
    if not is_called:
        environ["DB_PASSWORD"] = "of its own"
    settings, clock = read_settings(environ), SystemClock()
    ask = (lambda: "of its own") if is_called else None
    pool, _, _ = postgres.wire_postgres(settings, clock, lambda: None, ask)
    notifier, received = postgres.notifier(settings, pool, clock), Received()
    try:
        await pool.open()
        async with listening(notifier, received):
            await notify(notifier, "one")
            await until(lambda: received.ids == ["one"])
    finally:
        await notifier.close()
        await pool.close()
        database.execute(f"drop role {role}")


async def test_an_address_of_another_database_is_not_connected(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Notifications that go over the pool must arrive."""
    elsewhere = {"connector": Connector(config_of(database.server))}
    async with (
        notifier_in(database, notifier=elsewhere) as notifier,
        listening(notifier, Received(), at_once=False),
    ):
        await until(lambda: lines_of(caplog))
        assert notifier.is_connected(QUEUE) is False

    assert reasons_of(caplog) == [UNDELIVERED]


async def test_it_does_not_listen_where_it_cannot(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """It still sends, to the workers of other processes."""
    received = Received()
    async with (
        notifier_in(database) as other,
        listening(other, received),
        notifier_in(database, notifier={"may_listen": False}) as notifier,
        listening(notifier, Received(), at_once=False),
    ):
        await notify(notifier, "one")
        await until(lambda: received.ids == ["one"])
        assert notifier.is_connected(QUEUE) is False
        assert len(sessions(database, LISTENER)) == 1

    assert reasons_of(caplog) == [NOT_PAST_POOLER]


async def test_a_foreign_payload_is_dropped(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """With one warning for all of a minute; later notifications arrive."""
    received = Received()
    async with notifier_in(database) as notifier, listening(notifier, received):
        many = f"select pg_notify('{channel_of(SCHEMA)}', 'no JSON ' || n)"
        database.execute(f"{many} from generate_series(1, 500) as n")
        database.execute(f"select pg_notify('{channel_of(SCHEMA)}', '{{\"later\": 1}}')")
        await notify(notifier, "one")
        await until(lambda: received.ids == ["one"])

    assert lines_of(caplog) == ["Unknown message dropped from the notification channel"]
    assert len(received) == 1


@pytest.mark.parametrize("schema", ["viralfx_ops", "s" * 63, "ü" * 31])
async def test_ledgers_of_one_database_have_channels_of_their_own(
    database: Database, schema: str
) -> None:
    """The name of the schema is in the channel, of any length."""
    channel = channel_of(schema)
    database.execute(f"select pg_notify('{channel}', '')")

    assert channel != channel_of("other")
    assert len(channel.encode()) < 64
