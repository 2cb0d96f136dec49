"""The tasks of promises.py: they count their own runs, and show the times that they see."""

import asyncio
import os
import time
from dataclasses import replace
from pathlib import Path

from viralfx import JobContext, task
from viralfx.jobs.tasks import declared_task, mark

MODULE = "benchmarks.jobs.promise_tasks"
RUNS, EACH_SECOND = "BENCH_RUNS", "BENCH_EACH_SECOND"
"""Environment variables: the file of the runs, and whether the schedule has seconds."""
ORDER, TICK, FREE = "promises.order", "promises.tick", "promises.free"
LIMITED, RATED, OBSERVED = "promises.limited", "promises.rated", "promises.observed"
CONCURRENCY, STARTS = 5, 20
"""The jobs of a task at once, and the starts of another one in a second."""
LIMITED_SECONDS = 0.02
REPORT_SECONDS = 0.01
CANCELLED = "cancelled"


@task(ORDER)
async def order(_number: int) -> None:
    """Do nothing."""


@task(TICK, cron="* * * * *")
async def tick(_: None) -> None:
    """Do nothing."""


declared = declared_task(tick)
if declared is not None and os.environ.get(EACH_SECOND):
    # A declaration has no seconds; a trial has, so that it is short.
    mark(tick, replace(declared, cron="* * * * * *"))


@task(FREE)
async def free(_: None) -> None:
    """Do nothing."""


@task(LIMITED, concurrency=CONCURRENCY)
async def limited(_: None) -> None:
    """Take some time, then note the beginning and the end."""
    began = time.monotonic()
    await asyncio.sleep(LIMITED_SECONDS)
    _note(f"{began} {time.monotonic()}\n")


@task(RATED, rate_limit=f"{STARTS}/s")
async def rated(_: None) -> None:
    """Do nothing."""


@task(OBSERVED, timeout=600.0)
async def observed(_: None, context: JobContext) -> None:
    """Report the time a hundred times a second, and at last that of the cancellation."""
    try:
        while True:
            context.report(time.monotonic())
            await asyncio.sleep(REPORT_SECONDS)
    except asyncio.CancelledError:
        context.report(time.monotonic(), message=CANCELLED)
        raise


def _note(line: str) -> None:
    # All workers write to one file; a short line that is appended at once stays whole.
    with Path(os.environ[RUNS]).open("a", encoding="utf-8") as file:
        file.write(line)
