"""What a worker does with the jobs of its queues."""

from tests.unit.jobs.fleet import Fleet

from viralfx.domain.jobs.job import JobState


async def test_a_job_is_run_at_once_when_the_bell_is_rung(fleet: Fleet) -> None:
    """No look into the ledger is waited for."""
    fleet.start(look_interval=10.0)
    await fleet.until(lambda: fleet.bell.hears("default"))
    job_id = await fleet.submit(payload='"it"')

    assert await fleet.final(job_id) < 0.01
    job = await fleet.job(job_id)
    assert (job.state, job.result, job.attempts) == (JobState.COMPLETED, b'"it"', 0)


async def test_a_job_that_no_bell_told_of_is_found_by_looking(fleet: Fleet) -> None:
    """Within one interval."""
    fleet.start(look_interval=10.0)
    await fleet.until(lambda: fleet.bell.hears("default"))
    job_id = await fleet.accept()

    assert await fleet.final(job_id) <= 10.0
