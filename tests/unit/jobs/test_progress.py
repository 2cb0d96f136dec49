"""Reports of running tasks: their form, how often they are written, and where they end."""

import asyncio
import json
import math
from typing import Any

import pytest
from docs.examples.imports import import_rows
from tests.unit.jobs.fleet import Fleet

from viralfx.jobs.codec import Progress, read_progress
from viralfx.jobs.follower import JobFollower
from viralfx.jobs.model import JobState
from viralfx.jobs.tasks import JobContext, declared_task


@pytest.mark.parametrize(
    ("report", "error", "text"),
    [
        ((), ValueError, "needs current, total or message"),
        ((None, None, None), ValueError, "needs current, total or message"),
        (("1",), TypeError, "current must be a number, not str"),
        ((True,), TypeError, "current must be a number, not bool"),
        (({"current": 1},), TypeError, r"not dict; write report\(3, 10, 'rows'\)"),
        ((1, math.nan), ValueError, "total must be a finite number"),
        ((1, math.inf), ValueError, "total must be a finite number"),
        ((10**400,), ValueError, "current must be a finite number"),
        ((1, 2, b"x"), TypeError, "message must be a text, not bytes"),
    ],
)
def test_a_wrong_report_is_refused(
    report: tuple[object, ...], error: type[Exception], text: str
) -> None:
    """The error says what to do."""
    with pytest.raises(error, match=text):
        read_progress(*report)


def test_a_report_becomes_json() -> None:
    """All three fields are there, and a lone surrogate is replaced."""
    assert read_progress(3).encode() == (b'{"current": 3, "total": null, "message": null}')
    assert read_progress(total=2.5, message="\ud800\0").encode() == (
        b'{"current": null, "total": 2.5, "message": "?\\u0000"}'
    )


def test_a_long_message_is_cut() -> None:
    """It is often text of the payload, which must not fail the job."""
    assert read_progress(message="x" * 500).message == "x" * 500
    assert read_progress(message="x" * 501).message == "x" * 497 + "..."


@pytest.mark.parametrize(
    ("current", "total", "ratio"),
    [(1, 4, 0.25), (5, 4, 1.0), (-1, 4, 0.0), (1, 0, None), (1, None, None), (None, 4, None)],
)
def test_a_report_has_a_ratio(current: float | None, total: float | None, ratio: object) -> None:
    """From 0 to 1; None without both numbers."""
    assert Progress(current, total, None).ratio == ratio


async def test_a_wrong_report_fails_the_task(fleet: Fleet) -> None:
    """The error is raised where the task reports."""

    async def wrong(_: object, context: JobContext) -> str:
        try:
            context.report(math.nan)
        except ValueError as error:
            return str(error)
        return ""

    fleet.declare("wrong", wrong, wants_context=True)
    fleet.start()
    job_id = await fleet.accept("wrong")
    await fleet.final(job_id)

    assert b"current must be a finite number" in ((await fleet.job(job_id)).result or b"")


async def test_a_thousand_reports_a_second_are_one_write(fleet: Fleet) -> None:
    """For all jobs of the worker; the last report of each is kept with its outcome."""

    async def count(payload: int, context: JobContext) -> None:
        for number in range(10_000):
            await context.report(number, 10_000, f"row {payload}")
            await asyncio.sleep(0.001)

    fleet.declare("count", count, wants_context=True)
    fleet.start()
    ids = [await fleet.accept("count", str(number)) for number in range(3)]
    await asyncio.sleep(5.5)
    shown = await fleet.job(ids[0])
    await fleet.final(*ids)
    jobs = [await fleet.job(job_id) for job_id in ids]

    assert shown.progress is not None
    assert shown.state is JobState.ACTIVE
    assert fleet.ledger.count("report") <= 11
    assert [job.progress for job in jobs] == [
        b'{"current": 9999, "total": 10000, "message": "row %d"}' % number for number in range(3)
    ]


async def test_reports_do_not_pile_up_in_an_outage(fleet: Fleet) -> None:
    """The latest report of a job is written once the ledger answers."""
    went_on = asyncio.Event()

    async def count(_: object, context: JobContext) -> None:
        for number in range(300):
            context.report(number)
            await asyncio.sleep(0.1)
        await went_on.wait()

    fleet.declare("count", count, wants_context=True, timeout=1000.0)
    fleet.start()
    job_id = await fleet.accept("count")
    fleet.ledger.unavailable = frozenset({"report"})
    await asyncio.sleep(40.0)
    assert (await fleet.job(job_id)).progress is None
    fleet.ledger.unavailable = frozenset()
    writes = fleet.ledger.count("report")
    await asyncio.sleep(10.0)
    went_on.set()
    await fleet.final(job_id)

    assert fleet.ledger.count("report") == writes + 1
    job = await fleet.job(job_id)
    assert job.progress == b'{"current": 299, "total": null, "message": null}'


async def test_a_job_that_reports_nothing_costs_no_write(fleet: Fleet) -> None:
    """Nor does one whose report has not changed."""

    async def once(_: object, context: JobContext) -> None:
        context.report(message="begun")
        await asyncio.sleep(30.0)

    fleet.declare("once", once, wants_context=True)
    fleet.start()
    await fleet.final(await fleet.accept("sleep", "30"))
    assert fleet.ledger.count("report") == 0
    await fleet.final(await fleet.submit("once"))

    assert fleet.ledger.count("report") == 1


async def test_followers_see_reports(fleet: Fleet) -> None:
    """Each change of the progress is an update."""

    async def count(_: object, context: JobContext) -> None:
        for number in range(3):
            context.report(number)
            await asyncio.sleep(3.0)

    async def get(job_id: str) -> Any:
        return await fleet.job(job_id)

    fleet.declare("count", count, wants_context=True)
    fleet.start()
    follower = JobFollower(get, fleet.clock)
    job_id = await fleet.accept("count")
    updates = [job async for job in follower.follow(await fleet.job(job_id)) if job is not None]
    seen = [update.progress for update in updates if update.progress is not None]

    assert [seen.index(each) for each in sorted(set(seen))] == sorted(
        seen.index(each) for each in set(seen)
    )
    assert len(set(seen)) == 3
    assert updates[-1].state is JobState.COMPLETED


async def test_the_example_of_the_guide(fleet: Fleet) -> None:
    """It reports while it runs."""
    declared = declared_task(import_rows)
    assert declared is not None
    fleet.tasks.add(declared)
    fleet.start()
    job_id = await fleet.accept("rows.import", json.dumps([f"row {n}" for n in range(50)]))
    await fleet.until(lambda: _progress_of(fleet, job_id))
    await fleet.final(job_id)
    job = await fleet.job(job_id)

    assert job.result == b"50"
    assert job.progress == b'{"current": 49, "total": 50, "message": "row 49"}'


async def _progress_of(fleet: Fleet, job_id: str) -> bytes | None:
    return (await fleet.job(job_id)).progress
