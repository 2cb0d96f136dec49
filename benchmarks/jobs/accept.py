"""How fast jobs are accepted over HTTP, next to a bare handler that keeps nothing.

The servers take turns in short slices, and are compared within a round. The server has one core,
its clients the other; Postgres and Redis run where there is time.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from operator import attrgetter

from benchmarks.jobs.arena import Arena, arena
from benchmarks.jobs.noop import TASK
from benchmarks.load import Sample, load, wait_for_calm
from benchmarks.results import circumstances, command, publish, table
from benchmarks.servers import Program, Server, uvicorn, viralfx

ROUNDS = 11
SECONDS = 2
CLIENTS = (1, 32, 128)
MOST_WAITING = 45.0
MOST_FOREIGN = 0.1
PATH = "/api/v1/jobs"
BODY = json.dumps({"task": TASK, "payload": None})
BARE = uvicorn("bare Litestar, 202 and forget", "benchmarks.peers.bare_accept")
READING = (
    "Accepted is what was answered with 202, which ours does after the commit. Ratios are medians "
    "of the rounds' own, each with the same number of clients; with one client a rate is one over "
    "the time of an answer."
)


@dataclass(frozen=True, slots=True)
class Subject:
    """A server under so many clients."""

    program: Program
    clients: int


Round = Mapping[Subject, Sample]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(prog="just bench-accept", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"default: {SECONDS}")
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS)
    parser.add_argument("--dry", action="store_true", help="leave RESULTS.md as it is")
    options = parser.parse_args(arguments)
    with arena() as ground:
        subjects, rounds = _measure(ground, options)
        where = str(ground)
    lines = [
        *circumstances(
            command("bench-accept"),
            where,
            f"Load: benchmarks/keepalive.py posts `{BODY}`; server and clients each on a core of "
            "their own",
            f"Medians of {len(rounds)} interleaved rounds of {options.seconds} s per row",
        ),
        "",
        *_table(subjects, rounds),
        "",
        READING,
    ]
    return publish("jobs.accept", lines, (), check=False, record=not options.dry)


def _measure(ground: Arena, options: argparse.Namespace) -> tuple[list[Subject], list[Round]]:
    alone = ground.our_environment(ground.ledger(), with_redis=False)
    both = ground.our_environment(ground.ledger())
    programs = (
        BARE,
        viralfx("viralfx serve, Postgres", **alone),
        viralfx("viralfx serve, Postgres and Redis", **both),
    )
    subjects = [Subject(program, count) for count in options.clients for program in programs]
    rounds: list[Round] = []
    patience = MOST_WAITING
    with ExitStack() as stack:
        servers = {program: stack.enter_context(Server(program)) for program in programs}
        for program, server in servers.items():
            server.wait_for_200(
                "/schema/openapi.json" if program is BARE else "/health/ready", seconds=60
            )
        for number in range(1 + options.rounds):
            patience -= wait_for_calm(most_foreign=MOST_FOREIGN, seconds=patience)
            samples = {
                subject: load(
                    servers[subject.program],
                    PATH,
                    seconds=options.seconds,
                    posted=BODY,
                    connections=subject.clients,
                )
                for subject in (subjects if number % 2 else subjects[::-1])
            }
            if number:  # the first one warms up
                rounds.append(samples)
    return subjects, rounds


def _table(subjects: Sequence[Subject], rounds: Sequence[Round]) -> list[str]:
    def median(subject: Subject, what: Callable[[Sample], float]) -> float:
        return statistics.median(what(samples[subject]) for samples in rounds)

    def ratio(subject: Subject) -> float:
        bare = Subject(BARE, subject.clients)
        return statistics.median(r[subject].rate / r[bare].rate for r in rounds)

    return table(
        ("server", "clients", "accepted /s", "x bare", "CPU µs/job", "server busy"),
        (
            (
                subject.program.name,
                str(subject.clients),
                f"{median(subject, attrgetter('rate')):,.0f}",
                f"{ratio(subject):.2f}",
                f"{median(subject, attrgetter('cost')):.0f}",
                f"{median(subject, attrgetter('busy')):.0%}",
            )
            for subject in subjects
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
