"""The contract of ``JobLedger``: jobs of tasks that not every worker knows."""

import asyncio
from datetime import timedelta

from tests.contracts.ledgers import LONG_LEASE, SHORT_LEASE, LedgerCase, later

from viralfx.jobs.ledger import JobLedger
from viralfx.jobs.model import Claim, JobError, JobState, completed, refused

# -- due ---------------------------------------------------------------------------------------


async def test_an_empty_ledger_has_no_due_jobs(ledger: JobLedger) -> None:
    """Of any queue."""
    assert list(await ledger.due(["default", "analytics"])) == []
    assert list(await ledger.due([])) == []


async def test_queues_with_due_jobs_of_the_tasks_are_due(case: LedgerCase) -> None:
    """Only those that were asked for."""
    await case.accept(3, task="known")
    await case.accept(2, task="a-new", queue="analytics")
    await case.accept(2, task="z-new", queue="analytics")
    await case.accept(1, task="known", queue="notifications")
    queues = ["default", "analytics"]

    assert set(await case.ledger.due(queues)) == {"default", "analytics"}
    assert set(await case.ledger.due(queues, ["known", "other"])) == {"default"}
    assert set(await case.ledger.due(queues, ["z-new"])) == {"analytics"}
    assert set(await case.ledger.due(queues, [])) == set()


async def test_jobs_that_are_not_due_or_not_waiting_do_not_count(case: LedgerCase) -> None:
    """A later job of the same task hides none that is due."""
    await case.accept(task="t", run_at=case.now() + timedelta(hours=1))
    assert set(await case.ledger.due(["default"], ["t"])) == set()
    (due,) = await case.accept(task="t")
    assert set(await case.ledger.due(["default"], ["t"])) == {"default"}
    (claim,) = await case.claim()
    assert claim.id == due.id
    assert set(await case.ledger.due(["default"], ["t"])) == set()


async def test_jobs_that_are_due_soon_have_their_seconds(case: LedgerCase) -> None:
    """Of the first job of a queue whose task was asked for."""
    for seconds in (30, 20, 40):
        await case.accept(task="t", run_at=case.now() + timedelta(seconds=seconds))
    await case.accept(task="other", run_at=case.now() + timedelta(seconds=10))
    soon = await case.ledger.due(["default", "analytics"], ["t"], within=25.0)

    assert soon.keys() == {"default"}
    assert 10.0 < soon["default"] <= 20.0
    assert await case.ledger.due(["default"], ["t"], within=9.0) == {}
    assert (await case.ledger.due(["default"], within=25.0))["default"] <= 10.0
    await case.accept(task="t")
    assert await case.ledger.due(["default"], ["t"], within=25.0) == {"default": 0.0}


# -- claims ------------------------------------------------------------------------------------


async def test_a_claim_takes_jobs_of_the_given_tasks_only(case: LedgerCase) -> None:
    """In the order in which they became due; the others wait untouched."""
    jobs = [(await case.accept(task=task))[0] for task in ("a", "new", "b", "new", "a")]
    await case.ledger.register("w", ["default"], LONG_LEASE, tasks=["a", "b"])
    for _ in range(2):
        claims = await case.ledger.claim("default", "w", 1, tasks=["a", "b"])
        assert [claim.task for claim in claims] == [jobs.pop(0).task]
        jobs.pop(0)
    (last,) = await case.ledger.claim("default", "w", 10, tasks=["a", "b"])
    others = await case.ledger.claim("default", "w", 10)

    assert last.id == jobs[0].id
    assert [(other.task, other.number) for other in others] == [("new", 1), ("new", 1)]


async def test_a_claim_without_a_known_task_takes_nothing(case: LedgerCase) -> None:
    """By order and by ids."""
    (job,) = await case.accept(task="new")
    await case.ledger.register("w", ["default"], LONG_LEASE, tasks=[])

    for tasks in ([], ["other"]):
        for ids in (None, [job.id]):
            assert list(await case.ledger.claim("default", "w", 5, ids, tasks=tasks)) == []
    assert (await case.job(job.id)).claims == 0


