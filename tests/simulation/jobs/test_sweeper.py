"""Sweeping takes the jobs of dead workers, and an outage of the ledger kills no worker."""

import asyncio

import pytest
from tests.soak import SOAK
from tests.unit.jobs.fleet import FaultyLedger, Fleet

from viralfx.jobs.model import JobState

LEASE = 30.0
EVERYTHING = FaultyLedger.EVERYTHING


async def _be_unavailable(fleet: Fleet, seconds: float) -> None:
    fleet.ledger.unavailable = EVERYTHING
    await asyncio.sleep(seconds)
    fleet.ledger.unavailable = frozenset()


@pytest.mark.soak
@pytest.mark.parametrize("seconds", [10.0, 21.0, 29.0, 300.0, *([25.0, 40.0] if SOAK else [])])
@pytest.mark.parametrize("into_the_lease", [0.0, 9.5, *([5.0] if SOAK else [])])
async def test_an_outage_does_not_expire_live_workers(
    fleet: Fleet, seconds: float, into_the_lease: float
) -> None:
    """All workers renew their leases before one of them sweeps."""
    for number in range(4):
        fleet.start(f"w{number}", lease=LEASE, queues={"default": 3}, default_timeout=3600.0)
        await asyncio.sleep(2.5)
    ids = [await fleet.accept("sleep", "700.0") for _ in range(12)]
    await fleet.until(lambda: fleet.running == 12)
    await asyncio.sleep(into_the_lease)
    for _ in range(2):
        await _be_unavailable(fleet, seconds)
        await asyncio.sleep(20.0)
    await fleet.final(*ids, within=900.0)
    jobs = [await fleet.job(job_id) for job_id in ids]

    assert [(job.state, job.crashes, job.claims) for job in jobs] == [
        (JobState.COMPLETED, 0, 1)
    ] * 12
    assert (len(fleet.done), fleet.cancelled) == (12, [])


async def test_a_worker_that_died_in_an_outage_is_swept_after_it(fleet: Fleet) -> None:
    """As soon as all live workers had time to renew."""
    job_id = await fleet.accept()
    await fleet.memory_ledger.register("dead", ["default"], LEASE)
    await fleet.memory_ledger.claim("default", "dead", 1)
    fleet.start(lease=LEASE, sweep_interval=5.0)
    await asyncio.sleep(1.0)
    await _be_unavailable(fleet, 100.0)

    # Half a lease and two seconds for live workers to renew, a sweep, and a poll.
    assert LEASE / 2 <= await fleet.final(job_id) < LEASE / 2 + 2.0 + 2.0 + 5.0 + 1.0
    assert (await fleet.job(job_id)).crashes == 1


async def test_repeated_short_outages_do_not_stop_sweeping(
    fleet: Fleet,
) -> None:
    """Outages shorter than a lease need no wait."""
    job_id = await fleet.accept()
    await fleet.memory_ledger.register("dead", ["default"], LEASE)
    await fleet.memory_ledger.claim("default", "dead", 1)
    fleet.start(lease=LEASE, sweep_interval=5.0)
    began = fleet.clock.monotonic()
    while not (await fleet.job(job_id)).state.final:
        await _be_unavailable(fleet, 8.0)
        await asyncio.sleep(7.0)
        assert fleet.clock.monotonic() - began < 2 * LEASE


