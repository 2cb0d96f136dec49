"""What probes and ordinary requests cost under ``viralfx serve``, next to bare peers.

One server at a time is loaded; the servers take turns in short slices, and figures are compared
only within a round, so that whatever else the machine does hits both sides alike.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.load import CONNECTIONS, Sample, generator, load, wait_for_calm
from benchmarks.results import Target, circumstances, publish, table, target_table
from benchmarks.servers import BACKEND, BARE_ASGI, BARE_LITESTAR, MOUNTED, Program, Server

ROUNDS = 11
MOST_REPEATS = 6
SLICE_SECONDS = 1
MOST_WAITING = 45.0
"""Seconds in all to wait for other processes to leave the machine alone."""
SATURATED = 0.9
"""Below this share of the time the server waits for the client: rates say little then."""
MOST_FOREIGN = 0.1
"""A round in which other processes took more of a core than this is repeated."""


READING = (
    "A ratio compares requests per second; the remark gives the same ratio by the server's "
    "processor time. Where a client could not keep a server busy, processor time counts."
)


@dataclass(frozen=True, slots=True)
class Subject:
    """A path of a server."""

    program: Program
    path: str

    def __str__(self) -> str:
        return f"{self.program.name} `{self.path}`"


Round = Mapping[Subject, Sample]

ASGI_LIVE = Subject(BARE_ASGI, "/health/live")
ASGI_DETAILED = Subject(BARE_ASGI, "/health/detailed")
LITESTAR_LIVE = Subject(BARE_LITESTAR, "/health/live")
LITESTAR_WORK = Subject(BARE_LITESTAR, "/work")
LIVE = Subject(BACKEND, "/health/live")
READY = Subject(BACKEND, "/health/ready")
DETAILED = Subject(BACKEND, "/health/detailed")
MOUNTED_WORK = Subject(MOUNTED, "/work")

SUBJECTS = (
    LITESTAR_LIVE,
    ASGI_LIVE,
    LIVE,
    READY,
    DETAILED,
    ASGI_DETAILED,
    LITESTAR_WORK,
    MOUNTED_WORK,
)
COMPARISONS = (
    (LIVE, ASGI_LIVE, 0.70),
    (READY, LIVE, 0.90),
    (DETAILED, LIVE, 0.90),
    (MOUNTED_WORK, LITESTAR_WORK, 0.85),
)
FOR_ORIENTATION = ((LITESTAR_LIVE, ASGI_LIVE), (ASGI_DETAILED, ASGI_LIVE))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    options = parser.parse_args(arguments)
    rounds = measure(options.rounds)
    calm = sum(map(_undisturbed, rounds))
    targets = [_target(rounds, *comparison) for comparison in COMPARISONS]
    lines = [
        *circumstances(
            "Command: `python benchmarks/probes.py`",
            f"Load: {generator()}, {CONNECTIONS} keep-alive connections; server and client each on "
            "a core of their own",
            f"Medians of {len(rounds)} interleaved rounds of {SLICE_SECONDS} s per row; in {calm} "
            f"of them other processes took less than {MOST_FOREIGN:.0%} of a core",
        ),
        "",
        *_subject_table(rounds),
        "",
        *target_table(targets),
        "",
        READING,
        "",
        *(f"- For orientation: {_orientation(rounds, *pair)}" for pair in FOR_ORIENTATION),
    ]
    return publish("probes.py", lines, targets, check=options.check)


def measure(count: int) -> list[Round]:
    """Return the calmest rounds; those that other processes disturbed are repeated for a while."""
    with ExitStack() as stack:
        servers: dict[Program, Server] = {}
        for program in (BARE_ASGI, BARE_LITESTAR, BACKEND, MOUNTED):
            servers[program] = stack.enter_context(Server(program))
        for subject in SUBJECTS:
            servers[subject.program].wait_for_200(subject.path)
        measured: list[Round] = []
        patience = MOST_WAITING
        for number in range(1 + count + MOST_REPEATS):
            patience -= wait_for_calm(most_foreign=MOST_FOREIGN, seconds=patience)
            order = SUBJECTS if number % 2 else SUBJECTS[::-1]
            samples = {s: load(servers[s.program], s.path, seconds=SLICE_SECONDS) for s in order}
            if number:  # the first one warms up
                measured.append(samples)
            if sum(map(_undisturbed, measured)) == count:
                break
    return sorted(measured, key=_foreign)[:count]


def _foreign(samples: Round) -> float:
    return max(sample.foreign for sample in samples.values())


def _undisturbed(samples: Round) -> bool:
    return _foreign(samples) <= MOST_FOREIGN


def _median(rounds: Sequence[Round], subject: Subject, what: Callable[[Sample], float]) -> float:
    return statistics.median(what(samples[subject]) for samples in rounds)


def _ratios(rounds: Sequence[Round], ours: Subject, theirs: Subject) -> tuple[float, float]:
    """Return the medians of the rounds' ratios, by rate and by processor time."""
    by_rate = statistics.median(r[ours].rate / r[theirs].rate for r in rounds)
    by_cost = statistics.median(r[theirs].cost / r[ours].cost for r in rounds)
    return by_rate, by_cost


def _target(rounds: Sequence[Round], ours: Subject, theirs: Subject, limit: float) -> Target:
    by_rate, by_cost = _ratios(rounds, ours, theirs)
    saturated = all(_median(rounds, s, attrgetter("busy")) >= SATURATED for s in (ours, theirs))
    return Target(
        what=f"{ours} / {theirs}",
        measured=by_rate if saturated else by_cost,
        limit=limit,
        at_least=True,
        remark=f"{by_cost:.2f} by CPU" if saturated else f"by CPU; {by_rate:.2f} by rate",
    )


def _orientation(rounds: Sequence[Round], ours: Subject, theirs: Subject) -> str:
    by_rate, by_cost = _ratios(rounds, ours, theirs)
    return f"{ours} / {theirs} is {by_rate:.2f} ({by_cost:.2f} by CPU)."


def _subject_table(rounds: Sequence[Round]) -> list[str]:
    return table(
        ("server and path", "requests/s", "CPU µs/request", "server busy"),
        (
            (
                str(subject),
                f"{_median(rounds, subject, attrgetter('rate')):,.0f}",
                f"{_median(rounds, subject, attrgetter('cost')):.1f}",
                f"{_median(rounds, subject, attrgetter('busy')):.0%}",
            )
            for subject in SUBJECTS
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
