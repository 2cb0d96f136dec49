"""A ledger or a transport that is away: nothing is lost, and little is said."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.jobs.fleet import Fleet, ShakyLedger
from tests.virtual_time import VirtualTimeLoop, run_in_virtual_time

from viralfx.domain.jobs.job import (
    Claim,
    JobState,
    LedgerUnavailableError,
    Settlement,
    UnstorableError,
)
from viralfx.domain.resilience.retry_policy import BackoffPolicy

EVERYTHING = ShakyLedger.EVERYTHING


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the messages of the log."""
    return [record.getMessage() for record in caplog.records]


async def test_a_ledger_that_is_away_is_told_of_once_and_its_return_once(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """However many steps of however many queues fail for however long."""
    caplog.set_level(logging.INFO)
    fleet.start(queues={"default": 5, "other": 5})
    for _ in range(3):
        await fleet.accept("sleep", "2.0")
    await asyncio.sleep(1.0)
    fleet.ledger.away = EVERYTHING
    await asyncio.sleep(20.0)
    fleet.ledger.away = frozenset()
    await asyncio.sleep(20.0)

    assert said(caplog) == ["Job ledger unavailable", "Job ledger available again"]
    assert len(fleet.done) == 3


async def test_a_lost_ledger_is_asked_ever_less_often(fleet: Fleet) -> None:
    """At last every one or two seconds for each thing to be done."""
    fleet.ledger.away = EVERYTHING
    fleet.start()
    await asyncio.sleep(100.0)

    assert 50 <= fleet.ledger.count("register") <= 110


async def test_outcomes_are_kept_until_they_are_recorded(fleet: Fleet) -> None:
    """And none of the tasks runs twice."""
    fleet.start(lease=3600.0, queues={"default": 10})
    ids = [await fleet.accept("sleep", "1.0") for _ in range(10)]
    await fleet.until(lambda: fleet.running == 10)
    fleet.ledger.away = frozenset({"settle"})
    await asyncio.sleep(600.0)
    assert [(await fleet.job(job_id)).state for job_id in ids] == [JobState.ACTIVE] * 10
    fleet.ledger.away = frozenset()

    assert await fleet.final(*ids) < 3.0
    assert len(fleet.done) == 10


async def test_what_is_kept_is_bounded(fleet: Fleet) -> None:
    """A worker that cannot record claims no more than so much."""
    fleet.start(lease=3600.0, queues={"default": 10})
    for _ in range(1000):
        await fleet.accept()
    fleet.ledger.away = frozenset({"settle"})
    await asyncio.sleep(100.0)

    assert len(fleet.done) <= 20


async def test_an_outcome_that_was_recorded_without_an_answer_is_recorded_once(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """The second try finds nothing to take, and that is no lost fence."""
    fleet.ledger.away_after = frozenset({"settle"})
    worker = fleet.start()
    job_id = await fleet.accept()
    await fleet.until(lambda: fleet.ledger.count("settle") == 2)
    fleet.ledger.away_after = frozenset()
    await fleet.until(lambda: not worker.active)

    assert (await fleet.job(job_id)).state is JobState.COMPLETED
    assert worker.fenced == 0
    assert "Outcome not recorded: the job was taken from this worker" not in said(caplog)


async def test_an_outcome_that_comes_too_late_is_not_recorded(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """The job belongs to somebody else by then; the worker says so once and goes on."""
    worker = fleet.start(lease=10.0)
    job_id = await fleet.accept("sleep", "60.0")
    await fleet.until(lambda: fleet.running)
    fleet.ledger.away = frozenset({"register", "claim", "sweep"})
    await asyncio.sleep(15.0)
    assert (await fleet.kept.sweep(5)).returned == {"default": [job_id]}
    await fleet.kept.register("other", ["default"], 3600.0)
    (claim,) = await fleet.kept.claim("default", "other", 1)
    await asyncio.sleep(60.0)

    assert fleet.done == [60.0]
    assert (worker.fenced, worker.active) == (1, 0)
    job = await fleet.job(job_id)
    assert (job.state, job.worker, job.claims, claim.number) == (JobState.ACTIVE, "other", 2, 2)
    assert said(caplog).count("Job lease lost: others may be given this worker's jobs") == 1
    assert said(caplog).count("Outcome not recorded: the job was taken from this worker") == 1


async def test_a_lease_that_was_lost_is_regained(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """Both are told of, and jobs run again."""
    caplog.set_level(logging.INFO)
    fleet.start(lease=10.0)
    await asyncio.sleep(1.0)
    fleet.ledger.away = EVERYTHING
    await asyncio.sleep(60.0)
    fleet.ledger.away = frozenset()
    job_id = await fleet.accept()

    assert await fleet.final(job_id) < 3.0
    assert [line for line in said(caplog) if "lease" in line] == [
        "Job lease lost: others may be given this worker's jobs",
        "Job lease regained",
    ]


async def test_a_pause_of_the_process_is_not_its_own_death(fleet: Fleet) -> None:
    """Its own lease ran out meanwhile; nobody else was there to take its jobs, nor does it."""
    fleet.start(lease=10.0, sweep_interval=1.0)
    job_id = await fleet.accept("sleep", "60.0")
    await fleet.until(lambda: fleet.running)
    fleet.ledger.seconds = {"register": 0.5}
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    loop.jump(30.0)
    await fleet.final(job_id, within=120.0)

    job = await fleet.job(job_id)
    assert (job.crashes, job.claims) == (0, 1)


async def test_a_task_that_ends_its_own_connection_is_not_run_for_ever(fleet: Fleet) -> None:
    """It looks like an outage each time; after so many it is the task's failure."""

    class Cut(ShakyLedger):
        async def settle_with_effect(
            self, claim: Claim, effect: Callable[[Any], Awaitable[bytes]]
        ) -> bool:
            await effect(None)
            assert claim.number <= 32
            raise LedgerUnavailableError("the database closed the connection")

    fleet.ledger = Cut(fleet.kept)
    fleet.declare(
        "cut",
        lambda payload, _: fleet.note(payload),
        transactional=True,
        retry=BackoffPolicy(attempts=2),
    )
    fleet.start()
    job_id = await fleet.accept("cut")
    await fleet.final(job_id, within=120.0)

    job = await fleet.job(job_id)
    assert (job.state, job.attempts, job.claims) == (JobState.FAILED, 2, 32)
    assert job.error is not None
    assert (job.error.code, job.error.message) == ("error", "the database closed the connection")


async def test_a_renewal_that_hangs_is_tried_again_in_time(fleet: Fleet) -> None:
    """Half of the lease is left for that, and the lease does not run out."""
    fleet.start(lease=30.0)
    await asyncio.sleep(5.0)
    fleet.ledger.hanging = frozenset({"register"})
    await asyncio.sleep(6.0)
    fleet.ledger.hanging = frozenset()
    await fleet.until(lambda: fleet.ledger.count("register") >= 3)

    assert (await fleet.ledger.sweep(5)).returned == {}


async def test_one_outcome_that_is_refused_harms_no_other(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """It fails its job with a code, as what it returned cannot be kept."""

    class Fussy(ShakyLedger):
        async def settle(self, settlements: Sequence[Settlement]) -> frozenset[str]:
            if any(b"bad" in (settled.result or b"") for settled in settlements):
                raise UnstorableError("invalid byte sequence")
            return frozenset(await super().settle(settlements))

    fleet.ledger = Fussy(fleet.kept)
    ids = [await fleet.accept(payload=f'"{text}"') for text in ("a", "bad", "b", "c")]
    fleet.start()
    await fleet.final(*ids)
    jobs = [await fleet.job(job_id) for job_id in ids]

    assert [job.state for job in jobs] == [
        JobState.COMPLETED,
        JobState.FAILED,
        JobState.COMPLETED,
        JobState.COMPLETED,
    ]
    assert jobs[1].error is not None
    assert (jobs[1].error.code, jobs[1].result) == ("result", None)
    assert said(caplog).count("Outcome refused by the ledger") == 1


async def test_a_message_that_is_refused_does_not_keep_its_job(fleet: Fleet) -> None:
    """It fails without it."""

    class Fussy(ShakyLedger):
        async def settle(self, settlements: Sequence[Settlement]) -> frozenset[str]:
            if any(each.error and "strange" in each.error.message for each in settlements):
                raise UnstorableError("invalid byte sequence")
            return frozenset(await super().settle(settlements))

    async def fail(_: object) -> None:
        raise RuntimeError("strange")

    fleet.ledger = Fussy(fleet.kept)
    fleet.declare("fail", fail, retry=BackoffPolicy(attempts=1))
    fleet.start()
    job_id = await fleet.accept("fail")
    await fleet.final(job_id)
    job = await fleet.job(job_id)

    assert job.error is not None
    assert (job.error.code, job.error.message) == (
        "error",
        "the ledger cannot keep the error's message",
    )


async def test_a_ledger_that_refuses_everything_holds_no_other_queue_up(fleet: Fleet) -> None:
    """What cannot be recorded in any way is tried again, and recorded when it can be."""

    class Broken(ShakyLedger):
        broken = True

        async def settle(self, settlements: Sequence[Settlement]) -> frozenset[str]:
            if self.broken and any(each.claim.queue == "default" for each in settlements):
                raise KeyError("a bug")
            return frozenset(await super().settle(settlements))

    fleet.ledger = broken = Broken(fleet.kept)
    fleet.start(queues={"default": 1, "other": 1})
    ids = [await fleet.accept(), await fleet.accept(queue="other")]
    await fleet.final(ids[1])
    await asyncio.sleep(30.0)
    broken.broken = False

    assert await fleet.final(ids[0]) < 3.0
    assert [(await fleet.job(job_id)).state for job_id in ids] == [JobState.COMPLETED] * 2


@pytest.mark.parametrize("times", [1, 5])
async def test_what_is_completed_stays_so_although_the_ledger_refused_it(
    fleet: Fleet, times: int
) -> None:
    """By a fault of its own, and not by what was to be recorded."""

    class Faulty(ShakyLedger):
        faults = times

        async def settle(self, settlements: Sequence[Settlement]) -> frozenset[str]:
            if self.faults:
                self.faults -= 1
                raise RuntimeError("a bug")
            return frozenset(await super().settle(settlements))

    async def fail(_: object) -> None:
        raise RuntimeError("strange")

    fleet.ledger = Faulty(fleet.kept)
    fleet.declare("fail", fail, retry=BackoffPolicy(attempts=1))
    fleet.start()
    ids = [await fleet.accept(payload='"kept"'), await fleet.accept("fail")]
    await fleet.final(*ids)
    done, over = [await fleet.job(job_id) for job_id in ids]

    assert (done.state, done.result, done.error) == (JobState.COMPLETED, b'"kept"', None)
    assert over.error is not None
    assert (over.state, over.error.message) == (JobState.FAILED, "strange")
    assert fleet.done == ["kept"]


async def test_an_error_of_a_step_that_is_no_outage_ends_nothing(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged once and the step tried again; no outage ends with it, as none began."""
    caplog.set_level(logging.INFO)

    class Buggy(ShakyLedger):
        broken = True

        async def claim(self, *args: object, **more: object) -> list[object]:  # type: ignore[override]
            if self.broken:
                raise KeyError("a bug")
            return list(await super().claim(*args, **more))  # type: ignore[arg-type]

    fleet.ledger = buggy = Buggy(fleet.kept)
    fleet.start()
    await asyncio.sleep(10.0)
    buggy.broken = False
    job_id = await fleet.accept()

    assert await fleet.final(job_id) < 4.0
    assert said(caplog) == ["Job ledger refused a step"]


async def test_a_transport_that_is_away_costs_a_look(fleet: Fleet) -> None:
    """No job is lost with its bell."""
    fleet.start(look_interval=1.0)
    fleet.bell.away = True
    job_id = await fleet.accept()

    assert await fleet.final(job_id) <= 1.01


@settings(max_examples=settings().max_examples // 8)
@given(
    outages=st.lists(
        st.tuples(
            st.floats(0.1, 8.0),
            st.sets(st.sampled_from(sorted(EVERYTHING - {"accept"})), min_size=1),
            st.sampled_from(["before", "after"]),
            st.floats(0.1, 20.0),
        ),
        max_size=5,
    ),
    workers=st.integers(1, 3),
)
def test_every_job_is_completed_through_any_outages(
    outages: list[tuple[float, set[str], str, float]], workers: int
) -> None:
    """Whichever steps are away when, and whether or not they happened: none is lost or stuck."""

    async def main() -> None:
        fleet = Fleet()
        for number in range(workers):
            fleet.start(f"w{number}", lease=10.0, queues={"default": 4})
        ids = [await fleet.accept("sleep", "0.5") for _ in range(40)]
        for pause, steps, moment, seconds in outages:
            await asyncio.sleep(pause)
            ids += [await fleet.submit("sleep", "0.5") for _ in range(10)]
            if moment == "before":
                fleet.ledger.away = frozenset(steps)
            else:
                fleet.ledger.away_after = frozenset(steps)
            await asyncio.sleep(seconds)
            fleet.ledger.away = fleet.ledger.away_after = frozenset()
        await fleet.final(*ids, within=120.0)
        jobs = [await fleet.job(job_id) for job_id in ids]
        assert {job.state for job in jobs} <= {JobState.COMPLETED, JobState.FAILED}
        assert all(
            job.error is not None and job.error.code == "crashed"
            for job in jobs
            if job.state is JobState.FAILED
        )
        await fleet.stop()

    run_in_virtual_time(main())
