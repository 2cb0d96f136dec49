"""Jobs over which workers died: they must not take others with them."""

import asyncio

import pytest
from tests.unit.doubles import swallow_cancellation
from tests.unit.jobs.fleet import Fleet

from viralfx.domain.jobs.job import JobState
from viralfx.domain.resilience.retry_policy import BackoffPolicy


async def crash(fleet: Fleet, *ids: str, times: int = 2) -> None:
    """Have workers die over jobs of one queue."""
    queue = (await fleet.job(ids[0])).queue
    for number in range(times):
        name = f"died-{number}"
        await fleet.kept.register(name, [queue], 0.001)
        claims = await fleet.kept.claim(queue, name, len(ids), ids)
        assert len(claims) == len(ids)
        await asyncio.sleep(0.01)
        await fleet.kept.sweep(100)


async def test_one_suspect_runs_at_a_time(fleet: Fleet) -> None:
    """In all queues together, while jobs that are none run beside it."""
    ids = [await fleet.accept("sleep", "1.0") for _ in range(4)]
    await crash(fleet, *ids, times=2)
    others = [await fleet.accept(payload=str(number)) for number in range(50)]
    fleet.start(queues={"default": 10, "other": 10})
    assert await fleet.final(*others) < 1.0
    await fleet.final(*ids)

    assert fleet.most_running == 1
    assert [(await fleet.job(job_id)).attempts for job_id in ids] == [0] * 4


async def test_a_job_that_was_beside_a_crash_once_is_no_suspect(fleet: Fleet) -> None:
    """It could not help it."""
    ids = [await fleet.accept("sleep", "1.0") for _ in range(4)]
    await crash(fleet, *ids, times=1)
    fleet.start()

    assert await fleet.final(*ids) == pytest.approx(1.0, abs=0.1)
    assert fleet.most_running == 4


async def test_workers_share_their_suspects(fleet: Fleet) -> None:
    """One each, once each has looked."""
    ids = [await fleet.accept("sleep", "25.0") for _ in range(3)]
    await crash(fleet, *ids, times=2)
    for name in ("a", "b", "c"):
        fleet.start(name)

    await fleet.final(*ids)
    assert 1 < fleet.most_running <= 3


@pytest.mark.parametrize("look_interval", [0.05, 1.0])
async def test_a_suspect_begins_when_no_other_is_held(fleet: Fleet, look_interval: float) -> None:
    """If it kills the worker, the others are not counted among the killed."""
    ids = [await fleet.accept("look") for _ in range(5)]
    await crash(fleet, *ids, times=3)
    held: list[int] = []

    async def look(_: object) -> None:
        jobs = [await fleet.job(job_id) for job_id in ids]
        held.append(sum(job.state is JobState.ACTIVE for job in jobs))

    fleet.declare("look", look)
    fleet.ledger.seconds = {"settle": 0.6}
    fleet.start(look_interval=look_interval)
    await fleet.final(*ids)

    assert held == [1] * 5


async def test_suspects_follow_one_another_without_waiting_for_a_look(fleet: Fleet) -> None:
    """In whatever queues they are, and however long each takes."""
    ids = [await fleet.accept("sleep", "0.1", queue=queue) for queue in ("default", "other") * 3]
    ids += [await fleet.accept("sleep", "5.0") for _ in range(2)]
    for queue in ("default", "other"):
        await crash(fleet, *[each for each in ids if (await fleet.job(each)).queue == queue])
    claims = sum([(await fleet.job(job_id)).claims for job_id in ids])
    fleet.start(queues={"default": 10, "other": 10}, look_interval=600.0)
    took = await fleet.final(*ids, within=3600.0)

    # Each takes its time, and the next one at most as long as one that was given back waits.
    assert took < 6 * (0.1 + 1.1) + 2 * (5.0 + 0.1)
    assert fleet.most_running == 1
    assert sum([(await fleet.job(job_id)).claims for job_id in ids]) - claims <= 40


async def test_a_job_that_kills_every_worker_is_given_up(fleet: Fleet) -> None:
    """With a code of its own, by whoever sweeps."""
    job_id = await fleet.accept()
    await crash(fleet, job_id, times=4)
    await fleet.ledger.register("last", ["default"], 1.0)
    await fleet.ledger.claim("default", "last", 1)
    fleet.start(max_crashes=5)
    await fleet.final(job_id)
    job = await fleet.job(job_id)

    assert job.error is not None
    assert (job.state, job.error.code, job.crashes) == (JobState.FAILED, "crashed", 5)


async def test_a_suspect_that_ignores_its_cancellation_makes_way(fleet: Fleet) -> None:
    """Its place is free once it was left behind, and from then on the next one's."""
    released = asyncio.Event()

    async def ignore(_: object) -> None:
        await swallow_cancellation(released)

    fleet.declare("ignore", ignore, timeout=10.0, retry=BackoffPolicy(attempts=1))
    first = await fleet.accept("ignore")
    await crash(fleet, first, times=2)
    worker = fleet.start()
    await fleet.until(lambda: worker.active)
    others = [await fleet.accept("sleep", "20.0") for _ in range(2)]
    await crash(fleet, *others, times=2)
    await asyncio.sleep(5.0)
    assert fleet.most_running == 0
    await fleet.final(first)
    await fleet.until(lambda: fleet.running)
    released.set()
    await fleet.final(*others, within=120.0)

    assert fleet.most_running == 1


async def test_a_suspect_that_has_not_begun_is_handed_back(fleet: Fleet) -> None:
    """Where its worker leaves while it waits to be alone."""
    ids = [await fleet.accept() for _ in range(2)]
    await crash(fleet, *ids, times=2)
    fleet.ledger.away = frozenset({"settle"})
    worker = fleet.start()
    await fleet.until(lambda: worker.active == 2)
    draining = asyncio.create_task(worker.drain(10.0))
    await asyncio.sleep(7.0)
    fleet.ledger.away = frozenset()
    left = await draining

    assert left.handed_back == 2
    assert [(await fleet.job(job_id)).crashes for job_id in ids] == [2, 2]
    assert fleet.done == []
