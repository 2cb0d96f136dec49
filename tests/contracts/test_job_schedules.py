"""The contract of ``JobLedger``: schedules, and one job for each of their times."""

import asyncio
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from tests.contracts.ledgers import TURNS, LedgerCase, cancelled_after, draft, later

from viralfx.jobs.ledger import JobLedger
from viralfx.jobs.model import JobState, Unique, completed
from viralfx.jobs.schedule import Schedule, ScheduledAcceptance

DAY = 86_400.0
NIGHTLY = Schedule(task="night", cron="0 3 * * *", timezone="Europe/Berlin")
HOURLY = Schedule(task="hour", cron="0 * * * *")


async def test_a_new_schedule_begins_now(case: LedgerCase) -> None:
    """It has no last time; a later declaration does not change it."""
    before = case.now()
    (first,) = await case.ledger.declare_schedules([NIGHTLY], DAY)
    await case.pass_time()
    again = await case.ledger.declare_schedules([NIGHTLY, HOURLY], DAY)

    assert (first.task, first.cron, first.timezone) == ("night", "0 3 * * *", "Europe/Berlin")
    assert before <= first.since <= case.now()
    assert first.last_run_at is None
    assert first.seen_at == first.since
    assert before <= first.seen_at < max(each.seen_at for each in again) <= case.now()
    assert len({each.seen_at for each in again}) == 1
    assert sorted(again, key=lambda each: each.task)[1] == first
    assert [each.task for each in await case.ledger.schedules()] == ["hour", "night"]


async def test_a_changed_schedule_begins_again(case: LedgerCase) -> None:
    """Its new times before the change were not missed; its last time stays."""
    (first,) = await case.ledger.declare_schedules([NIGHTLY], DAY)
    await case.ledger.accept_scheduled(draft(task="night", run_at=first.since))
    states = [first]
    for changed in (replace(NIGHTLY, cron="* * * * *"), replace(NIGHTLY, timezone="Asia/Tokyo")):
        await case.pass_time()
        states += await case.ledger.declare_schedules([changed], DAY)
        assert (states[-1].cron, states[-1].timezone) == (changed.cron, changed.timezone)

    assert first.since < states[1].since < states[2].since
    assert states[1].last_run_at == states[2].last_run_at == first.since


async def test_a_schedule_that_no_worker_declares_is_forgotten(case: LedgerCase) -> None:
    """After a time, and only by a worker that declares its own."""
    await case.ledger.declare_schedules([NIGHTLY], DAY)
    await case.pass_time()
    await case.ledger.declare_schedules([HOURLY], DAY)
    assert len(await case.ledger.schedules()) == 2
    await case.pass_time()
    await case.ledger.declare_schedules([HOURLY], 0.0)

    assert [each.task for each in await case.ledger.schedules()] == ["hour"]
    assert await case.ledger.accept_scheduled(draft(task="night", run_at=case.now())) is None
    assert await case.ledger.page() == []


async def _declared(case: LedgerCase) -> datetime:
    (state,) = await case.ledger.declare_schedules([HOURLY], DAY)
    return state.since


async def test_one_job_is_accepted_for_a_time(case: LedgerCase) -> None:
    """With the time as its ``run_at``, and the job's id as in any acceptance."""
    since = await _declared(case)
    first = draft(task="hour", run_at=since, payload=b"null")
    answers = [
        await case.ledger.accept_scheduled(first),
        await case.ledger.accept_scheduled(draft(task="hour", run_at=since)),
        await case.ledger.accept_scheduled(draft(task="hour", run_at=later(since, -60.0))),
        await case.ledger.accept_scheduled(draft(task="hour", run_at=later(since, 1.0))),
    ]
    (state,) = await case.ledger.schedules()

    assert answers == [
        ScheduledAcceptance(created=True, handled_until=since),
        ScheduledAcceptance(created=False, handled_until=since),
        ScheduledAcceptance(created=False, handled_until=since),
        ScheduledAcceptance(created=True, handled_until=later(since, 1.0)),
    ]
    assert state.last_run_at == later(since, 1.0)
    jobs = await case.ledger.page()
    assert [job.asked_run_at for job in jobs] == [later(since, 1.0), since]
    assert (jobs[1].id, jobs[1].state) == (first.id, JobState.WAITING)
    assert (await case.job(first.id)).payload == b"null"


async def test_a_time_runs_once_also_after_its_job_was_deleted(case: LedgerCase) -> None:
    """The retention of jobs has no effect on schedules."""
    since = await _declared(case)
    await case.ledger.accept_scheduled(draft(task="hour", run_at=since))
    (claim,) = await case.claim()
    await case.ledger.settle([completed(claim, b"1")])
    await case.pass_time()
    assert await case.ledger.prune(0.0) == 1
    again = await case.ledger.accept_scheduled(draft(task="hour", run_at=since))

    assert again == ScheduledAcceptance(created=False, handled_until=since)
    assert await case.ledger.page() == []


