"""Measures how fast an empty job is enqueued and processed, compared with other job queues.

One contender at a time has the machine; they take turns, and are compared within a round.
"""

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from benchmarks.jobs.contenders import (
    APART,
    PEERS,
    PROCRASTINATE,
    TASKIQ_STREAM,
    VIRALFX,
    WITHOUT_REDIS,
    Contender,
    FailedTrialError,
    behind,
    run_trial,
    with_rows,
)
from benchmarks.jobs.empty_task import TASK, WAIT_SECONDS, WAITING_TASK
from benchmarks.jobs.peer import SLOTS
from benchmarks.jobs.scaling import Emptied, ScalingError, empty
from benchmarks.jobs.testbed import Testbed, testbed
from benchmarks.jobs.trial import Trial
from benchmarks.load import wait_for_calm
from benchmarks.results import Target, circumstances, command, publish, table, target_table
from benchmarks.servers import ServerError
from tests.servers.pgbouncer import MODES

JOBS = 30_000
"""A worker of viralfx has its full rate after about a tenth of a second, and empties the queue in
less than two."""
ONE_BY_ONE = 2_000
ROUNDS = 5
ROWS = (1_000, 100_000, 1_000_000)
SCALING_JOBS = 40_000
WORKERS = (1, 2)
LOADS = {
    TASK: ("empty", "processed, on cores shared with Postgres"),
    WAITING_TASK: (f"wait {WAIT_SECONDS * 1000:.0f} ms", "processed, with idle cores"),
}
"""The jobs of worker processes, by task: their name, and the remark at their target."""
MIN_OF_STREAM = 4.0
MIN_SCALING = 1.5
MAX_WAITING = 60.0
"""Total seconds to wait for other processes to become idle."""
MAX_FOREIGN = 0.1
READING = (
    "Enqueued, then processed by one worker process that was started afterwards: from the first "
    "job's run until the last one's, or until the queue holds no waiting or running job. Then as "
    "many once more, both at once: from the first one's enqueuing. "
    "“Durable” says whether an accepted job survives the death of the worker, of Redis and of the "
    "machine. Ratios are medians of the rounds' own; a spread goes from the slowest to the fastest."
)

_PROCESSED = attrgetter("processed")
_FLOWED = attrgetter("flowed")