async def test_a_sweep_is_reported_although_its_next_call_fails(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise no line would name a job that failed in it."""
    poison = await fleet.accept()
    await fleet.memory_ledger.register("dead", ["default"], 1.0)
    await fleet.memory_ledger.claim("default", "dead", 1)
    fleet.ledger.unavailable = frozenset({"expire"})
    fleet.start(lease=LEASE, sweep_interval=5.0, max_crashes=1)
    await fleet.final(poison)

    failures = [each.__dict__ for each in caplog.records if each.getMessage() == "Job failed"]
    assert [(each["job"], each["code"]) for each in failures] == [(poison, "crashed")]


async def test_another_worker_sweeps_in_place_of_a_leader_that_cannot(fleet: Fleet) -> None:
    """The leader renews its lease, but tasks may have all connections of its pool."""
    unable = FaultyLedger(fleet.memory_ledger)
    unable.unavailable = frozenset({"sweep", "claim", "due"})
    fleet.start("a", lease=LEASE, ledger=unable)
    fleet.start("b", lease=LEASE)
    await asyncio.sleep(20.0)
    job_id = await fleet.accept()
    await fleet.memory_ledger.register("dead", ["default"], 1.0)
    await fleet.memory_ledger.claim("default", "dead", 1)

    # With a leader that can sweep it takes a few seconds.
    assert await fleet.final(job_id, within=200.0) < 100.0


@pytest.mark.parametrize("into_the_lease", [0.0, 2.5, 5.0, 7.5, 9.5])
async def test_a_sweep_that_hangs_takes_no_job_of_a_live_worker(
    fleet: Fleet, into_the_lease: float
) -> None:
    """Hanging calls take effect later, in any order."""
    for number in range(4):
        fleet.start(f"w{number}", lease=LEASE, sweep_interval=1.0, queues={"default": 3})
    ids = [await fleet.accept("sleep", "200.0") for _ in range(12)]
    await fleet.until(lambda: fleet.running == 12)
    await asyncio.sleep(20.0 + into_the_lease)
    fleet.ledger.hanging = EVERYTHING
    await asyncio.sleep(LEASE * 1.5)
    fleet.ledger.hanging = frozenset()
    await fleet.final(*ids, within=300.0)
    jobs = [await fleet.job(job_id) for job_id in ids]

    assert [(job.crashes, job.claims) for job in jobs] == [(0, 1)] * 12


async def test_a_new_worker_waits_before_it_sweeps(fleet: Fleet) -> None:
    """It does not know of an outage before its start."""
    fleet.start("old", lease=LEASE)
    job_id = await fleet.accept("sleep", "100.0")
    await fleet.until(lambda: fleet.running == 1)
    await asyncio.sleep(15.0)
    await _be_unavailable(fleet, 1.5 * LEASE)
    for number in range(5):
        fleet.start(f"new{number}", lease=LEASE, sweep_interval=0.1)
    await fleet.final(job_id, within=200.0)

    assert ((await fleet.job(job_id)).crashes, (await fleet.job(job_id)).claims) == (0, 1)


@pytest.mark.parametrize("lease", [1.0, 6.0, LEASE])
@pytest.mark.parametrize("older", [0.01, 0.3, 0.6])
async def test_a_new_worker_sweeps_as_soon_as_a_lease_expires(
    fleet: Fleet, lease: float, older: float
) -> None:
    """The lease was renewed when the worker started."""
    job_id = await fleet.accept()
    await fleet.memory_ledger.register("dead", ["default"], lease)
    await fleet.memory_ledger.claim("default", "dead", 1)
    await asyncio.sleep(lease / 3 * older)
    fleet.start(lease=lease, sweep_interval=lease / 10, poll_interval=0.1)

    assert await fleet.final(job_id) <= lease + lease / 10 + 0.2
    assert (await fleet.job(job_id)).crashes == 1


async def test_a_worker_that_lost_its_own_lease_waits_before_it_sweeps(fleet: Fleet) -> None:
    """The leases of others may have expired for the same reason."""
    fleet.start("here", lease=LEASE, sweep_interval=0.1)
    await asyncio.sleep(25.0)
    job_id = await fleet.accept("note", queue="other")
    await fleet.memory_ledger.register("beside", ["other"], LEASE)
    await fleet.memory_ledger.claim("other", "beside", 1)
    fleet.ledger.unavailable = frozenset({"register"})
    await asyncio.sleep(LEASE + 10.0)
    fleet.ledger.unavailable = frozenset()
    await asyncio.sleep(5.0)

    assert (await fleet.job(job_id)).crashes == 0
