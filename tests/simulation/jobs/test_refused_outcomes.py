"""Outcomes that the ledger refuses or never finishes: each is the problem of its own job alone."""

import asyncio
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.jobs.fleet import FaultyLedger, Fleet
from tests.virtual_time import run_in_virtual_time

from viralfx.core.errors import LedgerLimitError, UnstorableError
from viralfx.jobs.ledger import PartlyDoneError
from viralfx.jobs.model import Job, JobState, Settlement
from viralfx.jobs.tasks import JobContext

PATIENCE = 8.0
"""Seconds after which a call of the ledger ends."""
LOCK_SECONDS = 0.2
"""Seconds for which a call waits for a lock."""


class FussyLedger(FaultyLedger):
    """Refuses, or never finishes, calls with certain settlements; records nothing of them."""

    def __init__(self, fleet: Fleet) -> None:
        super().__init__(fleet.memory_ledger)
        self.refuses: Callable[[Settlement], bool] = lambda _: False
        self.blocks: Callable[[Settlement], bool] = lambda _: False
        self.locks: Callable[[Settlement], bool] = lambda _: False
        """The jobs that another session has locked."""
        self.batches: list[int] = []
        fleet.ledger = self

    async def settle(self, settlements: Sequence[Settlement]) -> frozenset[str]:
        """Settle all or nothing."""
        self.batches.append(len(settlements))
        if any(map(self.blocks, settlements)):
            await asyncio.sleep(PATIENCE)
            raise LedgerLimitError("the database does not answer")
        if any(map(self.refuses, settlements)):
            raise UnstorableError("stack depth limit exceeded (SQLSTATE 54001)", "54001")
        locked = {each.claim.id for each in settlements if self.locks(each)}
        if locked:
            await asyncio.sleep(LOCK_SECONDS)
        others = [each for each in settlements if each.claim.id not in locked]
        settled = frozenset(await super().settle(others)) if others else frozenset()
        if locked:
            raise PartlyDoneError("their rows are locked", locked, settled=settled)
        return settled


def has(text: bytes) -> Callable[[Settlement], bool]:
    """Return a predicate for settlements of jobs with this payload."""
    return lambda settlement: text in settlement.claim.payload


def with_result(text: bytes) -> Callable[[Settlement], bool]:
    """Return a predicate for completed jobs with this text in their result."""
    return lambda settlement: text in (settlement.result or b"")


async def echo(value: object) -> object:
    """Return the payload."""
    return value


@pytest.fixture
def ledger(fleet: Fleet) -> FussyLedger:
    """Return the ledger of the fleet."""
    fleet.declare("echo", echo)
    return FussyLedger(fleet)


async def accepted(fleet: Fleet, *texts: str, queue: str = "default") -> list[str]:
    """Accept and announce one job for each text."""
    return [await fleet.submit("echo", f'"{text}"', queue=queue) for text in texts]


def outcome(job: Job) -> tuple[JobState, str | None]:
    """Return state and error code."""
    return job.state, None if job.error is None else job.error.code


async def test_a_refused_result_fails_its_job_with_its_reason(
    fleet: Fleet, ledger: FussyLedger, caplog: pytest.LogCaptureFixture
) -> None:
    """The log line has job and SQLSTATE; its neighbours complete at once."""
    ledger.refuses = with_result(b"bad")
    ids = await accepted(fleet, *"abc", "bad", *"defg")
    fleet.start(queues={"default": 20})

    assert await fleet.final(*ids) < 1.0
    jobs = [await fleet.job(job_id) for job_id in ids]
    assert [outcome(job) for job in jobs] == [
        *[(JobState.COMPLETED, None)] * 3,
        (JobState.FAILED, "result"),
        *[(JobState.COMPLETED, None)] * 4,
    ]
    assert jobs[3].error is not None
    assert jobs[3].error.message == (
        "the result of 5 bytes cannot be stored: stack depth limit exceeded (SQLSTATE 54001)"
    )
    assert (jobs[3].attempts, jobs[3].claims) == (1, 1)
    (line,) = [each for each in caplog.records if "refused" in each.getMessage()]
    assert (line.__dict__["job"], line.__dict__["code"]) == (ids[3], "54001")


