"""Sending notifications in the background: callers do not wait, and memory is bounded."""

import asyncio
import logging

import pytest
from tests.unit.jobs.fleet import FaultyNotifier
from tests.virtual_time import LoopClock

from viralfx.jobs.notifier import BackgroundNotifier, JobNotification


@pytest.fixture
def notifier() -> FaultyNotifier:
    """Return a notifier that works."""
    return FaultyNotifier()


@pytest.fixture
def background_notifier(notifier: FaultyNotifier) -> BackgroundNotifier:
    """Return a background notifier that uses it."""
    return BackgroundNotifier(notifier, clock=LoopClock(), capacity=1000)


async def test_concurrent_ids_share_one_notification_per_queue(
    notifier: FaultyNotifier, background_notifier: BackgroundNotifier
) -> None:
    """Each id once."""
    for number in range(3):
        background_notifier.notify("default", [f"d{number}", "d0"])
        background_notifier.notify("other", [f"o{number}"])
    await background_notifier.close()

    assert notifier.sent == [
        JobNotification(queue="default", ids=("d0", "d1", "d2")),
        JobNotification(queue="other", ids=("o0", "o1", "o2")),
    ]


async def test_a_notification_has_at_most_a_hundred_ids(
    notifier: FaultyNotifier, background_notifier: BackgroundNotifier
) -> None:
    """A queue with many ids does not starve the others."""
    background_notifier.notify("many", [str(number) for number in range(250)])
    background_notifier.notify("few", ["one"])
    await background_notifier.close()

    assert [(each.queue, len(each.ids)) for each in notifier.sent] == [
        *(("many", 100), ("few", 1), ("many", 100), ("many", 50))
    ]
    assert [job_id for each in notifier.sent if each.queue == "many" for job_id in each.ids] == [
        str(number) for number in range(250)
    ]


async def test_a_slow_notifier_gets_larger_notifications(
    notifier: FaultyNotifier, background_notifier: BackgroundNotifier
) -> None:
    """Ids that arrive during a send share the next one."""
    notifier.seconds = 1.0
    for number in range(20):
        background_notifier.notify("default", [str(number)])
        await asyncio.sleep(0.11)
    await background_notifier.close(60.0)

    assert [len(each.ids) for each in notifier.sent] == [1, 9, 9, 1]


async def test_ids_beyond_the_capacity_are_dropped(
    notifier: FaultyNotifier, background_notifier: BackgroundNotifier
) -> None:
    """Memory is bounded."""
    notifier.seconds = 1.0
    for number in range(5000):
        background_notifier.notify("default", [str(number)])
    await background_notifier.close(60.0)

    assert sum(len(each.ids) for each in notifier.sent) == 1000
    assert background_notifier.dropped == 4000


async def test_an_unavailable_notifier_is_logged_once(
    notifier: FaultyNotifier,
    background_notifier: BackgroundNotifier,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """So is its return; ids in between are dropped."""
    caplog.set_level(logging.INFO)
    notifier.unavailable = True
    for number in range(10):
        background_notifier.notify("default", [str(number)])
        await asyncio.sleep(0.1)
    notifier.unavailable = False
    for number in range(10, 13):
        background_notifier.notify("default", [str(number)])
        await asyncio.sleep(0.1)

    assert [each.ids for each in notifier.sent] == [("10",), ("11",), ("12",)]
    assert [record.getMessage() for record in caplog.records] == [
        "Job notifications cannot be sent; workers poll",
        "Job notifications are sent again",
    ]
    assert background_notifier.dropped == 10


async def test_close_sends_waiting_ids_within_its_budget(
    notifier: FaultyNotifier, background_notifier: BackgroundNotifier
) -> None:
    """Later ids are ignored."""
    notifier.seconds = 10.0
    background_notifier.notify("default", ["a"])
    began = LoopClock().monotonic()
    await background_notifier.close(1.0)
    background_notifier.notify("default", ["b"])
    await background_notifier.close(1.0)
    await asyncio.sleep(30.0)

    assert LoopClock().monotonic() - began == pytest.approx(31.0)
    assert notifier.sent == []


async def test_jobs_are_announced_when_they_are_due(
    notifier: FaultyNotifier, background_notifier: BackgroundNotifier
) -> None:
    """Those that are due much later are left to the polls."""
    background_notifier.notify("default", ["soon"], 3.0)
    background_notifier.notify("default", ["later"], 3600.0)
    await asyncio.sleep(2.9)
    before = list(notifier.sent)
    await asyncio.sleep(0.2)
    background_notifier.notify("default", ["closed"], 3.0)
    await background_notifier.close(1.0)
    await asyncio.sleep(4000.0)

    assert before == []
    assert [each.ids for each in notifier.sent] == [("soon",)]
