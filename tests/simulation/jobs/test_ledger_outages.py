"""Outages of the ledger and the notifier: no job is lost, and the log stays short."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.jobs.fleet import FaultyLedger, Fleet
from tests.virtual_time import VirtualTimeLoop, run_in_virtual_time

from viralfx.core.errors import LedgerUnavailableError, UnstorableError
from viralfx.jobs.ledger import Claims, PartlyDoneError
from viralfx.jobs.model import Claim, JobState, Settlement
from viralfx.resilience.policy import BackoffPolicy

EVERYTHING = FaultyLedger.EVERYTHING


def messages_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the messages of the log."""
    return [record.getMessage() for record in caplog.records]


async def test_an_outage_and_its_end_are_logged_once(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """For any number of failing steps and queues."""
    caplog.set_level(logging.INFO)
    fleet.start(queues={"default": 5, "other": 5})
    for _ in range(3):
        await fleet.accept("sleep", "2.0")
    await asyncio.sleep(1.0)
    fleet.ledger.unavailable = EVERYTHING
    await asyncio.sleep(20.0)
    fleet.ledger.unavailable = frozenset()
    await asyncio.sleep(20.0)

    assert messages_of(caplog) == ["Job ledger unavailable", "Job ledger available again"]
    assert len(fleet.done) == 3


async def test_calls_back_off_during_an_outage(fleet: Fleet) -> None:
    """Up to one call per step every one or two seconds."""
    fleet.ledger.unavailable = EVERYTHING
    fleet.start()
    await asyncio.sleep(100.0)

    assert 50 <= fleet.ledger.count("register") <= 110


async def test_outcomes_are_kept_until_they_are_recorded(fleet: Fleet) -> None:
    """No task runs twice."""
    fleet.start(lease=3600.0, queues={"default": 10})
    ids = [await fleet.accept("sleep", "1.0") for _ in range(10)]
    await fleet.until(lambda: fleet.running == 10)
    fleet.ledger.unavailable = frozenset({"settle"})
    await asyncio.sleep(600.0)
    assert [(await fleet.job(job_id)).state for job_id in ids] == [JobState.ACTIVE] * 10
    fleet.ledger.unavailable = frozenset()

    assert await fleet.final(*ids) < 6.0
    assert len(fleet.done) == 10


async def test_unrecorded_outcomes_are_bounded(fleet: Fleet) -> None:
    """A worker that cannot record outcomes stops claiming."""
    fleet.start(lease=3600.0, queues={"default": 10})
    for _ in range(1000):
        await fleet.accept()
    fleet.ledger.unavailable = frozenset({"settle"})
    await asyncio.sleep(100.0)

    assert len(fleet.done) <= 20


async def test_an_outcome_whose_response_was_lost_is_recorded_once(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """The second try settles nothing and does not count as fenced."""
    fleet.ledger.failing_after = frozenset({"settle"})
    worker = fleet.start()
    job_id = await fleet.accept()
    await fleet.until(lambda: fleet.ledger.count("settle") == 2)
    fleet.ledger.failing_after = frozenset()
    await fleet.until(lambda: not worker.active)

    assert (await fleet.job(job_id)).state is JobState.COMPLETED
    assert worker.fenced == 0
    assert "Outcome not recorded: the job was taken from this worker" not in messages_of(caplog)


class LateLedger(FaultyLedger):
    """Records outcomes, and says of the first ones that another session locks the jobs."""

    def __init__(self, fleet: Fleet) -> None:
        super().__init__(fleet.memory_ledger)
        fleet.ledger = self

    async def settle(self, settlements: Sequence[Settlement]) -> Collection[str]:
        """Settle; the first answer is the one after a lost answer."""
        settled = await super().settle(settlements)
        if self.count("settle") > 1:
            return settled
        ids = [settlement.claim.id for settlement in settlements]
        raise PartlyDoneError("other transactions lock their rows", ids, doubtful=True)


async def test_an_outcome_that_took_effect_during_a_lock_is_recorded(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """The lock was that of a call whose answer was lost."""
    LateLedger(fleet)
    worker = fleet.start()
    job_id = await fleet.accept()
    await fleet.until(lambda: fleet.ledger.count("settle") == 2)
    await fleet.until(lambda: not worker.active)

    assert (await fleet.job(job_id)).state is JobState.COMPLETED
    assert worker.fenced == 0
    assert messages_of(caplog) == ["Outcome waits: another session locks the job"]


async def test_a_fenced_outcome_is_not_recorded(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """Another worker has claimed the job; the worker logs it once."""
    worker = fleet.start(lease=10.0)
    job_id = await fleet.accept("sleep", "60.0")
    await fleet.until(lambda: fleet.running)
    fleet.ledger.unavailable = frozenset({"register", "claim", "sweep"})
    await asyncio.sleep(15.0)
    assert (await fleet.memory_ledger.sweep(5)).returned == {"default": [job_id]}
    await fleet.memory_ledger.register("other", ["default"], 3600.0)
    (claim,) = await fleet.memory_ledger.claim("default", "other", 1)
    await asyncio.sleep(60.0)

    assert fleet.done == [60.0]
    assert (worker.fenced, worker.active) == (1, 0)
    job = await fleet.job(job_id)
    assert (job.state, job.worker, job.claims, claim.number) == (JobState.ACTIVE, "other", 2, 2)
    assert (
        messages_of(caplog).count("Job lease lost: other workers may take this worker's jobs") == 1
    )
    assert (
        messages_of(caplog).count("Outcome not recorded: the job was taken from this worker") == 1
    )


async def test_a_lost_lease_is_regained(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    """Both events are logged, and jobs run again."""
    caplog.set_level(logging.INFO)
    fleet.start(lease=10.0)
    await asyncio.sleep(1.0)
    fleet.ledger.unavailable = EVERYTHING
    await asyncio.sleep(60.0)
    fleet.ledger.unavailable = frozenset()
    job_id = await fleet.accept()

    assert await fleet.final(job_id) < 3.0
    assert [line for line in messages_of(caplog) if "lease" in line] == [
        "Job lease lost: other workers may take this worker's jobs",
        "Job lease regained",
    ]


async def test_a_paused_worker_keeps_its_jobs(fleet: Fleet) -> None:
    """Its lease expired, but no other worker took its jobs."""
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


async def test_a_task_that_ends_its_own_connection_fails_in_the_end(fleet: Fleet) -> None:
    """Each time it resembles an outage; after many times it counts as the task's failure."""

    class Cut(FaultyLedger):
        async def settle_with_effect(
            self,
            claim: Claim,
            effect: Callable[[Any], Awaitable[bytes]],
            progress: Callable[[], bytes | None] = lambda: None,
        ) -> bool:
            await effect(None)
            assert progress() is None
            assert claim.number <= 32
            raise LedgerUnavailableError("the database closed the connection")

    fleet.ledger = Cut(fleet.memory_ledger)
    fleet.declare(
        "cut",
        lambda payload, _: fleet.note(payload),
        transactional=True,
        retry=BackoffPolicy(attempts=2),
    )
    fleet.start(poll_interval=1.0)
    job_id = await fleet.accept("cut")
    await fleet.final(job_id, within=120.0)

    job = await fleet.job(job_id)
    assert (job.state, job.attempts, job.claims) == (JobState.FAILED, 2, 32)
    assert job.error is not None
    assert (job.error.code, job.error.message) == ("error", "the database closed the connection")


async def test_a_hanging_renewal_is_retried_before_the_lease_expires(fleet: Fleet) -> None:
    """Half of the lease is left for it."""
    fleet.start(lease=30.0)
    await asyncio.sleep(5.0)
    fleet.ledger.hanging = frozenset({"register"})
    await asyncio.sleep(6.0)
    fleet.ledger.hanging = frozenset()
    await fleet.until(lambda: fleet.ledger.count("register") >= 3)

    assert (await fleet.ledger.sweep(5)).returned == {}


async def test_a_refused_outcome_fails_its_own_job_alone(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """With code ``result``."""

    class Fussy(FaultyLedger):
        async def settle(self, settlements: Sequence[Settlement]) -> frozenset[str]:
            if any(b"bad" in (settled.result or b"") for settled in settlements):
                raise UnstorableError("invalid byte sequence")
            return frozenset(await super().settle(settlements))

    fleet.ledger = Fussy(fleet.memory_ledger)
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
    assert messages_of(caplog).count("Outcome refused by the ledger") == 1


async def test_a_refused_error_message_is_replaced(fleet: Fleet) -> None:
    """The job fails without it."""

    class Fussy(FaultyLedger):
        async def settle(self, settlements: Sequence[Settlement]) -> frozenset[str]:
            if any(each.error and "strange" in each.error.message for each in settlements):
                raise UnstorableError("invalid byte sequence")
            return frozenset(await super().settle(settlements))

    async def fail(_: object) -> None:
        raise RuntimeError("strange")

    fleet.ledger = Fussy(fleet.memory_ledger)
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


async def test_a_refused_outcome_does_not_block_other_queues(fleet: Fleet) -> None:
    """It is tried again until it can be recorded."""

    class Broken(FaultyLedger):
        broken = True

        async def settle(self, settlements: Sequence[Settlement]) -> frozenset[str]:
            if self.broken and any(each.claim.queue == "default" for each in settlements):
                raise KeyError("a bug")
            return frozenset(await super().settle(settlements))

    fleet.ledger = broken = Broken(fleet.memory_ledger)
    fleet.start(queues={"default": 1, "other": 1})
    ids = [await fleet.accept(), await fleet.accept(queue="other")]
    await fleet.final(ids[1])
    await asyncio.sleep(30.0)
    broken.broken = False

    assert await fleet.final(ids[0]) < 6.0
    assert [(await fleet.job(job_id)).state for job_id in ids] == [JobState.COMPLETED] * 2


@pytest.mark.parametrize("times", [1, 5])
async def test_a_completed_job_stays_completed_after_a_ledger_error(
    fleet: Fleet, times: int
) -> None:
    """The error was not caused by the outcome."""

    class Faulty(FaultyLedger):
        faults = times

        async def settle(self, settlements: Sequence[Settlement]) -> frozenset[str]:
            if self.faults:
                self.faults -= 1
                raise RuntimeError("a bug")
            return frozenset(await super().settle(settlements))

    async def fail(_: object) -> None:
        raise RuntimeError("strange")

    fleet.ledger = Faulty(fleet.memory_ledger)
    fleet.declare("fail", fail, retry=BackoffPolicy(attempts=1))
    fleet.start()
    ids = [await fleet.accept(payload='"kept"'), await fleet.accept("fail")]
    await fleet.final(*ids)
    done, over = [await fleet.job(job_id) for job_id in ids]

    assert (done.state, done.result, done.error) == (JobState.COMPLETED, b'"kept"', None)
    assert over.error is not None
    assert (over.state, over.error.message) == (JobState.FAILED, "strange")
    assert fleet.done == ["kept"]


async def test_an_unexpected_ledger_error_is_logged_once_and_retried(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """It does not count as an outage."""
    caplog.set_level(logging.INFO)

    class Buggy(FaultyLedger):
        broken = True

        async def claim(self, *args: object, **more: object) -> Claims:
            if self.broken:
                raise KeyError("a bug")
            return await super().claim(*args, **more)  # type: ignore[arg-type]

    fleet.ledger = buggy = Buggy(fleet.memory_ledger)
    fleet.start()
    await asyncio.sleep(10.0)
    buggy.broken = False
    job_id = await fleet.accept()

    assert await fleet.final(job_id) < 4.0
    assert messages_of(caplog) == ["Job ledger refused a step"]


async def test_an_unavailable_notifier_delays_jobs_until_a_poll(fleet: Fleet) -> None:
    """No job is lost with its notification."""
    fleet.start(poll_interval=1.0)
    fleet.notifier.unavailable = True
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
def test_every_job_completes_through_random_outages(
    outages: list[tuple[float, set[str], str, float]], workers: int
) -> None:
    """Whether or not the failed steps took effect."""

    async def main() -> None:
        fleet = Fleet()
        for number in range(workers):
            fleet.start(f"w{number}", lease=10.0, queues={"default": 4})
        ids = [await fleet.accept("sleep", "0.5") for _ in range(40)]
        for pause, steps, moment, seconds in outages:
            await asyncio.sleep(pause)
            ids += [await fleet.submit("sleep", "0.5") for _ in range(10)]
            if moment == "before":
                fleet.ledger.unavailable = frozenset(steps)
            else:
                fleet.ledger.failing_after = frozenset(steps)
            await asyncio.sleep(seconds)
            fleet.ledger.unavailable = fleet.ledger.failing_after = frozenset()
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
