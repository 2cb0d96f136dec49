"""How fast a job that does nothing is enqueued and processed, next to other job queues.

One contender at a time has the machine; they take turns, and are compared within a round.
"""

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from benchmarks.jobs.arena import Arena, arena
from benchmarks.jobs.bout import Bout
from benchmarks.jobs.contenders import (
    APART,
    OURS,
    PEERS,
    PROCRASTINATE,
    TASKIQ_STREAM,
    WITHOUT_REDIS,
    Contender,
    FailedBoutError,
    fight,
    with_rows,
)
from benchmarks.jobs.peer import SLOTS
from benchmarks.load import wait_for_calm
from benchmarks.results import Target, circumstances, command, publish, table, target_table

JOBS = 10_000
ONE_BY_ONE = 2_000
ROUNDS = 5
ROWS = (1_000, 100_000, 1_000_000)
MOST_WAITING = 60.0
"""Seconds in all to wait for other processes to leave the machine alone."""
MOST_FOREIGN = 0.1
READING = (
    "Enqueued, then processed by one worker process that was started afterwards: from the first "
    "job's run until the last one's, or until the queue knows of none that waits or runs. Then as "
    "many once more, both at once: from the first one's enqueuing. "
    "“Durable” says whether an accepted job survives the death of the worker, of Redis and of the "
    "machine. Ratios are medians of the rounds' own; a spread goes from the slowest to the fastest."
)

_PROCESSED = attrgetter("processed")
_FLOWED = attrgetter("flowed")


@dataclass
class Rounds:
    """All bouts, in rounds."""

    bouts: list[dict[Contender, Bout]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def of(self, contender: Contender) -> list[Bout]:
        """Return what one contender showed."""
        return [bouts[contender] for bouts in self.bouts if contender in bouts]

    def ratio(
        self, one: Contender, other: Contender, of: Callable[[Bout], float] = _PROCESSED
    ) -> float | None:
        """Compare two of them; None where no round has both."""
        both = [bouts for bouts in self.bouts if {one, other} <= bouts.keys()]
        ratios = [of(bouts[one]) / of(bouts[other]) for bouts in both]
        return statistics.median(ratios) if ratios else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    options = _options(arguments)
    contenders = _contenders(options)
    with arena() as ground:
        rounds = _measure(ground, contenders, options)
        where = str(ground)
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
        *target_table(targets),
        "",
        READING,
        *(f"- Failed: {failure}" for failure in rounds.failures),
    ]
    code = publish("jobs.rates", lines, targets, check=options.check, record=not options.dry)
    return 1 if rounds.failures else code


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="just bench-jobs", description=__doc__)
    add = parser.add_argument
    add("--jobs", type=int, default=JOBS, help=f"of each in a round; default: {JOBS}")
    add("--one-by-one", type=int, default=ONE_BY_ONE, help=f"of them; default: {ONE_BY_ONE}")
    add("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    add("--rows", type=int, nargs="*", default=ROWS, help="finished jobs in the ledger before")
    add("--only", nargs="+", default=(), metavar="WORD", help="contenders whose name has a WORD")
    add("--check", action="store_true", help="exit 1 when a target is missed")
    add("--dry", action="store_true", help="print, and leave RESULTS.md as it is")
    return parser.parse_args(arguments)


def _contenders(options: argparse.Namespace) -> list[Contender]:
    everybody = [OURS, WITHOUT_REDIS, *map(with_rows, options.rows), *PEERS]
    asked = [
        contender
        for contender in everybody
        if not options.only or any(word.lower() in contender.name.lower() for word in options.only)
    ]
    for contender in asked:
        if not contender.python.exists():
            print(f"{contender.name} is left out: there is no {APART}", file=sys.stderr)
    return [contender for contender in asked if contender.python.exists()]


def _measure(ground: Arena, contenders: Sequence[Contender], options: argparse.Namespace) -> Rounds:
    rounds = Rounds()
    patience = MOST_WAITING
    for number in range(1, options.rounds + 1):
        bouts: dict[Contender, Bout] = {}
        for contender in random.sample(contenders, len(contenders)):
            patience -= wait_for_calm(most_foreign=MOST_FOREIGN, seconds=patience)
            try:
                bout = fight(contender, ground, jobs=options.jobs, one_by_one=options.one_by_one)
            except FailedBoutError as error:
                print(f"round {number}: {error}", file=sys.stderr)
                rounds.failures.append(f"{contender.name} in round {number}")
                continue
            bouts[contender] = bout
            print(f"round {number}: {contender.name}: {bout.processed:.0f}/s", file=sys.stderr)
        rounds.bouts.append(bouts)
    return rounds


def _targets(rounds: Rounds, rows: Sequence[int]) -> list[Target]:
    few, many = with_rows(min(rows, default=0)), with_rows(max(rows, default=0))
    wanted = [
        (OURS, TASKIQ_STREAM, _PROCESSED, 0.8, "processed; the aim is 1.0"),
        (OURS, TASKIQ_STREAM, _FLOWED, 0.8, "both at once; the aim is 1.0"),
        (OURS, PROCRASTINATE, _PROCESSED, 3.0, "processed"),
        (OURS, PROCRASTINATE, _FLOWED, 3.0, "both at once"),
        *([(many, few, _PROCESSED, 0.9, "processed")] if len(rows) > 1 else []),
        *([(many, few, _FLOWED, 0.9, "both at once")] if len(rows) > 1 else []),
    ]
    return [
        Target(what=f"{a.name} / {b.name}", measured=r, limit=limit, at_least=True, remark=remark)
        for a, b, of, limit, remark in wanted
        if (r := rounds.ratio(a, b, of)) is not None
    ]


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
                _median(rounds.of(contender), lambda bout: bout.one_by_one),
                _median(rounds.of(contender), lambda bout: bout.gathered),
                _median(rounds.of(contender), lambda bout: bout.processed),
                _spread(rounds.of(contender)),
                _median(rounds.of(contender), lambda bout: bout.flowed),
                _median(rounds.of(contender), lambda bout: bout.worker_cost),
                _median(rounds.of(contender), lambda bout: bout.servers_cost),
                ratio(contender, TASKIQ_STREAM),
                ratio(contender, PROCRASTINATE),
            )
            for contender in contenders
        ),
    )


def _median(bouts: Sequence[Bout], what: Callable[[Bout], float | None]) -> str:
    figures = [figure for bout in bouts if (figure := what(bout)) is not None]
    return f"{statistics.median(figures):,.0f}" if figures else "-"


def _spread(bouts: Sequence[Bout]) -> str:
    rates = [bout.processed for bout in bouts]
    return f"{min(rates):,.0f} to {max(rates):,.0f}"


def _versions(rounds: Rounds) -> str:
    # The same library may be there twice, in two environments.
    found: Mapping[tuple[str, str], None] = {
        item: None
        for bouts in rounds.bouts
        for bout in bouts.values()
        for item in bout.versions.items()
    }
    return ", ".join(f"{name} {version}" for name, version in sorted(found))


if __name__ == "__main__":
    sys.exit(main())
