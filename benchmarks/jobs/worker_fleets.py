"""Schedules and limits over several worker processes: two parts of promises.py.

``schedule``: a schedule of every minute over four workers. One of them is killed by SIGKILL at a
random moment of each minute, and started again at once. Each has a wall clock of its own:
tests/chaos/skewed.py adds a number of seconds to ``SystemClock.now``, ``time.time`` and
``time.time_ns`` of the process, and to no monotonic clock.
``limits``: eight workers that run jobs of tasks with limits, beside those of a task without one.
Rounds with and without the former take turns.
"""

import argparse
import math
import os
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from benchmarks.jobs.promise_tasks import (
    CONCURRENCY,
    EACH_SECOND,
    FREE,
    LIMITED,
    LIMITED_SECONDS,
    MODULE,
    RATED,
    RUNS,
    STARTS,
    TICK,
)
from benchmarks.jobs.testbed import Testbed
from benchmarks.results import Target, table
from benchmarks.servers import Program, Server, worker
from tests.chaos.skewed import SKEW
from tests.servers.postgres import Database
from tests.servers.waiting import wait_until

MINUTES = 10.0
SKEWS = (-7200.0, 0.0, 86_400.0, 3.0)
"""Seconds by which the clocks of the workers are ahead."""
LATE_SECONDS = 90.0
"""For the last due time, also if its job was claimed by a worker that was killed."""
WORKERS = 8
ROUNDS = 10
BYSTANDERS = 40_000
BESIDE = {LIMITED: 5_000, RATED: 1_000}
"""Jobs of the tasks with limits; too many to end before the bystanders of a round."""
LEAD_SECONDS = 1.0
"""Time for which jobs with limits run before the bystanders come."""
CLAIM_SECONDS = 0.05
"""At most from the beginning of a claim's statement to the moment that a rate counts."""
READY_SECONDS = 120.0
ENQUEUE = "SELECT count(viralfx_ops.enqueue('{}')) FROM generate_series(1, {})"
LEFT = "SELECT count(*) FROM viralfx_ops.viralfx_jobs WHERE task = '{}'"


@dataclass(frozen=True, kw_only=True)
class Part:
    """The results of one part."""

    how: str
    table: Sequence[str]
    targets: Sequence[Target]
    reading: str


def none(what: str, measured: float) -> Target:
    """Return the target that there is none of something."""
    return Target(what=what, measured=measured, limit=0, at_least=False)


# -- schedule ------------------------------------------------------------------------------------


def schedule(bed: Testbed, options: argparse.Namespace) -> Part:
    """Run a schedule over workers that are killed; count the jobs of each due time."""
    database = Database(bed.postgres, bed.ledger())
    environment = {**bed.our_environment(database.name, with_redis=False), "TASK_MODULES": MODULE}
    if options.each_second:
        environment[EACH_SECOND] = "1"
    total = options.minutes * 60.0
    kills = round(options.minutes) if options.kills is None else options.kills
    rng = random.Random(kills)  # noqa: S311 - the same moments in each run
    with ExitStack() as stack:

        def start(number: int) -> Server:
            skewed = Program(
                name=f"worker {number}",
                arguments=("-m", "tests.chaos.skewed", "worker"),
                environment={
                    **environment,
                    "MANAGEMENT_PORT": "{port}",
                    SKEW: str(SKEWS[number]),
                },
            )
            return stack.enter_context(Server(skewed, anywhere=True))

        workers = [start(number) for number in range(len(SKEWS))]
        for each in workers:
            each.wait_for_200("/health/ready", seconds=READY_SECONDS)
        ((begun,),) = database.execute("SELECT clock_timestamp()")
        began = time.monotonic()
        for kill in range(kills):
            _sleep_until(began + (kill + rng.random()) * total / kills)
            killed = rng.randrange(len(SKEWS))
            os.kill(workers[killed].pid, signal.SIGKILL)
            workers[killed] = start(killed)
        _sleep_until(began + total)
        ended = begun + timedelta(seconds=total)
        due = _due_times(begun, ended, 1 if options.each_second else 60)
        rows = _ticks(database, begun, ended)
        patience = time.monotonic() + LATE_SECONDS
        while time.monotonic() < patience and not (
            {row[0] for row in rows} >= {*due} and all(row[1] == "completed" for row in rows)
        ):
            time.sleep(0.2)
            rows = _ticks(database, begun, ended)
    bed.drop(database.name)
    times = Counter(row[0] for row in rows)
    late = sorted(row[3] for row in rows) or [math.nan]
    figures = (len(due), len(rows), kills, sum(row[2] - 1 for row in rows))
    return Part(
        how=f"{options.minutes:g} minutes; clocks ahead by"
        f" {', '.join(f'{skew:g}' for skew in SKEWS)} s; seed {kills}; the default lease",
        table=table(
            (
                "due times",
                "jobs",
                "workers killed",
                "claimed again",
                "accepted after, p50 s",
                "longest s",
            ),
            [(*map(str, figures), f"{statistics.median(late):.2f}", f"{late[-1]:.2f}")],
        ),
        targets=[
            none("due times without a job", sum(not times[each] for each in due)),
            none("jobs beyond the first of a due time", (times - Counter({*times})).total()),
            none("jobs of another time", sum(each not in due for each in times)),
            none("jobs that did not complete", sum(row[1] != "completed" for row in rows)),
        ],
        reading="Due times are those between the moment at which all workers were ready and the"
        " end, by the server's clock. A job that a killed worker had claimed is claimed again once"
        " the lease of that worker is over.",
    )


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


