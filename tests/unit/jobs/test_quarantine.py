"""Poison jobs: a job that crashes its worker must not take other jobs with it."""

import asyncio

import pytest
from tests.unit.doubles import swallow_cancellation
from tests.unit.jobs.fleet import Fleet

from viralfx.jobs.model import JobState
from viralfx.jobs.notifier import JobNotification
from viralfx.resilience.policy import BackoffPolicy


async def crash(fleet: Fleet, *ids: str, times: int = 2) -> None:
    """Let workers die while they run jobs of one queue."""
    queue = (await fleet.job(ids[0])).queue
    for number in range(times):
        name = f"died-{number}"
        await fleet.memory_ledger.register(name, [queue], 0.001)
        claims = await fleet.memory_ledger.claim(queue, name, len(ids), ids)
        assert len(claims) == len(ids)
        await asyncio.sleep(0.01)
        await fleet.memory_ledger.sweep(100)


async def test_one_poison_job_runs_at_a_time(fleet: Fleet) -> None:
    """Over all queues, while ordinary jobs run beside it."""
    ids = [await fleet.accept("sleep", "1.0") for _ in range(4)]
    await crash(fleet, *ids, times=2)
    others = [await fleet.accept(payload=str(number)) for number in range(50)]
    fleet.start(queues={"default": 10, "other": 10})
    assert await fleet.final(*others) < 1.0
    await fleet.final(*ids)

    assert fleet.max_running == 1
    assert [(await fleet.job(job_id)).attempts for job_id in ids] == [0] * 4


async def test_a_single_crash_does_not_make_a_job_poison(fleet: Fleet) -> None:
    """Another job may have caused it."""
    ids = [await fleet.accept("sleep", "1.0") for _ in range(4)]
    await crash(fleet, *ids, times=1)
    fleet.start()

    assert await fleet.final(*ids) == pytest.approx(1.0, abs=0.1)
    assert fleet.max_running == 4


async def test_workers_share_the_poison_jobs(fleet: Fleet) -> None:
    """One each, once each has polled."""
    ids = [await fleet.accept("sleep", "25.0") for _ in range(3)]
    await crash(fleet, *ids, times=2)
    for name in ("a", "b", "c"):
        fleet.start(name)

    await fleet.final(*ids)
    assert 1 < fleet.max_running <= 3


@pytest.mark.parametrize("poll_interval", [0.05, 1.0])
async def test_a_poison_job_starts_when_its_worker_holds_no_other(
    fleet: Fleet, poll_interval: float
) -> None:
    """A crash of the worker would count for each of them."""
    ids = [await fleet.accept("record") for _ in range(5)]
    await crash(fleet, *ids, times=3)
    held: list[int] = []

    async def record(_: object) -> None:
        jobs = [await fleet.job(job_id) for job_id in ids]
        held.append(sum(job.state is JobState.ACTIVE for job in jobs))

    fleet.declare("record", record)
    fleet.ledger.seconds = {"settle": 0.6}
    fleet.start(poll_interval=poll_interval)
    await fleet.final(*ids)

    assert held == [1] * 5


async def test_a_poison_job_starts_after_the_claims_that_run(fleet: Fleet) -> None:
    """Those of other queues may return another poison job."""
    first, second = [await fleet.accept("record", queue=each) for each in ("default", "other")]
    held: list[int] = []

    async def record(_: object) -> None:
        await asyncio.sleep(0.2)
        jobs = [await fleet.job(job_id) for job_id in (first, second)]
        held.append(sum(job.state is JobState.ACTIVE for job in jobs))

    fleet.declare("record", record)
    await crash(fleet, first)
    await crash(fleet, second)
    fleet.ledger.unavailable = frozenset({"claim", "due"})
    fleet.start(queues={"default": 10, "other": 10}, poll_interval=600.0)
    await asyncio.sleep(0.05)
    fleet.ledger.unavailable = frozenset()
    fleet.ledger.seconds = {"claim": 0.1, "settle": 0.5}
    await fleet.notifier.notify(JobNotification(queue="default", ids=(first,)))
    await asyncio.sleep(0.05)
    await fleet.notifier.notify(JobNotification(queue="other", ids=(second,)))
    await fleet.final(first, second)

    assert held == [1, 1]


async def test_poison_jobs_run_one_after_the_other_without_a_poll(fleet: Fleet) -> None:
    """In any queues and for any duration."""
    ids = [await fleet.accept("sleep", "0.1", queue=queue) for queue in ("default", "other") * 3]
    ids += [await fleet.accept("sleep", "5.0") for _ in range(2)]
    for queue in ("default", "other"):
        await crash(fleet, *[each for each in ids if (await fleet.job(each)).queue == queue])
    claims = sum([(await fleet.job(job_id)).claims for job_id in ids])
    fleet.start(queues={"default": 10, "other": 10}, poll_interval=600.0)
    took = await fleet.final(*ids, within=3600.0)

    # The sum of the durations, and for each the longest delay of a deferred job.
    assert took < 6 * (0.1 + 1.1) + 2 * (5.0 + 0.1)
    assert fleet.max_running == 1
    assert sum([(await fleet.job(job_id)).claims for job_id in ids]) - claims <= 40


async def test_a_job_that_crashes_every_worker_fails(fleet: Fleet) -> None:
    """With code ``crashed``."""
    job_id = await fleet.accept()
    await crash(fleet, job_id, times=4)
    await fleet.ledger.register("last", ["default"], 1.0)
    await fleet.ledger.claim("default", "last", 1)
    fleet.start(max_crashes=5)
    await fleet.final(job_id)
    job = await fleet.job(job_id)

    assert job.error is not None
    assert (job.state, job.error.code, job.crashes) == (JobState.FAILED, "crashed", 5)


async def test_an_abandoned_poison_job_releases_the_quarantine(fleet: Fleet) -> None:
    """The next one runs."""
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
    assert fleet.max_running == 0
    await fleet.final(first)
    await fleet.until(lambda: fleet.running)
    released.set()
    await fleet.final(*others, within=120.0)

    assert fleet.max_running == 1


async def test_a_waiting_poison_job_is_handed_back(fleet: Fleet) -> None:
    """Its worker is drained while it waits to be alone."""
    ids = [await fleet.accept() for _ in range(2)]
    await crash(fleet, *ids, times=2)
    fleet.ledger.unavailable = frozenset({"settle"})
    worker = fleet.start()
    await fleet.until(lambda: worker.active == 2)
    draining = asyncio.create_task(worker.drain(10.0))
    await asyncio.sleep(7.0)
    fleet.ledger.unavailable = frozenset()
    left = await draining

    assert left.handed_back == 2
    assert [(await fleet.job(job_id)).crashes for job_id in ids] == [2, 2]
    assert fleet.done == []