async def test_a_claim_by_ids_ignores_jobs_of_other_tasks(case: LedgerCase) -> None:
    """As it ignores unknown ids."""
    (new,) = await case.accept(task="new")
    (known,) = await case.accept(task="known")
    await case.ledger.register("w", ["default"], LONG_LEASE, tasks=["known"])
    claims = await case.ledger.claim("default", "w", 5, [new.id, known.id], tasks=["known"])

    assert [claim.id for claim in claims] == [known.id]
    assert (await case.job(new.id)).state is JobState.WAITING


async def test_claims_beside_a_backlog_of_other_tasks_lose_no_job(case: LedgerCase) -> None:
    """Workers of two versions claim all at once; each job is claimed once, by one that knows it."""
    versions = {"old": ["a", "b"], "new": ["a", "b", "c"], "newer": ["b", "c"]}
    accepted = {
        job.id: job.task
        for task in ("c", "a", "b", "c")
        for job in await case.accept(10, task=task)
    }
    given: list[Claim] = []

    async def work(worker: str) -> None:
        await case.ledger.register(worker, ["default"], LONG_LEASE, tasks=versions[worker])
        while claims := await case.ledger.claim("default", worker, 3, tasks=versions[worker]):
            assert {claim.task for claim in claims} <= set(versions[worker])
            given.extend(claims)

    async def rest() -> bool:
        async with asyncio.TaskGroup() as group:
            for worker in versions:
                group.create_task(work(worker))
        return len(given) >= len(accepted)

    await case.until(rest)

    assert sorted(claim.id for claim in given) == sorted(accepted)
    assert {claim.number for claim in given} == {1}


# -- payloads that a worker cannot decode ------------------------------------------------------


async def test_a_refused_job_is_left_to_other_workers(case: LedgerCase) -> None:
    """By order, by ids and beside other tasks; it costs no attempt."""
    await case.accept(task="new")
    (job,) = await case.accept()
    await case.ledger.register("w", ["default"], LONG_LEASE)
    (claim,) = await case.ledger.claim("default", "w", 5, tasks=["task"])
    before = case.now()
    assert set(await case.ledger.settle([refused(claim, "no")])) == {claim.id}
    found = await case.job(job.id)

    assert (found.state, found.attempts, found.worker) == (JobState.WAITING, 0, None)
    assert (found.error, found.run_at >= before) == (JobError(code="payload", message="no"), True)
    for ids in (None, [job.id]):
        assert list(await case.ledger.claim("default", "w", 5, ids, tasks=["task"])) == []
    await case.pass_time()
    (other,) = await case.ledger.claim("default", "other", 5, tasks=["task"])
    await case.ledger.settle([refused(other, "neither")])
    again = await case.job(job.id)
    assert (again.run_at, again.error) == (
        found.run_at,
        JobError(code="payload", message="neither"),
    )
    (third,) = await case.ledger.claim("default", "third", 5, tasks=["task"])
    assert (third.number, third.attempt) == (3, 1)
    await case.ledger.settle([completed(third, b"1")])
    assert (await case.job(job.id)).error is None


# -- jobs that no worker can run ---------------------------------------------------------------


async def expired(case: LedgerCase, patience: float = SHORT_LEASE) -> dict[str, set[str]]:
    """Expire until some job fails; return the ids by code."""

    async def expire() -> dict[str, set[str]]:
        await case.ledger.register("w", ["default"], LONG_LEASE, tasks=["task"])
        failed = await case.ledger.expire(patience)
        return {code: set(ids) for code, ids in failed.items()}

    return await case.until(expire)


