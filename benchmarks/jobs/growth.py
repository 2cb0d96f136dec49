"""Checks that memory does not grow with the number of past jobs. Exits 1 if it does.

Posts empty jobs to one API, runs them in one worker, and samples both processes, Redis and its
streams. Clients pause while many jobs wait, so any remaining growth is a leak.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence

import uvloop
from benchmarks.jobs.flow import CLIENTS, MIB, Flow, Sample
from benchmarks.jobs.testbed import CONCURRENCY, Testbed, testbed
from benchmarks.results import Target, circumstances, command, publish, table, target_table
from benchmarks.servers import Server, viralfx, worker

JOBS = 100_000
MAX_WAITING = 1_000
WARM_UP = 0.2
"""The share of the jobs after which memory must be stable."""
MAX_GROWTH = 4.0
"""MiB by which a process or Redis may grow after that."""
SHOWN = 20
"""Samples in the table."""
READING = (
    "Growth is the slope of a straight line through all samples after the warm-up, times the jobs "
    "that followed it. An entry of a stream is one too many where there are more of them than jobs "
    "that wait or run; those that were running when they were counted are forgiven."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(prog="just bench-growth", description=__doc__)
    add = parser.add_argument
    add("--jobs", type=int, default=JOBS, help=f"default: {JOBS}")
    add("--most-waiting", type=int, default=MAX_WAITING, help=f"default: {MAX_WAITING}")
    add("--most-growth", type=float, default=MAX_GROWTH, help=f"MiB; default: {MAX_GROWTH:g}")
    add("--dry", action="store_true", help="leave RESULTS.md as it is")
    options = parser.parse_args(arguments)
    with testbed() as bed:
        samples = _measure(bed, options.jobs, options.most_waiting)
        where = str(bed)
    settled = [s for s in samples if s.finished >= options.jobs * WARM_UP]
    targets = _targets(samples, settled, options)
    lines = [
        *circumstances(
            command("bench-growth"),
            where,
            f"{options.jobs:,} jobs from {CLIENTS} clients that pause while "
            f"{options.most_waiting:,} are unfinished; JOB_CONCURRENCY={CONCURRENCY}",
            f"{len(samples)} samples; the first {WARM_UP:.0%} of the jobs are the warm-up",
        ),
        "",
        *_table(samples),
        "",
        *target_table(targets),
        "",
        READING,
    ]
    return publish("jobs.growth", lines, targets, check=True, record=not options.dry)


def _measure(bed: Testbed, jobs: int, most_waiting: int) -> list[Sample]:
    database = bed.ledger()
    environment = bed.our_environment(database)
    with (
        Server(viralfx("viralfx serve", **environment), anywhere=True) as api,
        Server(worker("viralfx worker", **environment), anywhere=True) as working,
    ):
        for server in (api, working):
            server.wait_for_200("/health/ready", seconds=60)
        flow = Flow(api, working, bed.redis, jobs=jobs, most_waiting=most_waiting)
        uvloop.run(flow.run(bed.postgres.url(database)))
        return flow.samples


def _targets(
    samples: Sequence[Sample], settled: Sequence[Sample], options: argparse.Namespace
) -> list[Target]:
    followed = options.jobs * (1 - WARM_UP)

    def growth(what: str, of: Callable[[Sample], float]) -> Target:
        line = statistics.linear_regression([s.finished for s in settled], [*map(of, settled)])
        return Target(
            what=f"growth of {what} over {followed:,.0f} jobs",
            measured=line.slope * followed,
            limit=options.most_growth,
            at_least=False,
            unit=" MiB",
            remark=f"{line.slope * MIB:+.1f} bytes per job",
        )

    def at_most(what: str, measured: int) -> Target:
        return Target(what=what, measured=measured, limit=0, at_least=False)

    return [
        growth("the worker's RSS", lambda sample: sample.worker),
        growth("the API's RSS", lambda sample: sample.api),
        growth("Redis' used_memory", lambda sample: sample.redis),
        at_most("stream entries beyond unfinished jobs", max(s.excess for s in samples)),
        at_most("stream entries at the end", samples[-1].entries),
    ]


def _table(samples: Sequence[Sample]) -> list[str]:
    shown = samples[:: max(1, len(samples) // SHOWN)]
    return table(
        (
            "seconds",
            "finished",
            "unfinished",
            "stream entries",
            "worker MiB",
            "API MiB",
            "Redis MiB",
        ),
        (
            (
                f"{sample.seconds:.0f}",
                f"{sample.finished:,}",
                f"{sample.unfinished:,}",
                f"{sample.entries:,}",
                f"{sample.worker:.1f}",
                f"{sample.api:.1f}",
                f"{sample.redis:.2f}",
            )
            for sample in (*shown, *([samples[-1]] if samples[-1] not in shown else []))
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
