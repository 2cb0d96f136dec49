"""How a worker leaves, whatever runs and whatever is away."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.doubles import swallow_cancellation
from tests.unit.jobs.fleet import Fleet, ShakyLedger
from tests.virtual_time import run_in_virtual_time

from viralfx.domain.errors import WorkLostError
from viralfx.domain.jobs.job import JobState, LedgerUnavailableError
from viralfx.domain.jobs.leaving import Left
from viralfx.domain.jobs.worker import DrainJobs, JobWorker, WorkerState

EVERYTHING = ShakyLedger.EVERYTHING


async def drain(fleet: Fleet, worker: JobWorker, budget: float) -> tuple[Left, float]:
    """Drain a worker; return how it left and the seconds it took."""
    began = fleet.clock.monotonic()
    left = await worker.drain(budget)
    return left, fleet.clock.monotonic() - began


async def test_jobs_that_end_within_the_budget_are_finished(fleet: Fleet) -> None:
    """And nothing is waited for after that."""
    worker = fleet.start()
    ids = [await fleet.accept("sleep", str(seconds)) for seconds in (1.0, 2.0, 5.0)]
    await fleet.until(lambda: fleet.running == 3)
    left, took = await drain(fleet, worker, 30.0)

    assert took == pytest.approx(5.0, abs=0.1)
    assert left == Left(finished=3, handed_back=0, ignoring=0, unrecorded=0)
    assert [(await fleet.job(job_id)).state for job_id in ids] == [JobState.COMPLETED] * 3


async def test_an_idle_worker_leaves_at_once(fleet: Fleet) -> None:
    """Its queues have no consumer from then on."""
    worker = fleet.start()
    await fleet.until(lambda: fleet.ledger.count("claim"))
    assert (await fleet.kept.counts())["default"].consumers == 1
    left, took = await drain(fleet, worker, 30.0)

    assert took < 0.01
    assert left == Left(finished=0, handed_back=0, ignoring=0, unrecorded=0)
    assert "default" not in await fleet.kept.counts()


async def test_nothing_is_claimed_once_leaving_has_begun(fleet: Fleet) -> None:
    """Neither what waits, nor what a bell tells of, nor what comes."""
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
    assert not fleet.bell.hears("default")


async def test_the_rest_is_handed_back_without_cost_and_runs_elsewhere(fleet: Fleet) -> None:
    """Soon: others are told."""
    worker = fleet.start()
    job_id = await fleet.accept("sleep", "60.0")
    await fleet.until(lambda: fleet.running)
    fleet.start("other", look_interval=1000.0)
    left, took = await drain(fleet, worker, 10.0)
    job = await fleet.job(job_id)

    assert took <= 10.0
    assert left == Left(finished=0, handed_back=1, ignoring=0, unrecorded=0)
    assert (job.state, job.worker) == (JobState.ACTIVE, "other")
    assert (job.attempts, job.crashes, job.claims, job.error) == (0, 0, 2, None)
    assert fleet.cancelled == [60.0]


async def test_a_job_may_finish_while_it_is_called_back(fleet: Fleet) -> None:
    """What it came to counts."""

    async def tidy(_: object) -> str:
        try:
            await asyncio.sleep(60.0)
        except asyncio.CancelledError:
            await asyncio.sleep(0.2)
            return "saved"
        return "done"

    fleet.declare("tidy", tidy)
    worker = fleet.start()
    job_id = await fleet.accept("tidy")
    await fleet.until(lambda: worker.active)
    left, _ = await drain(fleet, worker, 10.0)

    assert left.finished == 1
    assert (await fleet.job(job_id)).result == b'"saved"'


async def test_what_a_job_raises_because_it_is_called_back_costs_nothing(fleet: Fleet) -> None:
    """It did not fail."""

    async def moan(_: object) -> None:
        try:
            await asyncio.sleep(60.0)
        except asyncio.CancelledError:
            raise RuntimeError("interrupted") from None

    fleet.declare("moan", moan)
    worker = fleet.start()
    job_id = await fleet.accept("moan")
    await fleet.until(lambda: worker.active)
    left, _ = await drain(fleet, worker, 10.0)
    job = await fleet.job(job_id)

    assert left.handed_back == 1
    assert (job.state, job.attempts, job.error) == (JobState.WAITING, 0, None)


@pytest.mark.parametrize("task", ["ignore", "ignore in a transaction"])
async def test_a_job_that_ignores_its_cancellation_is_handed_back_in_time(
    fleet: Fleet, task: str
) -> None:
    """It is left behind, and nothing that it comes to is recorded."""
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
    assert left == Left(finished=0, handed_back=1, ignoring=1, unrecorded=0)
    assert (job.state, job.attempts, job.crashes) == (JobState.WAITING, 0, 0)
    assert await fleet.job(job_id) == job


async def test_a_claim_under_way_gives_nothing_to_who_leaves(fleet: Fleet) -> None:
    """What it brings is handed back at once, and never begun."""
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


async def test_a_claim_that_hangs_holds_nobody(fleet: Fleet) -> None:
    """What it may have brought is given back when the worker leaves the ledger."""
    fleet.ledger.hanging = frozenset({"claim"})
    worker = fleet.start()
    await fleet.until(lambda: fleet.ledger.count("claim"))
    _, took = await drain(fleet, worker, 30.0)

    assert took <= 2.1
    fleet.ledger.hanging = frozenset()


async def test_the_lease_is_renewed_until_the_end(fleet: Fleet) -> None:
    """A budget may be longer than the lease."""
    worker = fleet.start(lease=5.0)
    job_id = await fleet.accept("sleep", "25.0")
    await fleet.until(lambda: fleet.running)
    fleet.start("other", lease=5.0, sweep_interval=1.0)
    left, _ = await drain(fleet, worker, 30.0)
    job = await fleet.job(job_id)

    assert left.finished == 1
    assert (job.state, job.crashes) == (JobState.COMPLETED, 0)


@pytest.mark.parametrize("how", ["away", "hanging"])
@pytest.mark.parametrize("what", ["nothing", "a job", "an outcome", "one that ignores"])
@pytest.mark.parametrize("budget", [0.0, 1.0, 30.0])
async def test_a_dead_ledger_does_not_hold_the_end(
    fleet: Fleet, how: str, what: str, budget: float
) -> None:
    """Whatever is under way, and however short the budget."""
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


async def test_the_stage_says_what_could_not_be_handed_back(fleet: Fleet) -> None:
    """It failed, then; the jobs run again when the lease is over."""
    worker = fleet.start(lease=20.0)
    job_id = await fleet.accept("sleep", "60.0")
    await fleet.until(lambda: fleet.running)
    fleet.ledger.away = EVERYTHING
    with pytest.raises(LedgerUnavailableError, match="1 jobs could not be handed back"):
        await DrainJobs(worker).run(10.0)
    fleet.ledger.away = frozenset()
    fleet.start("other", lease=20.0)
    await fleet.until(lambda: fleet.running)

    assert (await fleet.job(job_id)).crashes == 1


async def test_a_ledger_that_comes_back_while_leaving_takes_everything(fleet: Fleet) -> None:
    """Outcomes are kept until the end."""
    worker = fleet.start()
    job_id = await fleet.accept("sleep", "1.0")
    await fleet.until(lambda: fleet.running)
    fleet.ledger.away = EVERYTHING
    draining = asyncio.create_task(worker.drain(30.0))
    await asyncio.sleep(20.0)
    fleet.ledger.away = frozenset()
    left = await draining

    assert left == Left(finished=1, handed_back=0, ignoring=0, unrecorded=0)
    assert (await fleet.job(job_id)).state is JobState.COMPLETED


async def test_a_fault_in_leaving_the_ledger_ends_nothing_else(fleet: Fleet) -> None:
    """The worker has stopped all the same."""

    class Buggy(ShakyLedger):
        async def leave(self, worker: str) -> Mapping[str, Sequence[str]]:
            raise KeyError(worker)

    fleet.ledger = Buggy(fleet.kept)
    worker = fleet.start()
    await fleet.until(lambda: fleet.ledger.count("claim"))
    left, took = await drain(fleet, worker, 10.0)

    assert took < 0.1
    assert left.unrecorded == 0
    assert worker.state is WorkerState.STOPPED


async def test_leaving_before_the_start_is_leaving(fleet: Fleet) -> None:
    """The ledger is not asked for anything."""
    worker = fleet.worker()
    stage = DrainJobs(worker)
    await stage.run(10.0)
    worker.start()
    await stage.run(10.0)

    assert worker.state is WorkerState.STOPPED
    assert fleet.ledger.calls == []


async def test_leaving_twice_is_leaving_once(fleet: Fleet) -> None:
    """Both callers wait for the same end."""
    worker = fleet.start()
    await fleet.accept("sleep", "5.0")
    await fleet.until(lambda: fleet.running)
    stage = DrainJobs(worker)
    began = fleet.clock.monotonic()
    await asyncio.gather(stage.run(30.0), stage.run(30.0))
    await stage.run(30.0)

    assert fleet.clock.monotonic() - began == pytest.approx(5.0, abs=0.1)
    assert fleet.ledger.count("leave") == 1


async def test_who_waits_for_the_end_may_be_cut(fleet: Fleet) -> None:
    """The end comes all the same, within its own budget."""
    worker = fleet.start()
    await fleet.accept("sleep", "5.0")
    await fleet.until(lambda: fleet.running)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0):
            await worker.drain(30.0)
    await fleet.until(lambda: worker.state is WorkerState.STOPPED)

    assert fleet.done == [5.0]


async def test_how_a_worker_left_is_logged(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    """In one line."""
    caplog.set_level(logging.INFO)
    worker = fleet.start()
    await fleet.accept("sleep", "60.0")
    await fleet.until(lambda: fleet.running)
    await worker.drain(5.0)

    (record,) = caplog.records
    assert (record.getMessage(), record.__dict__["handedBack"]) == ("Job worker left", 1)


# -- a ledger that ends with the process ---------------------------------------------------------

IN_MEMORY: dict[str, Any] = {"durable": False, "queues": {"default": 2}}


async def test_in_memory_what_waits_is_run_before_the_end(fleet: Fleet) -> None:
    """There is nobody to hand it back to."""
    worker = fleet.start(**IN_MEMORY)
    ids = [await fleet.accept("sleep", "1.0") for _ in range(10)]
    await fleet.until(lambda: fleet.running == 2)
    left, took = await drain(fleet, worker, 30.0)

    assert took == pytest.approx(5.0, abs=0.2)
    assert left.finished == 10
    assert [(await fleet.job(job_id)).state for job_id in ids] == [JobState.COMPLETED] * 10


async def test_in_memory_retries_that_get_due_in_time_are_run(fleet: Fleet) -> None:
    """And a job that comes while leaving."""
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


async def test_in_memory_what_is_left_is_lost_and_said(fleet: Fleet) -> None:
    """Those that run, those that wait, and those that are not due."""
    worker = fleet.start(**IN_MEMORY)
    for _ in range(5):
        await fleet.accept("sleep", "60.0")
    await fleet.accept(run_at=fleet.clock.now().replace(year=2030))
    await fleet.until(lambda: fleet.running == 2)
    began = fleet.clock.monotonic()
    with pytest.raises(WorkLostError, match="6 in-memory jobs did not finish within 10 s"):
        await DrainJobs(worker).run(10.0)

    assert fleet.clock.monotonic() - began <= 10.0


async def test_in_memory_a_job_for_another_day_is_not_waited_for(fleet: Fleet) -> None:
    """It is lost all the same."""
    worker = fleet.start(**IN_MEMORY)
    await fleet.accept(run_at=fleet.clock.now().replace(year=2030))
    began = fleet.clock.monotonic()
    with pytest.raises(WorkLostError, match="1 in-memory jobs"):
        await worker.drain(30.0)

    assert fleet.clock.monotonic() - began < 1.0


async def test_in_memory_without_a_worker_what_waits_is_lost(fleet: Fleet) -> None:
    """A worker that never began says so, too, as often as it is asked."""
    worker = fleet.worker(**IN_MEMORY)
    await fleet.accept()
    for _ in range(2):
        with pytest.raises(WorkLostError):
            await DrainJobs(worker).run(1.0)


# -- whatever happens ----------------------------------------------------------------------------


def _acting(released: asyncio.Event) -> Callable[..., Awaitable[str]]:
    async def act(payload: tuple[str, float], *_: object) -> str:
        what, seconds = payload
        try:
            if what == "ignore":
                await swallow_cancellation(released)
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            if what == "moan":
                raise RuntimeError("interrupted") from None
            if what != "tidy":
                raise
            await asyncio.sleep(0.1)
        return what

    return act


@settings(max_examples=settings().max_examples // 3)
@given(
    jobs=st.lists(
        st.tuples(
            st.sampled_from(["sleep", "ignore", "moan", "tidy", "write"]),
            st.floats(0.0, 20.0),
        ),
        max_size=8,
    ),
    away=st.sampled_from(["no", "away", "hanging", "slow"]),
    wait=st.floats(0.0, 5.0),
    budget=st.floats(0.0, 12.0),
    workers=st.sampled_from([("leaving",), ("leaving", "other")]),
)
def test_no_job_is_lost_by_leaving_and_the_budget_is_kept(
    jobs: list[tuple[str, float]], away: str, wait: float, budget: float, workers: tuple[str, ...]
) -> None:
    """Whatever the tasks do and whatever the ledger does."""

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
        if away == "slow":
            fleet.ledger.seconds = dict.fromkeys(EVERYTHING, 1.0)
        elif away != "no":
            setattr(fleet.ledger, away, EVERYTHING)
        began = fleet.clock.monotonic()
        await started[0].drain(budget)
        assert fleet.clock.monotonic() - began <= budget + 0.15
        fleet.ledger.away = fleet.ledger.hanging = frozenset()
        fleet.ledger.seconds = {}
        released.set()
        fleet.start("next", lease=10.0)
        await fleet.final(*ids, within=200.0)
        for job_id in ids:
            job = await fleet.job(job_id)
            assert (job.state, job.attempts) == (JobState.COMPLETED, 0)
        await fleet.stop()

    run_in_virtual_time(main())
