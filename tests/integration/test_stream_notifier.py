"""Notifications over a real Redis: each is received once, and again after any fault."""

import asyncio
import logging
import sys
import time
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import Any

import pytest
from taskiq.receiver import Receiver
from taskiq_redis import RedisStreamBroker
from tests.integration.leaks import LeakCheck
from tests.integration.notifications import (
    QUEUE,
    STREAM,
    Received,
    listening,
    messages_of,
    notifier_to,
    notifier_with,
    notify,
    notify_until_sent,
)
from tests.integration.redis_clients import addresses_of, config_of, within
from tests.manual_clock import ManualClock
from tests.servers.certificates import Certificates
from tests.servers.fault_proxy import BLACKHOLE
from tests.servers.fixtures import FaultProxies
from tests.servers.redis import RedisServer, redis_server
from tests.servers.sentinel import SentinelSetup
from tests.servers.waiting import until

from viralfx.adapters.redis import RedisClient
from viralfx.adapters.taskiq import StreamNotifier
from viralfx.adapters.taskiq import notifier as notifier_module
from viralfx.jobs.notifier import JobNotification, NotificationNotSentError

pytestmark = pytest.mark.timeout(60)

ROOT = Path(__file__).parents[2]
LOST = "Job notifications are not received; workers poll"
FOUND = "Job notifications are received again"


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Record the log lines with the levels of production."""
    caplog.set_level(logging.WARNING, "taskiq")
    caplog.set_level(logging.INFO, "viralfx.queues")
    return caplog


READ = ["XREADGROUP", "GROUP", "workers", "workers", "NOACK"]
"""The command with which another worker reads."""


def milliseconds(server: RedisServer) -> int:
    """Return the time of the server."""
    seconds, micros = server.command("TIME")
    return int(seconds) * 1000 + int(micros) // 1000


def groups(server: RedisServer) -> dict[str, Any]:
    """Return the state of the stream's only consumer group."""
    (flat,) = server.command("XINFO", "GROUPS", STREAM)
    return dict(zip(flat[::2], flat[1::2], strict=True)) if isinstance(flat, list) else dict(flat)


# -- sending and receiving -----------------------------------------------------------------------


async def test_a_message_contains_the_ids_alone(redis: RedisServer) -> None:
    """The ledger has everything else about a job."""
    received: list[JobNotification] = []

    async def on_notification(notification: JobNotification) -> None:
        received.append(notification)

    async with notifier_to(redis) as notifier:
        await notifier.notify(JobNotification(QUEUE, ["a", "b"]))

        assert redis.command("XLEN", STREAM) == 1
        async with listening(notifier, on_notification):
            await until(lambda: received)

    assert received == [JobNotification(QUEUE, ("a", "b"))]


async def test_notifications_before_the_first_listener_are_received(redis: RedisServer) -> None:
    """The group starts at the beginning of the stream."""
    received = Received()
    async with notifier_to(redis) as notifier:
        await notify(notifier, "1", "2", "3")
        async with listening(notifier, received):
            await until(lambda: len(received) == 3)

    assert received == ["1", "2", "3"]


async def test_two_workers_share_the_notifications(redis: RedisServer) -> None:
    """Each notification is received once, and each worker receives some."""
    one, other = Received(), Received()
    jobs = [str(number) for number in range(200)]
    async with (
        notifier_to(redis, lost_after=60.0) as first,
        notifier_to(redis, lost_after=60.0) as second,
        listening(first, one, slots=2),
        listening(second, other, slots=2),
    ):
        await notify(first, *jobs)
        await until(lambda: len(one) + len(other) >= 200)

    assert sorted(one + other) == sorted(jobs)
    assert one
    assert other


