"""Jobs whose task no worker knows, over an hour of virtual time."""

from tests.unit.jobs.fleet import Fleet


async def test_a_task_that_stays_unknown_fails_its_jobs(fleet: Fleet) -> None:
    """After an hour of sweeps; the first one waits until all leases are known."""
    job_id = await fleet.accept("gone")
    fleet.start(poll_interval=5.0)
    took = await fleet.final(job_id, within=4000.0)
    job = await fleet.job(job_id)

    assert 3600.0 <= took <= 3690.0
    assert job.error is not None
    assert (job.error.code, job.error.message) == (
        "unknown_task",
        "no worker knew the task 'gone' for 3600 s; check TASK_MODULES of the workers",
    )
