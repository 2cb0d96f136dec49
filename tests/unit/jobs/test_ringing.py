"""Ringing: nobody waits for it, and nothing of it piles up."""

import asyncio
import logging

import pytest
from tests.unit.jobs.fleet import ShakyBell
from tests.virtual_time import LoopClock

from viralfx.domain.jobs.ringing import Ringer
from viralfx.domain.jobs.transport import Bell


@pytest.fixture
def bell() -> ShakyBell:
    """Return a bell that works."""
    return ShakyBell()


@pytest.fixture
def ringer(bell: ShakyBell) -> Ringer:
    """Return a ringer of that bell."""
    return Ringer(bell, clock=LoopClock(), capacity=1000)


async def test_what_is_rung_in_a_moment_is_one_bell_per_queue(
    bell: ShakyBell, ringer: Ringer
) -> None:
    """Each id once."""
    for number in range(3):
        ringer.ring("default", [f"d{number}", "d0"])
        ringer.ring("other", [f"o{number}"])
    await ringer.close()

    assert bell.rung == [
        Bell(queue="default", ids=("d0", "d1", "d2")),
        Bell(queue="other", ids=("o0", "o1", "o2")),
    ]


async def test_a_bell_has_at_most_a_hundred_ids(bell: ShakyBell, ringer: Ringer) -> None:
    """And a queue with many does not silence the others."""
    ringer.ring("many", [str(number) for number in range(250)])
    ringer.ring("few", ["one"])
    await ringer.close()

    assert [(each.queue, len(each.ids)) for each in bell.rung] == [
        *(("many", 100), ("few", 1), ("many", 100), ("many", 50))
    ]
    assert [job_id for each in bell.rung if each.queue == "many" for job_id in each.ids] == [
        str(number) for number in range(250)
    ]


async def test_a_slow_transport_is_rung_less_often(bell: ShakyBell, ringer: Ringer) -> None:
    """What comes while a bell is sent goes into the next."""
    bell.seconds = 1.0
    for number in range(20):
        ringer.ring("default", [str(number)])
        await asyncio.sleep(0.11)
    await ringer.close(60.0)

    assert [len(each.ids) for each in bell.rung] == [1, 9, 9, 1]


async def test_what_is_too_much_is_dropped(bell: ShakyBell, ringer: Ringer) -> None:
    """Memory is bounded whatever is rung."""
    bell.seconds = 1.0
    for number in range(5000):
        ringer.ring("default", [str(number)])
    await ringer.close(60.0)

    assert sum(len(each.ids) for each in bell.rung) == 1000
    assert ringer.dropped == 4000


async def test_a_transport_that_is_away_is_told_of_once(
    bell: ShakyBell, ringer: Ringer, caplog: pytest.LogCaptureFixture
) -> None:
    """And its return once; what was rung meanwhile is gone."""
    caplog.set_level(logging.INFO)
    bell.away = True
    for number in range(10):
        ringer.ring("default", [str(number)])
        await asyncio.sleep(0.1)
    bell.away = False
    for number in range(10, 13):
        ringer.ring("default", [str(number)])
        await asyncio.sleep(0.1)

    assert [each.ids for each in bell.rung] == [("10",), ("11",), ("12",)]
    assert [record.getMessage() for record in caplog.records] == [
        "Job bells cannot be rung; workers look by themselves",
        "Job bells ring again",
    ]
    assert ringer.dropped == 10


async def test_closing_sends_what_waits_within_its_budget(bell: ShakyBell, ringer: Ringer) -> None:
    """A transport that takes longer is left; what is rung later is not."""
    bell.seconds = 10.0
    ringer.ring("default", ["a"])
    began = LoopClock().monotonic()
    await ringer.close(1.0)
    ringer.ring("default", ["b"])
    await ringer.close(1.0)
    await asyncio.sleep(30.0)

    assert LoopClock().monotonic() - began == pytest.approx(31.0)
    assert bell.rung == []