async def test_a_refused_report_costs_no_result(fleet: Fleet, ledger: FussyLedger) -> None:
    """The job completes without its last report, and so does its neighbour."""

    async def report(text: object, context: JobContext) -> object:
        context.report(message=str(text))
        return text

    fleet.declare("report", report, wants_context=True)
    ledger.refuses = lambda settlement: b"bad" in (settlement.progress or b"")
    ids = [await fleet.submit("report", f'"{text}"') for text in ("good", "bad")]
    fleet.start()

    assert await fleet.final(*ids) < 1.0
    good, bad = [await fleet.job(job_id) for job_id in ids]
    assert outcome(good) == outcome(bad) == (JobState.COMPLETED, None)
    assert good.progress == b'{"current": null, "total": null, "message": "good"}'
    assert (bad.progress, bad.result) == (None, b'"bad"')


async def test_an_outcome_that_is_never_accepted_blocks_nothing(
    fleet: Fleet, ledger: FussyLedger, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried again with growing pauses, reported, and recorded as it is in the end."""
    ledger.refuses = has(b"bad")
    began = fleet.clock.monotonic()
    (bad,) = await accepted(fleet, "bad")
    worker = fleet.start(queues={"default": 2, "other": 2}, lease=30.0)
    for _ in range(20):
        ids = await accepted(fleet, *"abcd")
        ids += await accepted(fleet, *"ef", queue="other")
        assert await fleet.final(*ids) < 1.0
        await asyncio.sleep(5.0)
    job = await fleet.job(bad)
    tries, seconds = ledger.batches.count(1), fleet.clock.monotonic() - began
    reports = [worker.report_unrecorded() for _ in range(3)]

    assert outcome(job) == (JobState.ACTIVE, None)
    assert tries < seconds
    assert reports == [{"default": 1}] * 3
    assert worker.unrecorded == 1
    lines = [each.__dict__ for each in caplog.records if "longer than" in each.getMessage()]
    assert [(line["jobs"], line["count"]) for line in lines] == [([bad], 1)]
    ledger.refuses = has(b"none")
    assert await fleet.final(bad) < 6.0
    assert outcome(await fleet.job(bad)) == (JobState.COMPLETED, None)
    assert (worker.unrecorded, worker.report_unrecorded()) == (0, {})


async def test_a_call_that_never_ends_delays_its_neighbours_once(
    fleet: Fleet, ledger: FussyLedger
) -> None:
    """A lock on one row: other queues do not notice, and no result is lost to it."""
    ledger.blocks = has(b"locked")
    (locked,) = await accepted(fleet, "locked")
    neighbours = await accepted(fleet, *"ab")
    fleet.start(queues={"default": 10, "other": 10})
    others = await accepted(fleet, *"cd", queue="other")
    assert await fleet.final(*others) < 0.5
    await asyncio.sleep(2.0)
    later = await accepted(fleet, *"ef")
    assert await fleet.final(*later) < 1.5
    assert await fleet.final(*neighbours) < 3 * PATIENCE
    await asyncio.sleep(300.0)
    assert await fleet.final(*await accepted(fleet, *"gh")) < 0.5
    assert outcome(await fleet.job(locked)) == (JobState.ACTIVE, None)
    ledger.blocks = has(b"none")

    assert await fleet.final(locked) < PATIENCE + 6.0
    assert outcome(await fleet.job(locked)) == (JobState.COMPLETED, None)
    assert (await fleet.job(locked)).claims == 1


async def test_many_locked_jobs_do_not_hold_up_a_refused_outcome(
    fleet: Fleet, ledger: FussyLedger
) -> None:
    """Each of them is tried alone, again and again."""
    ledger.locks, ledger.refuses = has(b"locked"), with_result(b"bad")
    fleet.start(queues={"default": 50}, lease=60.0)
    await accepted(fleet, *[f"locked {number}" for number in range(40)])
    await asyncio.sleep(2.0)
    (bad,) = await accepted(fleet, "bad")

    assert await fleet.final(bad) < 1.0
    assert outcome(await fleet.job(bad)) == (JobState.FAILED, "result")


async def test_a_large_result_that_takes_too_long_is_given_up(
    fleet: Fleet, ledger: FussyLedger
) -> None:
    """After some tries alone; a smaller one is not the reason."""

    async def large(_: object) -> str:
        return "x" * 100_000

    fleet.declare("large", large)
    ledger.blocks = with_result(b"xxx")
    fleet.start()
    (small,) = await accepted(fleet, "xxx")
    job_id = await fleet.accept("large")

    assert await fleet.final(job_id, within=60.0) > 2 * PATIENCE
    job = await fleet.job(job_id)
    assert outcome(job) == (JobState.FAILED, "result")
    assert job.error is not None
    assert job.error.message == (
        "the result of 100002 bytes cannot be stored: the database does not answer"
    )
    assert (await fleet.job(small)).state is JobState.ACTIVE


async def test_a_large_result_is_not_given_up_in_an_outage(
    fleet: Fleet, ledger: FussyLedger
) -> None:
    """Its calls are not answered, but neither is any other."""
    sent: list[JobState] = []

    async def large(_: object) -> str:
        return "x" * 100_000

    def blocks(settlement: Settlement) -> bool:
        sent.append(settlement.state)
        return True

    fleet.declare("large", large)
    ledger.blocks = blocks
    fleet.start(lease=60.0)
    job_id = await fleet.accept("large")
    await fleet.until(lambda: len(sent) == 2)
    ledger.unavailable = FaultyLedger.EVERYTHING
    await asyncio.sleep(300.0)
    ledger.unavailable, ledger.blocks = frozenset(), has(b"none")

    assert await fleet.final(job_id) < PATIENCE + 6.0
    assert outcome(await fleet.job(job_id)) == (JobState.COMPLETED, None)
    assert set(sent) == {JobState.COMPLETED}


async def test_a_batch_waits_for_the_end_of_an_outage_whole(
    fleet: Fleet, ledger: FussyLedger
) -> None:
    """No part of it is tried by itself while the ledger answers nothing."""
    fleet.declare("wait", _wait_a_second)
    ids = [await fleet.accept("wait") for _ in range(10)]
    fleet.start(queues={"default": 10}, lease=60.0)
    await fleet.until(lambda: fleet.ledger.count("claim") > 0)
    await asyncio.sleep(0.5)
    ledger.unavailable = FaultyLedger.EVERYTHING
    await asyncio.sleep(30.0)
    ledger.unavailable = frozenset()

    assert await fleet.final(*ids) < 3.0
    assert set(ledger.batches) == {10}


@pytest.mark.parametrize("seconds", [0.0, PATIENCE])
async def test_the_first_moment_of_an_outage_is_no_refusal(
    fleet: Fleet, ledger: FussyLedger, caplog: pytest.LogCaptureFixture, seconds: float
) -> None:
    """The ledger answers another call after the outcome was sent, and then no more."""
    ledger.seconds = {"settle": 0.5}
    job_id = (await accepted(fleet, "a"))[0]
    fleet.start(queues={"default": 1, "other": 1}, poll_interval=0.1, lease=60.0)
    await fleet.until(lambda: len(ledger.batches) == 1)
    claims = ledger.count("claim") + ledger.count("due")
    await fleet.until(lambda: ledger.count("claim") + ledger.count("due") > claims)
    ledger.seconds = dict.fromkeys(FaultyLedger.EVERYTHING, seconds)
    ledger.unavailable = FaultyLedger.EVERYTHING
    await asyncio.sleep(30.0)
    ledger.unavailable, ledger.seconds = frozenset(), {}

    assert await fleet.final(job_id) < 12.0
    assert "Outcome refused by the ledger" not in [each.getMessage() for each in caplog.records]


async def _wait_a_second(_: object) -> None:
    await asyncio.sleep(1.0)


@settings(max_examples=30)
@given(
    kinds=st.lists(
        st.sampled_from(["good", "refused", "never", "locked"]), min_size=1, max_size=12
    ),
    slots=st.integers(1, 20),
)
def test_good_outcomes_are_recorded_beside_bad_ones(kinds: list[str], slots: int) -> None:
    """Each once beside the bad ones; and all of them once nothing is wrong."""

    async def main() -> None:
        fleet = Fleet()
        fleet.declare("echo", echo)
        ledger = FussyLedger(fleet)
        ledger.refuses = lambda each: with_result(b"refused")(each) or has(b"never")(each)
        ledger.blocks = has(b"locked")
        ids = await accepted(fleet, *kinds)
        fleet.start(queues={"default": slots + kinds.count("never") + kinds.count("locked")})
        stuck = ("never", "locked")
        jobs = list(zip(kinds, ids, strict=True))
        await fleet.final(*(each for kind, each in jobs if kind not in stuck), within=200.0)
        for kind, job_id in jobs:
            assert (await fleet.job(job_id)).state.final == (kind not in stuck)
        ledger.refuses = ledger.blocks = has(b"none")
        await fleet.final(*ids, within=60.0)
        for kind, job_id in jobs:
            job = await fleet.job(job_id)
            failed = kind == "refused"
            expected = (JobState.FAILED, "result") if failed else (JobState.COMPLETED, None)
            assert (outcome(job), job.claims) == (expected, 1)
        await fleet.stop()

    run_in_virtual_time(main())
