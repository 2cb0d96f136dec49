"""Periodic jobs: once per period over all workers."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.jobs.fleet import Fleet, ShakyLedger

from viralfx.domain.jobs.job import Job, JobDraft, JobState
from viralfx.domain.jobs.ledger import Accepted
from viralfx.domain.jobs.periodic import Periodic
from viralfx.domain.jobs.tasks import UnknownTaskError

MINUTELY = Periodic(task="note", every=60.0, payload=b'"minute"')


async def jobs(fleet: Fleet) -> Sequence[Job]:
    """Return all jobs."""
    return await fleet.ledger.page(limit=10_000)


async def test_a_periodic_job_runs_once_per_period_over_all_workers(fleet: Fleet) -> None:
    """Without any of them in charge."""
    for name in ("a", "b", "c"):
        fleet.start(name, periodic=[MINUTELY], look_interval=60.0)
    await asyncio.sleep(600.0)

    assert len(fleet.done) in (10, 11)  # the period that had begun, and those that began
    assert len({job.key for job in await jobs(fleet)}) == len(fleet.done)
    assert all(job.state is JobState.COMPLETED for job in await jobs(fleet))


async def test_it_runs_just_when_its_period_begins(fleet: Fleet) -> None:
    """And is rung for, so that no look is waited for."""
    fleet.start(periodic=[MINUTELY], look_interval=10_000.0)
    await asyncio.sleep(120.0)
    newest = (await jobs(fleet))[0]

    assert newest.finished_at is not None
    assert newest.finished_at.timestamp() % 60.0 == pytest.approx(0.0, abs=0.5)
    assert newest.key == f"periodic note:{int(newest.finished_at.timestamp() // 60)}"
    assert newest.correlation_id is not None


async def test_one_that_was_asked_for_is_not_asked_for_again(fleet: Fleet) -> None:
    """However often the clock is read in its period."""
    periodic = [Periodic(task="note", every=7200.0), Periodic(task="sleep", every=50.0)]
    fleet.start(periodic=periodic, look_interval=60.0)
    await asyncio.sleep(600.0)

    assert fleet.ledger.count("accept") in (13, 14)


async def test_a_worker_that_starts_again_asks_for_nothing_twice(fleet: Fleet) -> None:
    """Its period's job is in the ledger."""
    for number in range(5):
        worker = fleet.start(f"life-{number}", periodic=[MINUTELY])
        await asyncio.sleep(1.0)
        await worker.drain(1.0)

    assert fleet.done == ["minute"]


async def test_periods_of_several_tasks_do_not_disturb_each_other(fleet: Fleet) -> None:
    """Each has its own, and its own queue."""
    fleet.declare("other", fleet.note, queue="other")
    periodic = [MINUTELY, Periodic(task="other", every=10.0, payload=b'"moment"')]
    fleet.start(queues={"default": 1, "other": 1}, periodic=periodic, look_interval=60.0)
    await asyncio.sleep(180.0)

    assert fleet.done.count("minute") in (3, 4)
    assert fleet.done.count("moment") in (18, 19)


async def test_an_outage_at_the_beginning_of_a_period_is_made_up_for(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """As soon as the ledger is back."""
    caplog.set_level(logging.INFO)
    fleet.ledger.away = frozenset({"accept"})
    fleet.start(periodic=[MINUTELY])
    await asyncio.sleep(30.0)
    assert fleet.done == []
    fleet.ledger.away = frozenset()
    await fleet.until(lambda: fleet.done, within=3.0)

    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["Job ledger unavailable", "Job ledger available again"]


async def test_one_that_is_refused_does_not_keep_the_others(fleet: Fleet) -> None:
    """It is tried again; the others run."""

    class Fussy(ShakyLedger):
        async def accept(self, drafts: Sequence[JobDraft]) -> Sequence[Accepted]:
            if drafts[0].task == "sleep":
                raise ValueError("not this one")
            return await super().accept(drafts)

    fleet.ledger = Fussy(fleet.kept)
    fleet.start(periodic=[Periodic(task="sleep", every=60.0), MINUTELY])
    await asyncio.sleep(10.0)

    assert fleet.done == ["minute"]


async def test_a_task_that_is_not_declared_is_refused(fleet: Fleet) -> None:
    """Where the worker is made."""
    with pytest.raises(UnknownTaskError):
        fleet.worker(periodic=[Periodic(task="none", every=60.0)])


@pytest.mark.parametrize("every", [0.0, -1.0, float("inf"), float("nan")])
def test_a_period_that_is_none_is_refused(every: float) -> None:
    """Where it is written."""
    with pytest.raises(ValueError, match="every must be"):
        Periodic(task="note", every=every)


@given(every=st.floats(1.0, 1e6), moment=st.floats(1.7e9, 2e9))
def test_a_moment_is_in_its_period(every: float, moment: float) -> None:
    """Which begins before it and ends after it, but for the last digit of a float."""
    number = Periodic(task="note", every=every).period(moment)

    assert number * every <= moment * (1 + 1e-12)
    assert moment * (1 - 1e-12) < (number + 1) * every


async def test_nothing_is_asked_for_while_leaving(fleet: Fleet) -> None:
    """The next worker does."""
    periodic: dict[str, Any] = {"periodic": [Periodic(task="note", every=60.0)]}
    worker = fleet.start(**periodic)
    await fleet.accept("sleep", "1000.0")
    await fleet.until(lambda: fleet.running)
    before = fleet.ledger.count("accept")
    await worker.drain(300.0)

    assert fleet.ledger.count("accept") == before