@dataclass
class Rounds:
    """All trials, in rounds."""

    trials: list[dict[Contender, Trial]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    by_workers: list[dict[tuple[str, int], Emptied]] = field(default_factory=list)
    """One and several worker processes, by round, by task and number."""

    def scaling(self, task: str) -> float | None:
        """Compare several workers with one; None if they were not measured."""
        few, many = min(WORKERS), max(WORKERS)
        ratios = [each[task, many].rate / each[task, few].rate for each in self.by_workers]
        return statistics.median(ratios) if ratios else None

    def of(self, contender: Contender) -> list[Trial]:
        """Return the results of one contender."""
        return [trials[contender] for trials in self.trials if contender in trials]

    def ratio(
        self, one: Contender, other: Contender, of: Callable[[Trial], float] = _PROCESSED
    ) -> float | None:
        """Compare two of them; None where no round has both."""
        both = [trials for trials in self.trials if {one, other} <= trials.keys()]
        ratios = [of(trials[one]) / of(trials[other]) for trials in both]
        return statistics.median(ratios) if ratios else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    options = _options(arguments)
    contenders = _contenders(options)
    with testbed() as bed:
        rounds = _measure(bed, contenders, options)
        where = str(bed)
    targets = _targets(rounds, options.rows)
    lines = [
        *circumstances(
            command("bench-jobs"),
            where,
            f"{options.rounds} interleaved rounds; {options.jobs:,} jobs each, or the share that "
            f"the table names; {SLOTS} at once, where a worker can; one worker process",
            f"With: {_versions(rounds)}",
        ),
        "",
        *_table(rounds, [c for c in contenders if rounds.of(c)], options.jobs),
        "",
        *_scaling_table(rounds),
        "",
        *target_table(targets),
        "",
        READING,
        *(f"- Failed: {failure}" for failure in rounds.failures),
    ]
    section = f"jobs.rates --only {' '.join(options.only)}" if options.only else "jobs.rates"
    code = publish(section, lines, targets, check=options.check, record=not options.dry)
    return 1 if rounds.failures else code


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="just bench-jobs", description=__doc__)
    add = parser.add_argument
    add("--jobs", type=int, default=JOBS, help=f"of each in a round; default: {JOBS}")
    add("--one-by-one", type=int, default=ONE_BY_ONE, help=f"of them; default: {ONE_BY_ONE}")
    add("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    add("--rows", type=int, nargs="*", default=ROWS, help="finished jobs in the ledger before")
    add(
        "--scaling-jobs",
        type=int,
        default=SCALING_JOBS,
        help=f"for one and two worker processes; 0: none; default: {SCALING_JOBS}",
    )
    add("--pooler", nargs="*", default=(), choices=MODES, help="also behind PgBouncer, by mode")
    add(
        "--only",
        nargs="+",
        default=(),
        metavar="WORD",
        help="contenders whose name has a WORD, with a section of their own in RESULTS.md",
    )
    add("--check", action="store_true", help="exit 1 when a target is missed")
    add("--dry", action="store_true", help="print, and leave RESULTS.md as it is")
    return parser.parse_args(arguments)


def _contenders(options: argparse.Namespace) -> list[Contender]:
    contenders = [
        VIRALFX,
        WITHOUT_REDIS,
        *map(behind, options.pooler),
        *map(with_rows, options.rows),
        *PEERS,
    ]
    asked = [
        contender
        for contender in contenders
        if not options.only or any(word.lower() in contender.name.lower() for word in options.only)
    ]
    for contender in asked:
        if not contender.python.exists():
            print(f"{contender.name} is left out: there is no {APART}", file=sys.stderr)
    return [contender for contender in asked if contender.python.exists()]


def _measure(bed: Testbed, contenders: Sequence[Contender], options: argparse.Namespace) -> Rounds:
    rounds = Rounds()
    patience = MAX_WAITING
    for number in range(1, options.rounds + 1):
        trials: dict[Contender, Trial] = {}
        for contender in random.sample(contenders, len(contenders)):
            patience -= wait_for_calm(most_foreign=MAX_FOREIGN, seconds=patience)
            try:
                trial = run_trial(contender, bed, jobs=options.jobs, one_by_one=options.one_by_one)
            except FailedTrialError as error:
                print(f"round {number}: {error}", file=sys.stderr)
                rounds.failures.append(f"{contender.name} in round {number}")
                continue
            trials[contender] = trial
            print(f"round {number}: {contender.name}: {trial.processed:.0f}/s", file=sys.stderr)
        rounds.trials.append(trials)
        if options.scaling_jobs:
            patience -= wait_for_calm(most_foreign=MAX_FOREIGN, seconds=patience)
            try:
                emptied = {
                    (task, workers): empty(bed, workers, task, options.scaling_jobs)
                    for task in LOADS
                    for workers in (WORKERS if number % 2 else WORKERS[::-1])
                }
            except (ScalingError, ServerError) as error:
                print(f"round {number}: {error}", file=sys.stderr)
                rounds.failures.append(f"several worker processes in round {number}")
                continue
            said = ", ".join(
                f"{LOADS[task][0]}, {workers}: {each.rate:.0f}/s"
                for (task, workers), each in emptied.items()
            )
            print(f"round {number}: by worker processes: {said}", file=sys.stderr)
            rounds.by_workers.append(emptied)
    return rounds


def _targets(rounds: Rounds, rows: Sequence[int]) -> list[Target]:
    few, many = with_rows(min(rows, default=0)), with_rows(max(rows, default=0))
    wanted = [
        (VIRALFX, TASKIQ_STREAM, _PROCESSED, MIN_OF_STREAM, "processed"),
        (VIRALFX, TASKIQ_STREAM, _FLOWED, 1.0, "both at once"),
        (VIRALFX, PROCRASTINATE, _PROCESSED, 3.0, "processed"),
        (VIRALFX, PROCRASTINATE, _FLOWED, 3.0, "both at once"),
        *([(many, few, _PROCESSED, 0.9, "processed")] if len(rows) > 1 else []),
        *([(many, few, _FLOWED, 0.9, "both at once")] if len(rows) > 1 else []),
    ]
    targets = [
        Target(what=f"{a.name} / {b.name}", measured=r, limit=limit, at_least=True, remark=remark)
        for a, b, of, limit, remark in wanted
        if (r := rounds.ratio(a, b, of)) is not None
    ]
    targets += [
        Target(
            what=f"two worker processes / one, {name} jobs",
            measured=scaling,
            limit=MIN_SCALING,
            at_least=True,
            remark=remark,
        )
        for task, (name, remark) in LOADS.items()
        if (scaling := rounds.scaling(task)) is not None
    ]
    return targets


def _table(rounds: Rounds, contenders: Sequence[Contender], jobs: int) -> list[str]:
    def ratio(one: Contender, other: Contender) -> str:
        found = rounds.ratio(one, other)
        return "" if found is None else f"{found:.2f}"

    return table(
        (
            "contender",
            "durable",
            "jobs",
            "enqueued one by one /s",
            "gathered /s",
            "processed /s",
            "spread",
            "both at once /s",
            "worker CPU µs/job",
            "servers CPU µs/job",
            "x taskiq stream",
            "x procrastinate",
        ),
        (
            (
                contender.name,
                "yes" if contender.durable else "no",
                f"{contender.jobs(jobs):,}",
                _median(rounds.of(contender), lambda trial: trial.one_by_one),
                _median(rounds.of(contender), lambda trial: trial.gathered),
                _median(rounds.of(contender), lambda trial: trial.processed),
                _spread(rounds.of(contender)),
                _median(rounds.of(contender), lambda trial: trial.flowed),
                _median(rounds.of(contender), lambda trial: trial.worker_cost),
                _median(rounds.of(contender), lambda trial: trial.servers_cost),
                ratio(contender, TASKIQ_STREAM),
                ratio(contender, PROCRASTINATE),
            )
            for contender in contenders
        ),
    )


def _scaling_table(rounds: Rounds) -> list[str]:
    if not rounds.by_workers:
        return []
    rows = []
    for task, (name, _) in LOADS.items():
        for workers in WORKERS:
            emptied = [each[task, workers] for each in rounds.by_workers]
            rates = [each.rate for each in emptied]
            rows.append(
                (
                    name,
                    str(workers),
                    f"{statistics.median(rates):,.0f}",
                    f"{min(rates):,.0f} to {max(rates):,.0f}",
                    f"{statistics.median(each.cores for each in emptied):.2f}",
                )
            )
    return table(("jobs", "worker processes", "processed /s", "spread", "cores busy"), rows)


def _median(trials: Sequence[Trial], what: Callable[[Trial], float | None]) -> str:
    figures = [figure for trial in trials if (figure := what(trial)) is not None]
    return f"{statistics.median(figures):,.0f}" if figures else "-"


def _spread(trials: Sequence[Trial]) -> str:
    rates = [trial.processed for trial in trials]
    return f"{min(rates):,.0f} to {max(rates):,.0f}"


def _versions(rounds: Rounds) -> str:
    # The same library may be there twice, in two environments.
    found: Mapping[tuple[str, str], None] = {
        item: None
        for trials in rounds.trials
        for trial in trials.values()
        for item in trial.versions.items()
    }
    return ", ".join(f"{name} {version}" for name, version in sorted(found))


if __name__ == "__main__":
    sys.exit(main())
