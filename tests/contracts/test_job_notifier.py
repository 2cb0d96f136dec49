"""The contract of ``JobNotifier``, run against every adapter.

It may lose, repeat or delay a notification; without a fault it does not.
"""

import asyncio
import logging

import pytest
from tests.contracts.notifiers import NotifierPair, RecordingListener, listening
from tests.servers.waiting import until

from viralfx.core.errors import ViralFXError
from viralfx.jobs.notifier import IDS_PER_NOTIFICATION, JobNotification


def _notifications(count: int, queue: str = "default", first: int = 0) -> list[JobNotification]:
    return [JobNotification(queue, (f"job-{number}",)) for number in range(first, first + count)]


@pytest.mark.parametrize(
    "notification",
    [
        JobNotification("default", ("one",)),
        JobNotification("default", ("one", "two")),
        JobNotification("default", ()),
        JobNotification("default", tuple(f"0199-{number:032}" for number in range(1000))),
    ],
    ids=["one job", "two jobs", "no job", "many jobs"],
)
async def test_a_notification_is_received(
    pair: NotifierPair, notification: JobNotification
) -> None:
    """In both directions, and with its ids unless they are too many for a broadcast."""
    listener = RecordingListener()
    async with listening(pair.there, listener):
        await pair.here.notify(notification)
        await until(lambda: listener.notifications)
        await pair.there.notify(notification)
        await until(lambda: len(listener.notifications) == 2)

    for received in listener.notifications:
        assert received.queue == notification.queue
        left_out = pair.here.broadcasts and len(notification.ids) > IDS_PER_NOTIFICATION
        assert tuple(received.ids) == (() if left_out else tuple(notification.ids))


async def test_a_listener_receives_its_own_queue_only(pair: NotifierPair) -> None:
    """Notifications of other queues do not arrive."""
    mine, others = RecordingListener(), RecordingListener()
    async with listening(pair.there, mine), listening(pair.there, others, queue="analytics"):
        for notification in [*_notifications(5), *_notifications(5, "analytics", first=5)]:
            await pair.here.notify(notification)
        await until(lambda: len(mine.ids) == len(others.ids) == 5)

    assert sorted(mine.ids) == [f"job-{number}" for number in range(5)]
    assert sorted(others.ids) == [f"job-{number}" for number in range(5, 10)]


async def test_concurrent_notifications_are_all_received(pair: NotifierPair) -> None:
    """Each once."""
    listener = RecordingListener()
    async with listening(pair.there, listener):
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            for notification in _notifications(200):
                group.create_task(pair.here.notify(notification))
        await until(lambda: len(listener.ids) >= 200)

    assert sorted(listener.ids) == sorted(f"job-{number}" for number in range(200))


# -- slots -----------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 3])
async def test_no_more_calls_run_than_there_are_slots(pair: NotifierPair, slots: int) -> None:
    """The others wait for free slots, also if a call has several notifications."""
    listener = RecordingListener(lasts=True)
    async with listening(pair.there, listener, slots=slots):
        for notification in _notifications(10):
            await pair.here.notify(notification)
        await until(lambda: len(listener.ids) >= slots)
        while_full = len(listener.ids)
        listener.release()
        await until(lambda: len(listener.ids) == 10)

    assert while_full == slots
    assert listener.most <= slots
    assert len(set(listener.ids)) == 10


async def test_a_busy_listener_leaves_notifications_to_others(sharing_pair: NotifierPair) -> None:
    """A listener without a free slot takes none, whether the other started earlier or later."""
    busy, idle = RecordingListener(lasts=True), RecordingListener()
    async with listening(sharing_pair.here, busy, slots=1):
        await sharing_pair.here.notify(JobNotification("default", ("first",)))
        await until(lambda: busy.running == 1)
        for notification in _notifications(3):
            await sharing_pair.here.notify(notification)
        async with listening(sharing_pair.there, idle, slots=1):
            for notification in _notifications(3, first=3):
                await sharing_pair.here.notify(notification)
            await until(lambda: len(idle.ids) == 6)

    assert busy.ids == ["first"]
    assert sorted(idle.ids) == [f"job-{number}" for number in range(6)]


async def test_listeners_share_the_notifications(sharing_pair: NotifierPair) -> None:
    """Each notification goes to one listener, and each listener gets some."""
    first, second = RecordingListener(lasts=True), RecordingListener(lasts=True)
    async with (
        listening(sharing_pair.here, first, slots=2),
        listening(sharing_pair.there, second, slots=2),
    ):
        for notification in _notifications(20):
            await sharing_pair.here.notify(notification)
        await until(lambda: first.running == second.running == 2)
        first.release()
        second.release()
        await until(lambda: len(first.ids) + len(second.ids) >= 20)

    assert sorted([*first.ids, *second.ids]) == sorted(f"job-{number}" for number in range(20))


