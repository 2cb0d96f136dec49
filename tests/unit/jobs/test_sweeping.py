"""Who is taken for dead: those who died, and nobody for an outage of the ledger."""

import asyncio

import pytest
from tests.unit.jobs.fleet import Fleet, ShakyLedger

from viralfx.domain.jobs.job import JobState

LEASE = 30.0
EVERYTHING = ShakyLedger.EVERYTHING


async def _be_away(fleet: Fleet, seconds: float) -> None:
    fleet.ledger.away = EVERYTHING
    await asyncio.sleep(seconds)
    fleet.ledger.away = frozenset()


@pytest.mark.parametrize("seconds", [10.0, 21.0, 25.0, 29.0, 40.0, 300.0])
@pytest.mark.parametrize("into_the_lease", [0.0, 5.0, 9.5])
async def test_an_outage_is_nobody_s_death(
    fleet: Fleet, seconds: float, into_the_lease: float
) -> None:
    """However long it is: all renew their leases after it, before anybody sweeps."""
    for number in range(4):
        fleet.start(f"w{number}", lease=LEASE, queues={"default": 3}, default_timeout=3600.0)
        await asyncio.sleep(2.5)
    ids = [await fleet.accept("sleep", "700.0") for _ in range(12)]
    await fleet.until(lambda: fleet.running == 12)
    await asyncio.sleep(into_the_lease)
    for _ in range(2):
        await _be_away(fleet, seconds)
        await asyncio.sleep(20.0)
    await fleet.final(*ids, within=900.0)
    jobs = [await fleet.job(job_id) for job_id in ids]

    assert [(job.state, job.crashes, job.claims) for job in jobs] == [
        (JobState.COMPLETED, 0, 1)
    ] * 12
    assert (len(fleet.done), fleet.cancelled) == (12, [])


async def test_who_died_in_an_outage_is_found_after_it(fleet: Fleet) -> None:
    """As soon as all who live had the time to say so."""
    job_id = await fleet.accept()
    await fleet.kept.register("dead", ["default"], LEASE)
    await fleet.kept.claim("default", "dead", 1)
    fleet.start(lease=LEASE, sweep_interval=5.0)
    await asyncio.sleep(1.0)
    await _be_away(fleet, 100.0)

    # Half a lease and two seconds for those who live, a sweep, and what a look takes.
    assert LEASE / 2 <= await fleet.final(job_id) < LEASE / 2 + 2.0 + 2.0 + 5.0 + 1.0
    assert (await fleet.job(job_id)).crashes == 1


async def test_an_outage_that_comes_again_and_again_does_not_end_the_sweeping(
    fleet: Fleet,
) -> None:
    """While it is shorter than leases are, nobody need be waited for."""
    job_id = await fleet.accept()
    await fleet.kept.register("dead", ["default"], LEASE)
    await fleet.kept.claim("default", "dead", 1)
    fleet.start(lease=LEASE, sweep_interval=5.0)
    began = fleet.clock.monotonic()
    while not (await fleet.job(job_id)).state.final:
        await _be_away(fleet, 8.0)
        await asyncio.sleep(7.0)
        assert fleet.clock.monotonic() - began < 2 * LEASE


@pytest.mark.parametrize("into_the_lease", [0.0, 2.5, 5.0, 7.5, 9.5])
async def test_who_asked_while_the_ledger_hung_takes_no_job_of_the_living(
    fleet: Fleet, into_the_lease: float
) -> None:
    """Whatever was asked happens when it is back, in any order and although nobody waits for it."""
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


async def test_who_begins_after_an_outage_does_not_sweep_before_all_had_time(fleet: Fleet) -> None:
    """It does not know what was before it."""
    fleet.start("old", lease=LEASE)
    job_id = await fleet.accept("sleep", "100.0")
    await fleet.until(lambda: fleet.running == 1)
    await asyncio.sleep(15.0)
    await _be_away(fleet, 1.5 * LEASE)
    for number in range(5):
        fleet.start(f"new{number}", lease=LEASE, sweep_interval=0.1)
    await fleet.final(job_id, within=200.0)

    assert ((await fleet.job(job_id)).crashes, (await fleet.job(job_id)).claims) == (0, 1)


@pytest.mark.parametrize("lease", [1.0, 6.0, LEASE])
@pytest.mark.parametrize("older", [0.01, 0.3, 0.6])
async def test_who_has_just_begun_finds_who_dies_then(
    fleet: Fleet, lease: float, older: float
) -> None:
    """When its lease is over, and not later: it was renewed when it began."""
    job_id = await fleet.accept()
    await fleet.kept.register("dead", ["default"], lease)
    await fleet.kept.claim("default", "dead", 1)
    await asyncio.sleep(lease / 3 * older)
    fleet.start(lease=lease, sweep_interval=lease / 10, look_interval=0.1)

    assert await fleet.final(job_id) <= lease + lease / 10 + 0.2
    assert (await fleet.job(job_id)).crashes == 1


async def test_who_was_away_itself_does_not_sweep_as_soon_as_it_is_back(fleet: Fleet) -> None:
    """Its own lease had run out, so others' may have for the same reason."""
    fleet.start("here", lease=LEASE, sweep_interval=0.1)
    await asyncio.sleep(25.0)
    job_id = await fleet.accept("note", queue="other")
    await fleet.kept.register("beside", ["other"], LEASE)
    await fleet.kept.claim("other", "beside", 1)
    fleet.ledger.away = frozenset({"register"})
    await asyncio.sleep(LEASE + 10.0)
    fleet.ledger.away = frozenset()
    await asyncio.sleep(5.0)

    assert (await fleet.job(job_id)).crashes == 0