def _due_times(begun: datetime, ended: datetime, period: int) -> Sequence[datetime]:
    first = math.floor(begun.timestamp() / period) + 1
    last = math.floor(ended.timestamp() / period)
    return [datetime.fromtimestamp(n * period, UTC) for n in range(first, last + 1)]


def _ticks(database: Database, begun: datetime, ended: datetime) -> list[tuple[Any, ...]]:
    """Return time, state, claims, and seconds until its acceptance of each job of the schedule."""
    return database.execute(
        "SELECT asked_run_at, state, claims,"  # noqa: S608 - of this script
        " extract(epoch FROM created_at - asked_run_at)::float8"
        f" FROM viralfx_ops.viralfx_all_jobs WHERE task = '{TICK}'"
        f" AND asked_run_at > '{begun}' AND asked_run_at <= '{ended}'"
    )


# -- limits --------------------------------------------------------------------------------------


def limits(bed: Testbed, options: argparse.Namespace) -> Part:
    """Run bystanders without and with jobs that limits hold back; count the latter."""
    database = Database(bed.postgres, bed.ledger())
    rates: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        runs = Path(folder, "runs")
        environment = {
            **bed.our_environment(database.name, with_redis=False),
            "TASK_MODULES": MODULE,
            # All workers together stay below the limit of the server.
            "DB_POOL_MAX": "6",
            RUNS: str(runs),
        }
        for number in range(WORKERS):
            program = worker(f"worker {number}", **environment)
            server = stack.enter_context(Server(program, anywhere=True))
            server.wait_for_200("/health/ready", seconds=READY_SECONDS)
        _bystanders_per_second(database, options.jobs)  # fills caches and pools
        for number in range(options.rounds):
            for beside in (False, True) if number % 2 else (True, False):
                if beside:
                    rates[True].append(_beside_limits(database, options.jobs))
                else:
                    rates[False].append(_bystanders_per_second(database, options.jobs))
        spans = [tuple(map(float, line.split())) for line in runs.read_text("utf-8").splitlines()]
    starts = database.execute(
        "SELECT extract(epoch FROM started_at)::float8 FROM viralfx_ops.viralfx_all_jobs"  # noqa: S608 - a constant
        f" WHERE task = '{RATED}' AND started_at IS NOT NULL ORDER BY started_at"
    )
    bed.drop(database.name)
    at_once = _most_at_once((began, ended) for began, ended in spans)
    window = 1.0 - CLAIM_SECONDS
    in_window = _most_within([moment for (moment,) in starts], window)
    ratios = [with_ / alone for alone, with_ in zip(rates[False], rates[True], strict=True)]
    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return Part(
        how=f"{WORKERS} workers; {options.jobs:,} empty jobs as bystanders in each of"
        f" {options.rounds} rounds; one task with `concurrency={CONCURRENCY}`, whose jobs take"
        f' {LIMITED_SECONDS:g} s, and one with `rate_limit="{STARTS}/s"`',
        table=[
            *table(
                ("bystanders", "jobs/s", "slowest", "fastest", "to alone"),
                (
                    ("alone", *_rates(rates[False]), ""),
                    ("beside jobs with limits", *_rates(rates[True]), ratio),
                ),
            ),
            "",
            *table(
                ("jobs with limits", "ran", "highest count"),
                (
                    ("at once", f"{len(spans):,}", str(at_once)),
                    (f"started in any {window:g} s", f"{len(starts):,}", str(in_window)),
                ),
            ),
        ],
        targets=[
            Target(what=what, measured=measured, limit=limit, at_least=False)
            for what, measured, limit in (
                ("jobs at once of the task with `concurrency`", at_once, CONCURRENCY),
                ("starts in any second of the task with `rate_limit`", in_window, STARTS),
            )
        ],
        reading="The workers find all bystanders of a round at one moment. Their rate is that from"
        " the first claim to the last end, by the server's clock; the ratio is the median of the"
        " rounds' own, with its range. Jobs with limits wait before them, more than can run in a"
        " round. The jobs at once are counted from the times that the task itself notes. A start is"
        " the beginning of the claim's statement, and the limit counts it at the end of the"
        f" statement, so windows are {CLAIM_SECONDS:g} s shorter.",
    )