async def test_jobs_of_a_task_that_no_worker_knows_fail_after_the_patience(
    case: LedgerCase,
) -> None:
    """Those that are due; the time counts from the first call."""
    jobs = await case.accept(2, task="new")
    (later_job,) = await case.accept(task="new", run_at=later(case.now(), 3600.0))
    (known,) = await case.accept()
    (elsewhere,) = await case.accept(task="new", queue="analytics")
    await case.ledger.register("x", ["analytics"], LONG_LEASE, tasks=["new"])
    began = case.now()
    failed = await expired(case)
    found = await case.job(jobs[0].id)

    assert case.now() >= later(began, SHORT_LEASE)
    assert failed == {"unknown_task": {job.id for job in jobs}}
    assert found.error is not None
    assert (found.state, found.error.code, found.attempts) == (JobState.FAILED, "unknown_task", 0)
    assert "'new'" in found.error.message
    for job in (later_job, known, elsewhere):
        assert (await case.job(job.id)).state is JobState.WAITING
    assert (await case.ledger.counts())["default"].failed == 2


async def test_a_worker_that_knows_the_task_stops_the_clock(case: LedgerCase) -> None:
    """After it has gone, the whole patience passes again."""
    (job,) = await case.accept(task="new")
    await case.ledger.register("w", ["default"], LONG_LEASE, tasks=["task"])
    assert dict(await case.ledger.expire(SHORT_LEASE)) == {}
    await case.ledger.register("new", ["default"], LONG_LEASE, tasks=["new"])
    began = case.now()

    async def long_enough() -> bool:
        assert dict(await case.ledger.expire(SHORT_LEASE)) == {}
        return case.now() > later(began, 2 * SHORT_LEASE)

    await case.until(long_enough)
    await case.ledger.deregister("new")
    began = case.now()

    assert await expired(case) == {"unknown_task": {job.id}}
    assert case.now() >= later(began, SHORT_LEASE)


async def test_time_without_any_worker_does_not_count(case: LedgerCase) -> None:
    """A fleet that was down finds its jobs waiting."""
    (job,) = await case.accept(task="new")
    await case.ledger.register("w", ["default"], LONG_LEASE, tasks=["task"])
    assert dict(await case.ledger.expire(SHORT_LEASE)) == {}
    began = case.now()

    async def long_enough() -> bool:
        return case.now() > later(began, 2 * SHORT_LEASE)

    await case.until(long_enough)

    assert dict(await case.ledger.expire(SHORT_LEASE)) == {}
    assert (await case.job(job.id)).state is JobState.WAITING
    assert await expired(case) == {"unknown_task": {job.id}}


async def test_a_queue_without_a_worker_loses_no_job(case: LedgerCase) -> None:
    """While workers of another queue live; its own workers grant the whole patience."""
    (job,) = await case.accept(task="new", queue="analytics")
    await case.ledger.register("w", ["default"], LONG_LEASE, tasks=["task"])
    began = case.now()

    async def long_enough() -> bool:
        assert dict(await case.ledger.expire(SHORT_LEASE)) == {}
        return case.now() > later(began, 2 * SHORT_LEASE)

    await case.until(long_enough)
    assert (await case.job(job.id)).state is JobState.WAITING
    await case.ledger.register("x", ["analytics"], LONG_LEASE, tasks=["task"])
    began = case.now()

    assert await expired(case) == {"unknown_task": {job.id}}
    assert case.now() >= later(began, SHORT_LEASE)


async def test_a_retried_job_has_the_whole_patience_again(case: LedgerCase) -> None:
    """Also for the workers that refused it."""
    (job,) = await case.accept()
    (claim,) = await case.claim()
    await case.ledger.settle([refused(claim, "no")])
    assert await expired(case) == {"payload": {job.id}}
    found = await case.job(job.id)
    assert (found.state, found.error) == (JobState.FAILED, JobError(code="payload", message="no"))
    await case.ledger.retry(job.id)

    assert dict(await case.ledger.expire(SHORT_LEASE)) == {}
    (again,) = await case.claim()
    assert (again.id, again.attempt) == (job.id, 1)


