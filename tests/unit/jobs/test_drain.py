"""Draining a worker, with tasks and ledgers that do not respond."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.doubles import swallow_cancellation
from tests.unit.jobs.fleet import FaultyLedger, Fleet
from tests.virtual_time import run_in_virtual_time

from viralfx.core.errors import LedgerUnavailableError, WorkLostError
from viralfx.jobs.ledger import PartlyDoneError
from viralfx.jobs.model import JobState
from viralfx.jobs.worker.drain import DrainReport
from viralfx.jobs.worker.worker import JobWorker, WorkerState, drain_jobs

EVERYTHING = FaultyLedger.EVERYTHING


async def drain(fleet: Fleet, worker: JobWorker, budget: float) -> tuple[DrainReport, float]:
    """Drain a worker; return its report and the seconds it took."""
    began = fleet.clock.monotonic()
    left = await worker.drain(budget)
    return left, fleet.clock.monotonic() - began


async def test_jobs_within_the_budget_finish(fleet: Fleet) -> None:
    """The drain ends with the last of them."""
    worker = fleet.start()
    ids = [await fleet.accept("sleep", str(seconds)) for seconds in (1.0, 2.0, 5.0)]
    await fleet.until(lambda: fleet.running == 3)
    left, took = await drain(fleet, worker, 30.0)

    assert took == pytest.approx(5.0, abs=0.1)
    assert left == DrainReport(finished=3, handed_back=0, ignoring=0, unrecorded=0)
    assert [(await fleet.job(job_id)).state for job_id in ids] == [JobState.COMPLETED] * 3


async def test_an_idle_worker_drains_at_once(fleet: Fleet) -> None:
    """Its queues have no consumer afterwards."""
    worker = fleet.start()
    await fleet.until(lambda: fleet.ledger.count("claim"))
    assert (await fleet.memory_ledger.counts())["default"].consumers == 1
    left, took = await drain(fleet, worker, 30.0)

    assert took < 0.01
    assert left == DrainReport(finished=0, handed_back=0, ignoring=0, unrecorded=0)
    assert "default" not in await fleet.memory_ledger.counts()


async def test_a_draining_worker_claims_nothing(fleet: Fleet) -> None:
    """Neither waiting, announced nor new jobs."""
    worker = fleet.start(queues={"default": 2})
    for _ in range(2):
        await fleet.accept("sleep", "5.0")
    await fleet.until(lambda: fleet.running == 2)
    waiting = [await fleet.submit() for _ in range(5)]
    claims = fleet.ledger.count("claim")
    draining = asyncio.create_task(worker.drain(30.0))
    await asyncio.sleep(1.0)
    waiting.append(await fleet.submit())
    await draining

    assert fleet.ledger.count("claim") == claims
    assert [(await fleet.job(job_id)).state for job_id in waiting] == [JobState.WAITING] * 6
    assert not fleet.notifier.is_connected("default")


async def test_unfinished_jobs_are_handed_back_and_run_elsewhere(fleet: Fleet) -> None:
    """Their attempts are unspent, and other workers are notified."""
    worker = fleet.start()
    job_id = await fleet.accept("sleep", "60.0")
    await fleet.until(lambda: fleet.running)
    fleet.start("other", poll_interval=1000.0)
    left, took = await drain(fleet, worker, 10.0)
    job = await fleet.job(job_id)

    assert took <= 10.0
    assert left == DrainReport(finished=0, handed_back=1, ignoring=0, unrecorded=0)
    assert (job.state, job.worker) == (JobState.ACTIVE, "other")
    assert (job.attempts, job.crashes, job.claims, job.error) == (0, 0, 2, None)
    assert fleet.cancelled == [60.0]


async def test_a_job_may_complete_during_its_cancellation(fleet: Fleet) -> None:
    """Its outcome is recorded."""

    async def finish(_: object) -> str:
        try:
            await asyncio.sleep(60.0)
        except asyncio.CancelledError:
            await asyncio.sleep(0.2)
            return "saved"
        return "done"

    fleet.declare("finish", finish)
    worker = fleet.start()
    job_id = await fleet.accept("finish")
    await fleet.until(lambda: worker.active)
    left, _ = await drain(fleet, worker, 10.0)

    assert left.finished == 1
    assert (await fleet.job(job_id)).result == b'"saved"'


async def test_an_error_during_cancellation_spends_no_attempt(fleet: Fleet) -> None:
    """The job is handed back."""

    async def raise_error(_: object) -> None:
        try:
            await asyncio.sleep(60.0)
        except asyncio.CancelledError:
            raise RuntimeError("interrupted") from None

    fleet.declare("raise", raise_error)
    worker = fleet.start()
    job_id = await fleet.accept("raise")
    await fleet.until(lambda: worker.active)
    left, _ = await drain(fleet, worker, 10.0)
    job = await fleet.job(job_id)

    assert left.handed_back == 1
    assert (job.state, job.attempts, job.error) == (JobState.WAITING, 0, None)


@pytest.mark.parametrize("task", ["ignore", "ignore in a transaction"])
async def test_a_task_that_ignores_its_cancellation_is_abandoned(fleet: Fleet, task: str) -> None:
    """Its job is handed back in time, and its later outcome is dropped."""
    released = asyncio.Event()

    async def ignore(*_: object) -> str:
        await swallow_cancellation(released)
        return "much later"

    fleet.declare("ignore", ignore)
    fleet.declare("ignore in a transaction", ignore, transactional=True)
    worker = fleet.start()
    job_id = await fleet.accept(task)
    await fleet.until(lambda: worker.active)
    left, took = await drain(fleet, worker, 10.0)
    job = await fleet.job(job_id)
    released.set()
    await asyncio.sleep(1.0)

    assert 7.0 <= took <= 10.0
    assert left == DrainReport(finished=0, handed_back=1, ignoring=1, unrecorded=0)
    assert (job.state, job.attempts, job.crashes) == (JobState.WAITING, 0, 0)
    assert await fleet.job(job_id) == job


async def test_a_claim_that_ends_during_the_drain_is_handed_back(fleet: Fleet) -> None:
    """Its jobs are never started."""
    fleet.ledger.seconds = {"claim": 1.0}
    worker = fleet.start()
    job_id = await fleet.accept()
    await fleet.until(lambda: fleet.ledger.count("claim"))
    await asyncio.sleep(0.5)
    left, took = await drain(fleet, worker, 30.0)
    job = await fleet.job(job_id)

    assert took < 1.0
    assert left.handed_back == 1
    assert (job.state, job.claims, job.attempts) == (JobState.WAITING, 1, 0)
    assert fleet.done == []


async def test_a_hanging_claim_does_not_delay_the_drain(fleet: Fleet) -> None:
    """Its jobs are handed back when the worker deregisters."""
    fleet.ledger.hanging = frozenset({"claim"})
    worker = fleet.start()
    await fleet.until(lambda: fleet.ledger.count("claim"))
    _, took = await drain(fleet, worker, 30.0)

    assert took <= 2.1
    fleet.ledger.hanging = frozenset()


async def test_the_lease_is_renewed_during_the_drain(fleet: Fleet) -> None:
    """The budget may be longer than the lease."""
    worker = fleet.start(lease=5.0)
    job_id = await fleet.accept("sleep", "25.0")
    await fleet.until(lambda: fleet.running)
    fleet.start("other", lease=5.0, sweep_interval=1.0)
    left, _ = await drain(fleet, worker, 30.0)
    job = await fleet.job(job_id)

    assert left.finished == 1
    assert (job.state, job.crashes) == (JobState.COMPLETED, 0)


@pytest.mark.parametrize("how", ["unavailable", "hanging"])
@pytest.mark.parametrize("what", ["nothing", "a job", "an outcome", "one that ignores"])
@pytest.mark.parametrize("budget", [0.0, 1.0, 30.0])
async def test_an_unavailable_ledger_does_not_exceed_the_budget(
    fleet: Fleet, how: str, what: str, budget: float
) -> None:
    """Even with a short budget."""
    released = asyncio.Event()

    async def ignore(_: object) -> None:
        await swallow_cancellation(released)

    fleet.declare("ignore", ignore)
    worker = fleet.start()
    if what != "nothing":
        task, payload = {
            "a job": ("sleep", "1000.0"),
            "an outcome": ("sleep", "0.5"),
            "one that ignores": ("ignore", "0"),
        }[what]
        await fleet.accept(task, payload)
    await fleet.until(lambda: fleet.ledger.count("claim") and (worker.active or what == "nothing"))
    setattr(fleet.ledger, how, EVERYTHING)
    await asyncio.sleep(1.0)
    left, took = await drain(fleet, worker, budget)

    assert took <= budget + 0.15
    assert left.unrecorded == (what != "nothing")
    assert worker.state is WorkerState.STOPPED
    released.set()
    fleet.ledger.hanging = frozenset()


async def test_the_stage_fails_if_jobs_could_not_be_handed_back(fleet: Fleet) -> None:
    """They run again when the lease ends."""
    worker = fleet.start(lease=20.0)
    job_id = await fleet.accept("sleep", "60.0")
    await fleet.until(lambda: fleet.running)
    fleet.ledger.unavailable = EVERYTHING
    with pytest.raises(LedgerUnavailableError, match="1 jobs could not be handed back"):
        await drain_jobs(worker, 10.0)
    fleet.ledger.unavailable = frozenset()
    fleet.start("other", lease=20.0)
    await fleet.until(lambda: fleet.running)

    assert (await fleet.job(job_id)).crashes == 1


async def test_outcomes_are_recorded_when_the_ledger_returns_during_the_drain(fleet: Fleet) -> None:
    """They are kept until the end."""
    worker = fleet.start()
    job_id = await fleet.accept("sleep", "1.0")
    await fleet.until(lambda: fleet.running)
    fleet.ledger.unavailable = EVERYTHING
    draining = asyncio.create_task(worker.drain(30.0))
    await asyncio.sleep(20.0)
    fleet.ledger.unavailable = frozenset()
    left = await draining

    assert left == DrainReport(finished=1, handed_back=0, ignoring=0, unrecorded=0)
    assert (await fleet.job(job_id)).state is JobState.COMPLETED


LOCKED = "their rows are locked, or may not be changed"


class LockedLedger(FaultyLedger):
    """Says that other sessions lock jobs, however often the worker deregisters."""

    def __init__(self, fleet: Fleet, left: int) -> None:
        super().__init__(fleet.memory_ledger)
        self._left = [f"job {number}" for number in range(left)]
        self._returned: Mapping[str, Sequence[str]] = {"default": ["claimed late"]}
        fleet.ledger = self

    async def deregister(self, worker: str) -> Mapping[str, Sequence[str]]:
        """Hand back a job of a late claim, and nothing else."""
        await self._step("deregister", worker)
        returned, self._returned = self._returned, {}
        raise PartlyDoneError(LOCKED, self._left, returned=returned)


@pytest.mark.parametrize("left", [1, 3])
async def test_the_jobs_that_are_left_are_those_of_the_last_answer(fleet: Fleet, left: int) -> None:
    """Whichever jobs the worker ran: others may be those of a late claim."""
    ledger = LockedLedger(fleet, left)
    ledger.hanging = frozenset({"settle"})
    worker = fleet.start()
    for _ in range(2):
        await fleet.accept()
    await fleet.until(lambda: ledger.count("settle") and worker.active == 2)
    report, _ = await drain(fleet, worker, 10.0)
    ledger.hanging = frozenset()

    assert (report.handed_back, report.unrecorded) == (1, left)


async def test_a_lock_is_no_outage(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    """The log has the reason of the ledger: once as it begins, and at the end of the budget."""
    caplog.set_level(logging.INFO)
    ledger = LockedLedger(fleet, 2)
    worker = fleet.start()
    await fleet.until(lambda: ledger.count("claim"))
    await drain(fleet, worker, 10.0)

    assert ledger.count("deregister") > 2
    assert caplog.messages[-3:] == [
        f"Job ledger did a part of a step: 2 jobs are left: {LOCKED}",
        f"Job worker could not deregister: 2 jobs are left: {LOCKED}",
        "Job worker drained",
    ]
    assert "Job ledger unavailable" not in caplog.messages


async def test_a_lock_after_an_outage_is_the_end_of_the_outage(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """The ledger has answered."""
    caplog.set_level(logging.INFO)
    ledger = LockedLedger(fleet, 2)
    worker = fleet.start()
    await fleet.until(lambda: ledger.count("claim"))
    ledger.unavailable = EVERYTHING
    draining = asyncio.create_task(worker.drain(10.0))
    await fleet.until(lambda: ledger.count("deregister") == 2)
    ledger.unavailable = frozenset()
    await draining

    assert [text for text in caplog.messages if text.startswith("Job ledger")] == [
        "Job ledger unavailable",
        "Job ledger available again",
        f"Job ledger did a part of a step: 2 jobs are left: {LOCKED}",
    ]


async def test_an_error_while_deregistering_does_not_stop_the_drain(fleet: Fleet) -> None:
    """The worker ends stopped."""

    class Buggy(FaultyLedger):
        async def deregister(self, worker: str) -> Mapping[str, Sequence[str]]:
            raise KeyError(worker)

    fleet.ledger = Buggy(fleet.memory_ledger)
    worker = fleet.start()
    await fleet.until(lambda: fleet.ledger.count("claim"))
    left, took = await drain(fleet, worker, 10.0)

    assert took < 0.1
    assert left.unrecorded == 0
    assert worker.state is WorkerState.STOPPED


async def test_a_worker_that_never_had_a_lease_drains_at_once(fleet: Fleet) -> None:
    """The ledger refuses it from the start, as a database does whose user lacks a right."""
    fleet.ledger.unavailable = EVERYTHING
    worker = fleet.start()
    await fleet.until(lambda: fleet.ledger.count("register"))
    left, took = await drain(fleet, worker, 30.0)

    assert took < 1.0
    assert left == DrainReport(finished=0, handed_back=0, ignoring=0, unrecorded=0)


async def test_a_worker_can_drain_before_it_starts(fleet: Fleet) -> None:
    """It does not call the ledger."""
    worker = fleet.worker()
    await drain_jobs(worker, 10.0)
    worker.start()
    await drain_jobs(worker, 10.0)

    assert worker.state is WorkerState.STOPPED
    assert fleet.ledger.calls == []


async def test_concurrent_drains_share_one_run(fleet: Fleet) -> None:
    """Both callers wait for the same end."""
    worker = fleet.start()
    await fleet.accept("sleep", "5.0")
    await fleet.until(lambda: fleet.running)
    began = fleet.clock.monotonic()
    await asyncio.gather(drain_jobs(worker, 30.0), drain_jobs(worker, 30.0))
    await drain_jobs(worker, 30.0)

    assert fleet.clock.monotonic() - began == pytest.approx(5.0, abs=0.1)
    assert fleet.ledger.count("deregister") == 1


async def test_cancelling_a_caller_does_not_cancel_the_drain(fleet: Fleet) -> None:
    """The drain continues within its own budget."""
    worker = fleet.start()
    await fleet.accept("sleep", "5.0")
    await fleet.until(lambda: fleet.running)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0):
            await worker.drain(30.0)
    await fleet.until(lambda: worker.state is WorkerState.STOPPED)

    assert fleet.done == [5.0]


async def test_the_drain_report_is_one_log_line(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """With its four counts."""
    caplog.set_level(logging.INFO)
    worker = fleet.start()
    await fleet.accept("sleep", "60.0")
    await fleet.until(lambda: fleet.running)
    await worker.drain(5.0)

    (record,) = caplog.records
    assert (record.getMessage(), record.__dict__["handedBack"]) == ("Job worker drained", 1)


# -- a ledger that ends with the process ---------------------------------------------------------

IN_MEMORY: dict[str, Any] = {"durable": False, "queues": {"default": 2}}


async def test_in_memory_waiting_jobs_run_before_the_end(fleet: Fleet) -> None:
    """No other process could run them."""
    worker = fleet.start(**IN_MEMORY)
    ids = [await fleet.accept("sleep", "1.0") for _ in range(10)]
    await fleet.until(lambda: fleet.running == 2)
    left, took = await drain(fleet, worker, 30.0)

    assert took == pytest.approx(5.0, abs=0.2)
    assert left.finished == 10
    assert [(await fleet.job(job_id)).state for job_id in ids] == [JobState.COMPLETED] * 10


async def test_in_memory_retries_due_within_the_budget_run(fleet: Fleet) -> None:
    """So do jobs that are accepted during the drain."""
    runs: list[str] = []

    async def fail_once(payload: str) -> None:
        runs.append(payload)
        if runs.count(payload) == 1:
            await fleet.accept("note", '"meanwhile"')
            raise RuntimeError("again")

    fleet.declare("fail_once", fail_once)
    worker = fleet.start(**IN_MEMORY)
    await fleet.accept("fail_once", '"a"')
    left, took = await drain(fleet, worker, 30.0)

    assert runs == ["a", "a"]
    assert fleet.done == ["meanwhile"]
    assert left.finished == 3
    assert took == pytest.approx(1.0, abs=0.2)


async def test_in_memory_unfinished_jobs_raise_work_lost(fleet: Fleet) -> None:
    """Running and due jobs count, scheduled jobs do not."""
    worker = fleet.start(**IN_MEMORY)
    for _ in range(5):
        await fleet.accept("sleep", "60.0")
    await fleet.accept(run_at=fleet.clock.now().replace(year=2030))
    await fleet.until(lambda: fleet.running == 2)
    began = fleet.clock.monotonic()
    with pytest.raises(WorkLostError, match="5 in-memory jobs were due and did not finish"):
        await drain_jobs(worker, 10.0)

    assert fleet.clock.monotonic() - began <= 10.0


async def test_in_memory_a_scheduled_job_is_not_waited_for(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """The drain succeeds, and a warning counts the scheduled jobs."""
    worker = fleet.start(**IN_MEMORY)
    await fleet.accept(run_at=fleet.clock.now().replace(year=2030))
    began = fleet.clock.monotonic()
    await worker.drain(30.0)

    assert fleet.clock.monotonic() - began < 1.0
    (warning,) = [r for r in caplog.records if r.message.startswith("Scheduled jobs in memory")]
    assert vars(warning)["scheduled"] == 1


async def test_in_memory_a_worker_that_never_started_reports_lost_jobs(fleet: Fleet) -> None:
    """At each call."""
    worker = fleet.worker(**IN_MEMORY)
    await fleet.accept()
    for _ in range(2):
        with pytest.raises(WorkLostError):
            await drain_jobs(worker, 1.0)


# -- random faults --------------------------------------------------------------------------------


def _acting(released: asyncio.Event) -> Callable[..., Awaitable[str]]:
    async def act(payload: tuple[str, float], *_: object) -> str:
        what, seconds = payload
        try:
            if what == "ignore":
                await swallow_cancellation(released)
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            if what == "raise":
                raise RuntimeError("interrupted") from None
            if what != "finish":
                raise
            await asyncio.sleep(0.1)
        return what

    return act


@settings(max_examples=settings().max_examples // 3)
@given(
    jobs=st.lists(
        st.tuples(
            st.sampled_from(["sleep", "ignore", "raise", "finish", "write"]),
            st.floats(0.0, 20.0),
        ),
        max_size=8,
    ),
    fault=st.sampled_from(["no", "unavailable", "hanging", "slow"]),
    wait=st.floats(0.0, 5.0),
    budget=st.floats(0.0, 12.0),
    workers=st.sampled_from([("draining",), ("draining", "other")]),
)
def test_a_drain_loses_no_job_and_keeps_its_budget(
    jobs: list[tuple[str, float]], fault: str, wait: float, budget: float, workers: tuple[str, ...]
) -> None:
    """With random tasks and ledger faults."""

    async def main() -> None:
        fleet = Fleet()
        released = asyncio.Event()
        act = _acting(released)
        fleet.declare("act", act, payload_type=tuple[str, float])
        fleet.declare("write", act, payload_type=tuple[str, float], transactional=True)
        started = [fleet.start(name, queues={"default": 4}, lease=10.0) for name in workers]
        ids = [
            await fleet.accept("write" if what == "write" else "act", f'["{what}", {seconds}]')
            for what, seconds in jobs
        ]
        await asyncio.sleep(wait)
        if fault == "slow":
            fleet.ledger.seconds = dict.fromkeys(EVERYTHING, 1.0)
        elif fault != "no":
            setattr(fleet.ledger, fault, EVERYTHING)
        began = fleet.clock.monotonic()
        await started[0].drain(budget)
        assert fleet.clock.monotonic() - began <= budget + 0.15
        fleet.ledger.unavailable = fleet.ledger.hanging = frozenset()
        fleet.ledger.seconds = {}
        released.set()
        fleet.start("next", lease=10.0)
        await fleet.final(*ids, within=200.0)
        for job_id in ids:
            job = await fleet.job(job_id)
            assert (job.state, job.attempts) == (JobState.COMPLETED, 0)
        await fleet.stop()

    run_in_virtual_time(main())