def _rates(rates: Sequence[float]) -> Iterable[str]:
    return (f"{of(rates):,.0f}" for of in (statistics.median, min, max))


def _beside_limits(database: Database, jobs: int) -> float:
    """Return the rate of bystanders while jobs with limits wait and run; remove these."""
    for task, count in BESIDE.items():
        database.execute(ENQUEUE.format(task, count))
    time.sleep(LEAD_SECONDS)
    rate = _bystanders_per_second(database, jobs)
    for task in BESIDE:
        removed = database.execute(
            f"DELETE FROM viralfx_ops.viralfx_jobs WHERE task = '{task}' AND state = 'waiting'"  # noqa: S608 - a constant
            " RETURNING id"
        )
        if not removed:
            raise RuntimeError(f"the jobs of {task} ended before the bystanders")
        _wait_for_end(database, task)
    return rate


def _bystanders_per_second(database: Database, jobs: int) -> float:
    ((begun,),) = database.execute("SELECT clock_timestamp()")
    database.execute(ENQUEUE.format(FREE, jobs))
    _wait_for_end(database, FREE)
    ((count, seconds),) = database.execute(
        "SELECT count(*), extract(epoch FROM max(finished_at) - min(started_at))::float8"  # noqa: S608 - of this script
        f" FROM viralfx_ops.viralfx_finished_jobs WHERE task = '{FREE}' AND created_at > '{begun}'"
    )
    if count != jobs:
        raise RuntimeError(f"{count} of {jobs} bystanders completed")
    return float(jobs / seconds)


def _wait_for_end(database: Database, task: str) -> None:
    wait_until(
        lambda: database.execute(LEFT.format(task)) == [(0,)],
        seconds=READY_SECONDS,
        what=f"the jobs of {task} end",
    )


def _most_at_once(spans: Iterable[tuple[float, float]]) -> int:
    # At the same moment an end comes before a beginning.
    changes = sorted(each for began, ended in spans for each in ((began, 1), (ended, -1)))
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def _most_within(moments: Sequence[float], seconds: float) -> int:
    """Return the highest number of moments, which are in order, within any window."""
    most = first = 0
    for last, moment in enumerate(moments):
        while moments[first] <= moment - seconds:
            first += 1
        most = max(most, last - first + 1)
    return most