async def test_every_listener_receives_a_broadcast(broadcasting_pair: NotifierPair) -> None:
    """Also several listeners of one process, and the process that sent it."""
    listeners = [RecordingListener() for _ in range(4)]
    here, there = broadcasting_pair.here, broadcasting_pair.there
    async with (
        listening(here, listeners[0]),
        listening(here, listeners[1]),
        listening(there, listeners[2]),
        listening(there, listeners[3]),
    ):
        for notification in _notifications(5):
            await here.notify(notification)
        await until(lambda: all(len(each.ids) == 5 for each in listeners))

    for each in listeners:
        assert sorted(each.ids) == [f"job-{number}" for number in range(5)]


async def test_a_busy_listener_receives_broadcasts_later(broadcasting_pair: NotifierPair) -> None:
    """It delays no other listener."""
    busy, idle = RecordingListener(lasts=True), RecordingListener()
    here, there = broadcasting_pair.here, broadcasting_pair.there
    async with listening(here, busy, slots=1), listening(there, idle, slots=1):
        for notification in _notifications(3):
            await here.notify(notification)
        await until(lambda: len(idle.ids) == 3)
        while_busy = tuple(busy.ids)
        busy.release()
        await until(lambda: len(busy.ids) == 3)

    assert while_busy == ("job-0",)


# -- errors --------------------------------------------------------------------------------


async def test_a_call_that_raises_is_logged(
    pair: NotifierPair, caplog: pytest.LogCaptureFixture
) -> None:
    """Its slot is free again, and the listener continues."""
    received: list[str] = []

    async def on_notification(notification: JobNotification) -> None:
        received.extend(notification.ids)
        if len(received) <= 5:
            raise KeyError("of the listener")

    with caplog.at_level(logging.ERROR):
        async with listening(pair.there, on_notification, slots=2):
            for number, notification in enumerate(_notifications(8), 1):
                await pair.here.notify(notification)
                # A listener may receive several notifications as one.
                await until(lambda number=number: len(received) == number)  # type: ignore[misc]

    assert sorted(received) == [f"job-{number}" for number in range(8)]
    causes = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert [type(cause) for cause in causes] == [KeyError] * 5


async def test_a_cancelled_listener_receives_nothing(pair: NotifierPair) -> None:
    """Its running calls are cancelled; later notifications go to other listeners."""
    stopping, staying = RecordingListener(lasts=True), RecordingListener()
    async with listening(pair.here, stopping, slots=3) as task:
        for notification in _notifications(2):
            await pair.there.notify(notification)
        await until(lambda: stopping.running == 2)
        task.cancel()
        async with asyncio.timeout(10):
            await asyncio.wait({task})
        after = (task.cancelled(), stopping.running, stopping.cancelled)
        async with listening(pair.there, staying):
            for notification in _notifications(10, first=2):
                await pair.there.notify(notification)
            await until(lambda: len(staying.ids) == 10)

    assert after == (True, 0, 2)
    assert sorted(stopping.ids) == ["job-0", "job-1"]


async def test_a_queue_is_connected_while_it_has_a_listener(pair: NotifierPair) -> None:
    """Each queue by itself."""
    before = pair.here.is_connected("default")
    async with listening(pair.here, RecordingListener()):
        while_one = pair.here.is_connected("default"), pair.here.is_connected("analytics")
        async with listening(pair.here, RecordingListener()):
            pass
        while_one_is_left = pair.here.is_connected("default")
    after = pair.here.is_connected("default")

    assert before is False
    assert while_one == (True, False)
    assert while_one_is_left is True
    assert after is False


# -- close -----------------------------------------------------------------------------------


async def test_a_second_close_does_nothing(pair: NotifierPair) -> None:
    """Also if the notifier was never used."""
    async with asyncio.timeout(10):
        await pair.here.close()
        await pair.here.close()

    assert pair.here.is_connected("default") is False


async def test_notify_fails_after_close(pair: NotifierPair) -> None:
    """Within a short time."""
    await pair.here.notify(JobNotification("default", ("one",)))
    async with asyncio.timeout(10):
        await pair.here.close()
        with pytest.raises((OSError, ViralFXError)):
            await pair.here.notify(JobNotification("default", ("two",)))


async def test_closing_while_listening_does_not_raise(pair: NotifierPair) -> None:
    """Listeners wait until they are cancelled, and receive nothing."""
    listener = RecordingListener()
    async with listening(pair.there, listener) as task:
        async with asyncio.timeout(10):
            await pair.there.close()
        done, _ = await asyncio.wait({task}, timeout=0.05)
        received = pair.there.is_connected("default")
    async with asyncio.timeout(10):
        late = asyncio.create_task(pair.there.listen("default", listener, 1))
        done_late, _ = await asyncio.wait({late}, timeout=0.05)
        late.cancel()
        await asyncio.wait({late})

    assert (done, done_late, received) == (set(), set(), False)
    assert late.cancelled()
    assert listener.notifications == []
