"""Interleaved rounds: servers take turns under load, and are compared within a round only.

So other activity of the machine affects both sides of a comparison. One server at a time is loaded,
in short slices, after a slice for its warm-up.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import attrgetter

from benchmarks.load import CONNECTIONS, Sample, generator, load, wait_for_calm
from benchmarks.results import Target, circumstances, table
from benchmarks.servers import Program, Server

ROUNDS = 11
MAX_REPEATS = 6
SLICE_SECONDS = 1
MAX_WAITING = 45.0
"""Total seconds to wait for other processes to become idle."""
SATURATED = 0.9
"""Below this share of the time the server waits for the client, and rates say little."""
MAX_FOREIGN = 0.1
"""A round is repeated if other processes used more than this share of a core."""

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


def measure(subjects: Sequence[Subject], count: int) -> list[Round]:
    """Return the rounds with the least disturbance; disturbed rounds are repeated for a while."""
    measured: list[Round] = []
    patience = MAX_WAITING
    for number in range(count + MAX_REPEATS):
        order = subjects if number % 2 else subjects[::-1]
        # New processes each time: two processes of one program differ by several percent, because
        # of their memory layout.
        with _servers(order) as servers:
            for subject in order:
                load(servers[subject.program], subject.path, seconds=SLICE_SECONDS)
            patience -= wait_for_calm(most_foreign=MAX_FOREIGN, seconds=patience)
            samples = {s: load(servers[s.program], s.path, seconds=SLICE_SECONDS) for s in order}
        measured.append(samples)
        if sum(map(_undisturbed, measured)) == count:
            break
    return sorted(measured, key=_foreign)[:count]


@contextmanager
def _servers(subjects: Sequence[Subject]) -> Iterator[Mapping[Program, Server]]:
    with ExitStack() as stack:
        servers: dict[Program, Server] = {}
        for subject in subjects:
            if subject.program not in servers:
                servers[subject.program] = stack.enter_context(Server(subject.program))
            servers[subject.program].wait_for_200(subject.path)
        yield servers


def how(rounds: Sequence[Round], recipe: str) -> list[str]:
    """Return the conditions of the rounds."""
    calm = sum(map(_undisturbed, rounds))
    return circumstances(
        f"Command: `{recipe}`",
        f"Load: {generator()}, {CONNECTIONS} keep-alive connections; server and client each on "
        "a core of their own",
        f"Medians of {len(rounds)} interleaved rounds of {SLICE_SECONDS} s per row, each with new"
        f" processes; in {calm} "
        f"of them other processes took less than {MAX_FOREIGN:.0%} of a core",
    )


def _foreign(samples: Round) -> float:
    return max(sample.foreign for sample in samples.values())


def _undisturbed(samples: Round) -> bool:
    return _foreign(samples) <= MAX_FOREIGN


def _median(rounds: Sequence[Round], subject: Subject, what: Callable[[Sample], float]) -> float:
    return statistics.median(what(samples[subject]) for samples in rounds)


def ratios(rounds: Sequence[Round], ours: Subject, theirs: Subject) -> tuple[float, float]:
    """Return the medians of the rounds' ratios, by rate and by processor time."""
    by_rate = statistics.median(r[ours].rate / r[theirs].rate for r in rounds)
    by_cost = statistics.median(r[theirs].cost / r[ours].cost for r in rounds)
    return by_rate, by_cost


def target(rounds: Sequence[Round], ours: Subject, theirs: Subject, limit: float) -> Target:
    """Return the target that ``ours`` keeps at least ``limit`` of the rate of ``theirs``."""
    by_rate, by_cost = ratios(rounds, ours, theirs)
    saturated = all(_median(rounds, s, attrgetter("busy")) >= SATURATED for s in (ours, theirs))
    return Target(
        what=f"{ours} / {theirs}",
        measured=by_rate if saturated else by_cost,
        limit=limit,
        at_least=True,
        remark=f"{by_cost:.2f} by CPU" if saturated else f"by CPU; {by_rate:.2f} by rate",
    )


def subject_table(rounds: Sequence[Round], subjects: Sequence[Subject]) -> list[str]:
    """Return the lines of a table with the results of each subject."""
    return table(
        ("server and path", "requests/s", "CPU µs/request", "server busy"),
        (
            (
                str(subject),
                f"{_median(rounds, subject, attrgetter('rate')):,.0f}",
                f"{_median(rounds, subject, attrgetter('cost')):.1f}",
                f"{_median(rounds, subject, attrgetter('busy')):.0%}",
            )
            for subject in subjects
        ),
    )