async def test_a_refused_job_waits_for_a_worker_that_did_not_try(case: LedgerCase) -> None:
    """However long that one is busy."""
    (job,) = await case.accept()
    (claim,) = await case.claim()
    await case.ledger.settle([refused(claim, "no")])
    await case.ledger.register("busy", ["default"], LONG_LEASE, tasks=["task"])
    began = case.now()

    async def long_enough() -> bool:
        assert dict(await case.ledger.expire(SHORT_LEASE)) == {}
        return case.now() > later(began, 2 * SHORT_LEASE)

    await case.until(long_enough)
    await case.ledger.deregister("busy")

    assert await expired(case) == {"payload": {job.id}}


async def test_a_job_that_a_worker_can_run_never_expires(case: LedgerCase) -> None:
    """Even without patience: it is late because the worker is busy."""
    (job,) = await case.accept()
    await case.ledger.register("w", ["default"], LONG_LEASE, tasks=["task"])
    await case.pass_time()

    assert dict(await case.ledger.expire(0.0)) == {}
    assert (await case.job(job.id)).state is JobState.WAITING


async def test_a_call_that_comes_too_late_expires_nothing(case: LedgerCase) -> None:
    """As a sweep does."""
    (job,) = await case.accept(task="new")
    await case.ledger.register("w", ["default"], LONG_LEASE, tasks=["task"])
    assert dict(await case.ledger.expire(0.0, later(case.now(), -1.0))) == {}
    assert (await case.job(job.id)).state is JobState.WAITING
    assert dict(await case.ledger.expire(0.0, later(case.now(), 60.0))) == {
        "unknown_task": [job.id]
    }


async def test_jobs_of_unknown_tasks_are_counted(case: LedgerCase) -> None:
    """Due jobs of queues with a worker."""
    assert list(await case.ledger.unrunnable()) == []
    await case.accept(3, task="new")
    await case.accept(2, task="other")
    await case.accept(1, task="new", run_at=later(case.now(), 3600.0))
    await case.accept(1, task="new", queue="analytics")
    assert list(await case.ledger.unrunnable()) == []
    await case.ledger.register("w", ["default"], LONG_LEASE, tasks=["task", "other"])
    assert list(await case.ledger.unrunnable()) == [("default", "new", "unknown_task", 3)]
    await case.ledger.register("new", ["default"], LONG_LEASE)
    assert list(await case.ledger.unrunnable()) == []


async def test_jobs_that_every_worker_refused_are_counted(case: LedgerCase) -> None:
    """Until a worker is there that has not refused them and knows the task."""
    await case.accept(3, task="changed")
    await case.ledger.register("old", ["default"], LONG_LEASE, tasks=["changed", "other"])
    first, second, _ = await case.ledger.claim("default", "old", 3)
    await case.ledger.settle([refused(first, "no"), refused(second, "no")])
    await case.pass_time()
    assert list(await case.ledger.unrunnable()) == [("default", "changed", "payload", 2)]
    await case.ledger.register("older", ["default"], LONG_LEASE, tasks=["other"])
    await case.accept(task="new")
    assert list(await case.ledger.unrunnable()) == [
        ("default", "changed", "payload", 2),
        ("default", "new", "unknown_task", 1),
    ]
    await case.ledger.register("new", ["default"], LONG_LEASE, tasks=["changed", "new"])
    assert list(await case.ledger.unrunnable()) == []
    again, _ = await case.ledger.claim("default", "new", 2, tasks=["changed"])
    await case.ledger.settle([refused(again, "no")])
    await case.pass_time()
    assert list(await case.ledger.unrunnable()) == [("default", "changed", "payload", 1)]
    await case.ledger.deregister("old")
    await case.ledger.deregister("new")
    assert list(await case.ledger.unrunnable()) == [
        ("default", "changed", "unknown_task", 3),
        ("default", "new", "unknown_task", 1),
    ]