async def test_a_time_is_skipped_while_a_unique_job_waits(case: LedgerCase) -> None:
    """It counts as taken."""
    since = await _declared(case)
    unique: dict[str, Any] = {
        "task": "hour",
        "unique": Unique.UNFINISHED,
        "unique_key": "hour null",
    }
    for minute in range(3):
        time = later(since, 60.0 * minute)
        answer = await case.ledger.accept_scheduled(draft(run_at=time, **unique))
        assert answer == ScheduledAcceptance(created=True, handled_until=time)

    (job,) = await case.ledger.page()
    assert job.asked_run_at == since


async def test_workers_at_the_same_moment_create_one_job(case: LedgerCase) -> None:
    """For each of several times, whichever worker comes first."""
    since = await _declared(case)
    for second in range(5):
        time = later(since, float(second))
        drafts = [draft(task="hour", run_at=time) for _ in range(8)]
        answers = await asyncio.gather(*map(case.ledger.accept_scheduled, drafts))

        assert [each.created for each in answers if each].count(True) == 1
        assert {each.handled_until for each in answers if each} == {time}
    assert len(await case.ledger.page()) == 5


@pytest.mark.parametrize("turns", TURNS)
async def test_a_cancelled_acceptance_leaves_job_and_time_together(
    case: LedgerCase, turns: int
) -> None:
    """Both are stored, or neither is."""
    since = await _declared(case)
    await cancelled_after(case.ledger.accept_scheduled(draft(task="hour", run_at=since)), turns)
    answer = await case.ledger.accept_scheduled(draft(task="hour", run_at=since))

    assert answer is not None
    assert answer.handled_until == since
    assert len(await case.ledger.page()) == 1


async def test_a_paused_schedule_has_no_job(case: LedgerCase) -> None:
    """Its times are handled. After the pause only later ones get a job, and a new pause is one."""
    since = await _declared(case)
    await case.ledger.accept_scheduled(draft(task="hour", run_at=since))
    assert await case.ledger.pause_schedule("hour")
    (paused,) = await case.ledger.schedules()
    await case.pass_time()
    assert await case.ledger.pause_schedule("hour")
    (again,) = await case.ledger.schedules()
    time = later(since, 3600.0)
    skipped = await case.ledger.accept_scheduled(draft(task="hour", run_at=time))
    earlier = await case.ledger.accept_scheduled(draft(task="hour", run_at=later(since, -1.0)))
    assert await case.ledger.resume_schedule("hour")
    (resumed,) = await case.ledger.schedules()
    assert resumed.resumed_at is not None
    late = await case.ledger.accept_scheduled(draft(task="hour", run_at=resumed.resumed_at))
    answer = await case.ledger.accept_scheduled(draft(task="hour", run_at=time))
    await case.pass_time()
    assert await case.ledger.resume_schedule("hour")
    (last,) = await case.ledger.schedules()

    assert paused.paused_at is not None
    assert since <= paused.paused_at < resumed.resumed_at
    assert again == paused
    assert skipped == ScheduledAcceptance(created=False, handled_until=time)
    assert earlier == ScheduledAcceptance(created=False, handled_until=since)
    assert (resumed.paused_at, resumed.last_run_at) == (None, since)
    assert resumed.handled_until == resumed.settled_until == resumed.resumed_at
    assert late == ScheduledAcceptance(created=False, handled_until=resumed.resumed_at)
    assert answer == ScheduledAcceptance(created=True, handled_until=time)
    assert (last.resumed_at, last.last_run_at) == (resumed.resumed_at, time)
    assert [job.asked_run_at for job in await case.ledger.page()] == [time, since]


async def test_a_pause_outlives_declarations_and_forgetting(case: LedgerCase) -> None:
    """Also a change of the expression; a resumed schedule is forgotten as any other one."""
    await case.ledger.declare_schedules([NIGHTLY, HOURLY], DAY)
    await case.ledger.pause_schedule("night")
    await case.pass_time()
    changed = replace(NIGHTLY, cron="0 4 * * *")
    (state,) = await case.ledger.declare_schedules([changed], DAY)
    await case.pass_time()
    await case.ledger.declare_schedules([HOURLY], 0.0)
    kept = [each.task for each in await case.ledger.schedules()]
    await case.ledger.resume_schedule("night")
    await case.pass_time()
    await case.ledger.declare_schedules([HOURLY], 0.0)

    assert (state.cron, state.paused_at is not None) == ("0 4 * * *", True)
    assert kept == ["hour", "night"]
    assert [each.task for each in await case.ledger.schedules()] == ["hour"]


async def test_a_schedule_that_no_worker_declared_cannot_be_paused(ledger: JobLedger) -> None:
    """The answer says so."""
    assert not await ledger.pause_schedule("hour")
    assert not await ledger.resume_schedule("hour")
    assert await ledger.schedules() == []


async def test_a_schedule_that_no_worker_declared_has_no_job(ledger: JobLedger) -> None:
    """The worker declares it, and tries again."""
    moment = datetime.fromisoformat("2026-01-06T12:00:00Z")

    assert await ledger.accept_scheduled(draft(task="hour", run_at=moment)) is None
    assert await ledger.schedules() == []
    assert await ledger.page() == []