async def test_a_notification_waits_for_a_free_slot(redis: RedisServer) -> None:
    """Two slots hold two calls, and further notifications stay for other workers."""
    busy, done, received = 0, asyncio.Event(), Received()
    most = 0

    async def on_notification(notification: JobNotification) -> None:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        await done.wait()
        busy -= 1
        await received(notification)

    other = Received()
    async with (
        notifier_to(redis, lost_after=60.0) as first,
        notifier_to(redis, lost_after=60.0) as second,
        listening(first, on_notification, slots=2),
    ):
        await notify(first, *"abcde")
        await until(lambda: busy == 2)
        await until(lambda: redis.command("XLEN", STREAM) == 3)
        async with listening(second, other):
            await until(lambda: len(other) == 3)
        assert (busy, len(received)) == (2, 0)
        done.set()
        await notify(first, *"fghij")
        await until(lambda: len(received) == 7)

    assert sorted(other) == ["c", "d", "e"]
    assert most == 2


async def test_an_error_of_a_call_is_logged(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The slot is free again: with one slot, the next notification is received."""
    received = Received()

    async def on_notification(notification: JobNotification) -> None:
        if notification.ids == ("bad",):
            raise RuntimeError("no")
        await received(notification)

    async with notifier_to(redis) as notifier, listening(notifier, on_notification, slots=1):
        await notify(notifier, "bad", "good")
        await until(lambda: received)

    assert messages_of(caplog) == ["Job notification failed"]


async def test_an_unknown_message_is_dropped(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """With one warning for all of a minute; fields of later releases are ignored."""
    received = Received()
    junk = [b"", b"\xff\xfe", b"{", b"[]", b'{"ids": 5}', b'{"ids": [1]}', b"[" * 100_000]
    async with notifier_to(redis) as notifier:
        async with listening(notifier, received, slots=2):
            redis.command("XADD", STREAM, "*", "other", "field")
            for data in junk:
                redis.command("XADD", STREAM, "*", "data", data)
            redis.command("XADD", STREAM, "*", "data", '{"ids": ["new"], "more": {"a": [1]}}')
            await notify(notifier, "mine")
            await until(lambda: len(received) == 2)

        assert redis.command("XLEN", STREAM) == 0
    assert received == ["new", "mine"]
    assert messages_of(caplog) == ["Unknown message dropped from the notification stream"]


async def test_a_line_about_unknown_messages_has_their_number(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of the minute before; the reason is short."""
    clock = ManualClock()
    async with notifier_to(redis) as notifier:
        broker = notifier._broker("default")
        broker._clock = clock
        for _ in range(3):
            broker.drop_unknown("x" * 10_000)
        await clock.advance(60.0)
        broker.drop_unknown("x")

    lines = [vars(record) for record in caplog.records]
    assert [(line["count"], len(line["reason"])) for line in lines] == [(1, 200), (3, 1)]


# -- cancel and close ----------------------------------------------------------------------------


async def test_cancelling_a_listener_ends_its_calls(redis: RedisServer) -> None:
    """After twenty times no task or connection is left in this process."""
    begun = ended = 0

    async def on_notification(notification: JobNotification) -> None:
        nonlocal begun, ended
        begun += len(notification.ids)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            ended += len(notification.ids)

    leaks = LeakCheck()
    async with notifier_to(redis) as notifier:
        for turn in range(1, 21):
            await notify(notifier, "a", "b", "c")
            tasks = asyncio.all_tasks()
            async with listening(notifier, on_notification, slots=3):
                await until(lambda turn=turn: begun == 3 * turn)  # type: ignore[misc]
            assert asyncio.all_tasks() == tasks
            assert not notifier.is_connected(QUEUE)
            assert ended == begun
    await leaks.assert_none()

    connected = str(redis.command("CLIENT", "LIST"))
    assert "name=viralfx" not in connected
    assert len(redis.command("XINFO", "CONSUMERS", STREAM, "workers")) == 1


async def test_a_closed_notifier_neither_sends_nor_receives(redis: RedisServer) -> None:
    """Closing twice is allowed; a listener waits to be cancelled, and its calls continue."""
    received, leaks = Received(), LeakCheck()
    async with notifier_to(redis) as notifier, listening(notifier, received) as task:
        await notifier.close()
        await notifier.close()
        with pytest.raises(NotificationNotSentError):
            await notify(notifier, "a")

        assert not notifier.is_connected(QUEUE)
        await until(lambda: "name=viralfx" not in str(redis.command("CLIENT", "LIST")))
        assert not task.done()
    await leaks.assert_none()


async def test_a_listener_of_a_closed_notifier_waits(redis: RedisServer) -> None:
    """It opens no connection."""
    async with notifier_to(redis) as notifier:
        await notifier.close()
        async with listening(notifier, Received(), at_once=False) as task:
            await asyncio.sleep(0)
            assert not task.done()
        assert "name=viralfx" not in str(redis.command("CLIENT", "LIST"))


# -- the length of a stream -----------------------------------------------------------------------


async def test_a_stream_is_empty_at_rest(redis: RedisServer) -> None:
    """After 5000 notifications no entry is left, pending entries included."""
    received = Received()

    async def wave(notifier: StreamNotifier, count: int) -> None:
        received.clear()
        async with asyncio.TaskGroup() as senders:
            for sender in range(10):
                ids = (f"{sender}-{number}" for number in range(count // 10))
                senders.create_task(notify(notifier, *ids))
        await until(lambda: len(received) == count, seconds=30)

    async with notifier_to(redis) as notifier, listening(notifier, received, slots=100):
        await wave(notifier, 1000)
        before = redis.command("MEMORY", "USAGE", STREAM)
        await wave(notifier, 5000)

        assert redis.command("XLEN", STREAM) == 0
        assert groups(redis)["pending"] == 0
        assert redis.command("MEMORY", "USAGE", STREAM) <= before + 1024


async def test_unread_notifications_are_bounded(redis: RedisServer) -> None:
    """Redis drops the oldest, by whole nodes of the stream."""
    received = Received()
    async with notifier_to(redis, backlog=200) as notifier:
        await notify(notifier, *map(str, range(1000)))
        kept = redis.command("XLEN", STREAM)
        async with listening(notifier, received):
            await until(lambda: "999" in received)

    assert 200 <= kept <= 300
    assert received == [str(number) for number in range(1000 - kept, 1000)]


async def test_notifications_of_a_blocked_worker_are_taken_over(redis: RedisServer) -> None:
    """One idle listener receives each of them soon; the same holds if the worker was killed."""
    read = ["XREADGROUP", "GROUP", "workers", "workers", "COUNT", "2", "NOACK", "STREAMS"]
    received = Received()
    async with notifier_to(redis) as notifier, notifier_to(redis) as other:
        async with listening(notifier, received):
            pass
        await notify(notifier, "a", "b", "c")
        # A read whose answer is not processed: the event loop is blocked.
        redis.command(*read, STREAM, ">")
        async with listening(notifier, received), listening(other, received):
            await until(lambda: sorted(received) == ["a", "b", "c"])
            await notify(notifier, "d")
            await until(lambda: len(received) == 4)
            # Between two reads of the listeners, a read of another process takes the next entry.
            while groups(redis)["entries-read"] == 4:
                redis.command("XADD", STREAM, "*", "data", '{"ids": ["e"]}')
                redis.command(*read, STREAM, ">")
            await until(lambda: redis.command("XLEN", STREAM) == 0)
            await until(lambda: "e" in received)
        assert sorted(set(received)) == ["a", "b", "c", "d", "e"]
        assert received.count("a") == 1
        assert groups(redis)["consumers"] == 1
        assert groups(redis)["pending"] == 0


async def test_the_first_read_after_a_lost_entry_takes_it_over(redis: RedisServer) -> None:
    """The ids tell its age, so a reader that has waited need not see it a second time."""
    taken: list[tuple[str, ...]] = []

    async def on_notification(notification: JobNotification) -> None:
        taken.append(tuple(notification.ids))

    def waiting() -> int:
        return str(redis.command("CLIENT", "LIST")).count("cmd=xreadgroup")

    async with notifier_to(redis, lost_after=0.2) as notifier:
        async with listening(notifier, on_notification):
            pass
        blocked = ["BLOCK", "10000", "STREAMS", STREAM, ">"]
        other = asyncio.create_task(asyncio.to_thread(redis.command, *READ, *blocked))
        await until(lambda: waiting() == 1)
        async with listening(notifier, on_notification, slots=2):
            await until(lambda: waiting() == 2)
            await notify(notifier, "a")  # for the read that has waited for longest
            await other
            began = milliseconds(redis)
            await until(lambda: milliseconds(redis) > began + 200)
            await notify(notifier, "b")
            await until(lambda: len([each for ids in taken for each in ids]) == 2)

    # The second one if a wait of the listener ended before the new entry.
    assert taken in ([("b", "a")], [("a",), ("b",)])


async def test_entries_that_waited_for_a_reader_are_not_lost(redis: RedisServer) -> None:
    """They are old when another reader gets them, and that one is about to remove them."""
    taken: list[str] = []

    async def on_notification(notification: JobNotification) -> None:
        taken.extend(notification.ids)

    async with notifier_to(redis, lost_after=0.2) as notifier:
        async with listening(notifier, on_notification):
            pass
        await notify(notifier, "a")
        began = milliseconds(redis)
        await until(lambda: milliseconds(redis) > began + 250)
        await notify(notifier, "b")
        redis.command(
            *READ, "COUNT", "1", "STREAMS", STREAM, ">"
        )  # another reader gets the old one
        async with listening(notifier, on_notification, slots=2):
            await until(lambda: taken)
            assert taken == ["b"]


async def test_a_killed_worker_leaves_no_entry_or_consumer(redis: RedisServer) -> None:
    """It is killed while it holds notifications."""
    received = Received()
    async with notifier_to(redis) as notifier:
        await notify(notifier, "a", "b", "c")
        arguments = (
            sys.executable,
            "-m",
            "tests.integration.listener",
            redis.host,
            str(redis.port),
        )
        worker = await asyncio.create_subprocess_exec(*arguments, stdout=PIPE, cwd=ROOT)
        try:
            assert worker.stdout is not None
            async with asyncio.timeout(20):
                held = [(await worker.stdout.readline()).strip() for _ in range(2)]
        finally:
            worker.kill()
            await worker.wait()
        assert redis.command("XLEN", STREAM) == 1
        async with listening(notifier, received):
            await notify(notifier, "d")
            await until(lambda: len(received) == 2)

        assert held == [b"a", b"b"]
        assert received == ["c", "d"]
        assert redis.command("XLEN", STREAM) == 0
        assert (groups(redis)["consumers"], groups(redis)["pending"]) == (1, 0)


# -- faults --------------------------------------------------------------------------------------


async def test_a_listener_recovers_from_data_loss(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """FLUSHALL removes the stream and its group; later notifications are received."""
    received = Received()
    async with notifier_to(redis) as notifier, listening(notifier, received):
        for turn in map(str, range(5)):
            redis.flush()
            await notify(notifier, turn)
            await until(lambda turn=turn: turn in received)  # type: ignore[misc]

    assert messages_of(caplog) in [[LOST, FOUND] * count for count in range(1, 6)]


async def test_a_restart_of_redis_is_two_log_lines(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """After many failed attempts and with an empty Redis; no later notification is lost."""
    received = Received()
    async with notifier_to(own_redis) as notifier, listening(notifier, received):
        await notify(notifier, "before")
        await until(lambda: received)
        own_redis.kill()
        await until(lambda: not notifier.is_connected(QUEUE))
        with pytest.raises(NotificationNotSentError):
            await notify(notifier, "into nothing")
        ends = time.monotonic() + 2  # several attempts to connect
        await until(lambda: time.monotonic() > ends)
        own_redis.start()
        await until(lambda: notifier.is_connected(QUEUE))
        await notify_until_sent(notifier, "after")
        await until(lambda: received == ["before", "after"])

    assert messages_of(caplog) == [LOST, FOUND]


async def test_slots_stay_taken_through_an_outage(own_redis: RedisServer) -> None:
    """The running calls continue and keep their slots."""
    running = most = 0
    received, done = Received(), asyncio.Event()

    async def on_notification(notification: JobNotification) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await done.wait()
        running -= 1
        await received(notification)

    async with notifier_to(own_redis) as notifier, listening(notifier, on_notification, slots=3):
        await notify(notifier, "a", "b")
        await until(lambda: running == 2)
        own_redis.kill()
        await until(lambda: not notifier.is_connected(QUEUE))
        own_redis.start()
        await until(lambda: notifier.is_connected(QUEUE))
        await notify_until_sent(notifier, "c")
        await notify(notifier, "d", "e")
        await until(lambda: running == 3)
        await until(lambda: own_redis.command("XLEN", STREAM) == 2)
        done.set()
        await until(lambda: len(received) == 5)

    assert most == 3
    assert sorted(received) == ["a", "b", "c", "d", "e"]


async def test_listening_starts_when_redis_does(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Redis is down when the listener starts."""
    received = Received()
    own_redis.kill()
    async with notifier_to(own_redis) as notifier, listening(notifier, received, at_once=False):
        await until(lambda: messages_of(caplog) == [LOST])
        assert not notifier.is_connected(QUEUE)
        own_redis.start()
        await until(lambda: notifier.is_connected(QUEUE))
        await notify_until_sent(notifier, "a")
        await until(lambda: received)

    assert messages_of(caplog) == [LOST, FOUND]


async def test_a_frozen_redis_delays_a_send_for_two_seconds(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Later sends fail without a wait; listeners notice and recover."""
    received = Received()
    async with notifier_to(own_redis) as notifier, listening(notifier, received):
        await notify(notifier, "before")
        await until(lambda: received)
        own_redis.freeze()
        with pytest.raises((NotificationNotSentError, OSError)):
            await within(20.0, notify(notifier, "first"))
        started = time.monotonic()
        for _ in range(100):
            with pytest.raises(NotificationNotSentError):
                await notify(notifier, "later")
        later = time.monotonic() - started
        await until(lambda: not notifier.is_connected(QUEUE))
        own_redis.thaw()
        await until(lambda: notifier.is_connected(QUEUE))
        await notify_until_sent(notifier, "after")
        await until(lambda: "after" in received)

    assert messages_of(caplog) == [LOST, FOUND]
    # Each of them would wait for two seconds.
    assert later < 40


async def test_cancelling_works_while_redis_is_frozen(own_redis: RedisServer) -> None:
    """Neither the listener nor close waits for it."""
    leaks = LeakCheck()
    async with notifier_to(own_redis) as notifier:
        async with listening(notifier, Received()):
            own_redis.freeze()
        # Both end before the thaw.
        await notifier.close()
    own_redis.thaw()
    await leaks.assert_none()


async def test_a_send_without_a_response_times_out(
    redis: RedisServer, fault_proxy: FaultProxies
) -> None:
    """Connections open, but nothing answers."""
    proxy = fault_proxy(redis.port, host=redis.host)
    proxy.mode = BLACKHOLE
    async with notifier_to(proxy) as notifier:
        # Without a limit it would wait until the test ends.
        with pytest.raises((NotificationNotSentError, OSError)):
            await within(20.0, notify(notifier, "a"))


async def test_a_key_of_another_type_is_logged_once(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A string has the key of the stream; sends fail until it is deleted."""
    received = Received()
    redis.command("SET", STREAM, "text")
    async with notifier_to(redis) as notifier, listening(notifier, received, at_once=False):
        await until(lambda: messages_of(caplog) == [LOST])
        with pytest.raises(NotificationNotSentError, match="WRONGTYPE"):
            await notify(notifier, "a")
        redis.command("DEL", STREAM)
        await until(lambda: notifier.is_connected(QUEUE))
        await notify(notifier, "b")
        await until(lambda: received == ["b"])

    assert messages_of(caplog) == [LOST, FOUND]


async def test_notifications_survive_a_failover(
    sentinel_setup: SentinelSetup, caplog: pytest.LogCaptureFixture
) -> None:
    """Listeners and senders find the new primary."""
    received = Received()
    config = config_of(
        sentinel_enabled=True,
        sentinels=addresses_of(sentinel_setup.sentinels),
        sentinel_name=sentinel_setup.name,
        password=sentinel_setup.password,
        sentinel_password=sentinel_setup.sentinel_password,
    )
    async with notifier_with(config) as notifier, listening(notifier, received):
        await notify(notifier, "before")
        await until(lambda: received)
        old = sentinel_setup.kill_primary()
        await asyncio.to_thread(sentinel_setup.wait_failover, old)
        await until(lambda: notifier.is_connected(QUEUE), seconds=15)
        await notify_until_sent(notifier, "after")
        await until(lambda: "after" in received)

    assert messages_of(caplog) == [LOST, FOUND]


# -- TLS and access ------------------------------------------------------------------------------


@pytest.mark.each_python
async def test_notifications_over_tls(tls_redis: RedisServer, certificates: Certificates) -> None:
    """With a password, and the certificate of the authority."""
    received = Received()
    config = config_of(
        host=tls_redis.host,
        port=tls_redis.port,
        password=tls_redis.password,
        tls_enabled=True,
        tls_ca_file=str(certificates.ca),
    )
    async with notifier_with(config) as notifier, listening(notifier, received):
        await notify(notifier, "a")
        await until(lambda: received)


async def test_the_commands_that_a_user_needs() -> None:
    """Five commands on the keys of the streams, and the commands of every connection."""
    received = Received()
    rights = "~viralfx:notifications:* -@all +@connection +xadd +xreadgroup +xgroup +xrange +xdel"
    with redis_server(users=[f"notifications on >secret {rights}"]) as server:
        config = config_of(
            host=server.host, port=server.port, username="notifications", password="secret"
        )
        async with notifier_with(config) as notifier, listening(notifier, received):
            await notify(notifier, "a")
            await until(lambda: received)


async def test_closing_the_client_closes_the_connections_of_the_notifier(
    redis: RedisServer,
) -> None:
    """Whether or not the notifier was closed."""
    leaks = LeakCheck()
    client = RedisClient(*config_of(host=redis.host, port=redis.port))
    notifier = StreamNotifier(client)
    await notify(notifier, "a")
    async with listening(notifier, Received()):
        await client.close()
        with pytest.raises(NotificationNotSentError):
            await notify(notifier, "b")
    await leaks.assert_none()


# -- releases of taskiq without the parts that are used ------------------------------------------


def _changed_broker(self: object, *, address: str) -> None:
    del self, address


async def _other_listen(self: Any, finish_event: asyncio.Event) -> None:
    async for message in self.broker.listen():
        self.on_message(message)
    await finish_event.wait()


async def _run_nothing(self: object, _: asyncio.Event) -> None:
    del self
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("change", "lacking"),
    [
        ((RedisStreamBroker, "__init__", _changed_broker), "keyword argument 'url'"),
        ((Receiver, "__init__", _changed_broker), "keyword argument 'run_startup'"),
        ((Receiver, "listen", _other_listen), "has no attribute 'on_message'"),
        ((Receiver, "listen", _run_nothing), "the receiver runs nothing"),
    ],
    ids=["broker", "receiver", "its call", "its loop"],
)
async def test_notifications_need_no_part_of_taskiq(
    change: tuple[type[object], str, object],
    lacking: str,
    redis: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each is received, also by two listeners of one process, and there is one warning."""
    monkeypatch.setattr(*change)
    monkeypatch.setattr(notifier_module, "_TEST_SECONDS", 0.5)
    one, other = Received(), Received()
    async with (
        notifier_to(redis) as notifier,
        listening(notifier, one),
        listening(notifier, other),
    ):
        await notify(notifier, "1", "2", "3")
        await until(lambda: len(one) + len(other) == 3)

    assert sorted(one + other) == ["1", "2", "3"]
    (record,) = (each for each in caplog.records if each.levelno >= logging.WARNING)
    assert record.message == "taskiq lacks parts for job notifications"
    assert lacking in vars(record)["lacking"]
