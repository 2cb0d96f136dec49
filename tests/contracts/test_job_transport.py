"""The contract of ``JobTransport``, run against every adapter.

It may lose, repeat or delay a bell; with nothing in its way it does none of these.
"""

import asyncio
import logging

import pytest
from tests.contracts.transports import Hearing, Line, listening, until

from viralfx.domain.errors import ViralFXError
from viralfx.domain.jobs.transport import Bell


def _bells(count: int, queue: str = "default", first: int = 0) -> list[Bell]:
    return [Bell(queue, (f"job-{number}",)) for number in range(first, first + count)]


@pytest.mark.parametrize(
    "bell",
    [
        Bell("default", ("one",)),
        Bell("default", ("one", "two")),
        Bell("default", ()),
        Bell("default", tuple(f"0199-{number:032}" for number in range(1000))),
    ],
    ids=["one job", "two jobs", "no job", "many jobs"],
)
async def test_what_is_rung_is_heard(line: Line, bell: Bell) -> None:
    """With all that it says, at either end."""
    hearing = Hearing()
    async with listening(line.there, hearing):
        await line.here.ring(bell)
        await until(lambda: hearing.bells)
        await line.there.ring(bell)
        await until(lambda: len(hearing.bells) == 2)

    for heard in hearing.bells:
        assert heard.queue == bell.queue
        assert tuple(heard.ids) == tuple(bell.ids)


async def test_a_queue_has_bells_of_its_own(line: Line) -> None:
    """Who listens to one hears none of another."""
    mine, others = Hearing(), Hearing()
    async with listening(line.there, mine), listening(line.there, others, queue="analytics"):
        for bell in [*_bells(5), *_bells(5, "analytics", first=5)]:
            await line.here.ring(bell)
        await until(lambda: len(mine.ids) == len(others.ids) == 5)

    assert sorted(mine.ids) == [f"job-{number}" for number in range(5)]
    assert sorted(others.ids) == [f"job-{number}" for number in range(5, 10)]


async def test_many_bells_at_once_are_all_heard(line: Line) -> None:
    """Each once."""
    hearing = Hearing()
    async with listening(line.there, hearing):
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            for bell in _bells(200):
                group.create_task(line.here.ring(bell))
        await until(lambda: len(hearing.ids) >= 200)

    assert sorted(hearing.ids) == sorted(f"job-{number}" for number in range(200))


# -- slots -----------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 3])
async def test_no_more_calls_run_than_there_are_slots(line: Line, slots: int) -> None:
    """The others come as slots get free."""
    hearing = Hearing(lasts=True)
    async with listening(line.there, hearing, slots=slots):
        for bell in _bells(10):
            await line.here.ring(bell)
        await until(lambda: hearing.running == slots)
        while_full = len(hearing.ids)
        hearing.release()
        await until(lambda: len(hearing.ids) == 10)

    assert while_full == slots
    assert hearing.most <= slots
    assert len(set(hearing.ids)) == 10


async def test_who_is_busy_leaves_bells_to_others(line: Line) -> None:
    """No bell is taken by somebody without a free slot, neither before nor after others came."""
    busy, idle = Hearing(lasts=True), Hearing()
    async with listening(line.here, busy, slots=1):
        await line.here.ring(Bell("default", ("first",)))
        await until(lambda: busy.running == 1)
        for bell in _bells(3):
            await line.here.ring(bell)
        async with listening(line.there, idle, slots=1):
            for bell in _bells(3, first=3):
                await line.here.ring(bell)
            await until(lambda: len(idle.ids) == 6)

    assert busy.ids == ["first"]
    assert sorted(idle.ids) == [f"job-{number}" for number in range(6)]


async def test_listeners_share_the_bells(line: Line) -> None:
    """Each bell goes to one of them, and each of them gets some while the other is busy."""
    first, second = Hearing(lasts=True), Hearing(lasts=True)
    async with (
        listening(line.here, first, slots=2),
        listening(line.there, second, slots=2),
    ):
        for bell in _bells(20):
            await line.here.ring(bell)
        await until(lambda: first.running == second.running == 2)
        first.release()
        second.release()
        await until(lambda: len(first.ids) + len(second.ids) >= 20)

    assert sorted([*first.ids, *second.ids]) == sorted(f"job-{number}" for number in range(20))


# -- what goes wrong -------------------------------------------------------------------------


async def test_a_call_that_raises_is_logged_and_survived(
    line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    """Its slot is free again, however often it happens."""
    heard: list[str] = []

    async def hear(bell: Bell) -> None:
        heard.extend(bell.ids)
        if len(heard) <= 5:
            raise KeyError("of the listener")

    with caplog.at_level(logging.ERROR):
        async with listening(line.there, hear, slots=2):
            for bell in _bells(8):
                await line.here.ring(bell)
            await until(lambda: len(heard) >= 8)

    assert sorted(heard) == [f"job-{number}" for number in range(8)]
    causes = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert [type(cause) for cause in causes] == [KeyError] * 5


async def test_who_stops_listening_hears_no_more(line: Line) -> None:
    """The calls that run are cancelled and over; later bells go to whoever still listens."""
    stopping, staying = Hearing(lasts=True), Hearing()
    async with listening(line.here, stopping, slots=3) as task:
        for bell in _bells(2):
            await line.there.ring(bell)
        await until(lambda: stopping.running == 2)
        task.cancel()
        async with asyncio.timeout(10):
            await asyncio.wait({task})
        after = (task.cancelled(), stopping.running, stopping.cancelled)
        async with listening(line.there, staying):
            for bell in _bells(10, first=2):
                await line.there.ring(bell)
            await until(lambda: len(staying.ids) == 10)

    assert after == (True, 0, 2)
    assert sorted(stopping.ids) == ["job-0", "job-1"]


async def test_it_is_known_whether_bells_are_heard(line: Line) -> None:
    """Of each queue by itself, from when somebody listens until nobody does."""
    before = line.here.hears("default")
    async with listening(line.here, Hearing()):
        while_one = line.here.hears("default"), line.here.hears("analytics")
        async with listening(line.here, Hearing()):
            pass
        while_one_is_left = line.here.hears("default")
    after = line.here.hears("default")

    assert before is False
    assert while_one == (True, False)
    assert while_one_is_left is True
    assert after is False


# -- close -----------------------------------------------------------------------------------


async def test_closing_twice_is_harmless(line: Line) -> None:
    """Also when nothing was ever rung or heard."""
    async with asyncio.timeout(10):
        await line.here.close()
        await line.here.close()

    assert line.here.hears("default") is False


async def test_nothing_is_rung_after_closing(line: Line) -> None:
    """It is an error, and soon."""
    await line.here.ring(Bell("default", ("one",)))
    async with asyncio.timeout(10):
        await line.here.close()
        with pytest.raises((OSError, ViralFXError)):
            await line.here.ring(Bell("default", ("two",)))


async def test_closing_while_listening_does_not_raise(line: Line) -> None:
    """Who listens goes on to wait until cancelled, and hears nothing."""
    hearing = Hearing()
    async with listening(line.there, hearing) as task:
        async with asyncio.timeout(10):
            await line.there.close()
        done, _ = await asyncio.wait({task}, timeout=0.05)
        heard = line.there.hears("default")
    async with asyncio.timeout(10):
        late = asyncio.create_task(line.there.listen("default", hearing, 1))
        done_late, _ = await asyncio.wait({late}, timeout=0.05)
        late.cancel()
        await asyncio.wait({late})

    assert (done, done_late, heard) == (set(), set(), False)
    assert late.cancelled()
    assert hearing.bells == []
