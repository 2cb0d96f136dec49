"""Measures the rate of jobs accepted over HTTP, compared with two bare handlers.

One stores nothing, the other does one INSERT.

The servers take turns in short slices, and are compared within a round. The server has one core,
its clients the other; Postgres and Redis share both.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from operator import attrgetter

from benchmarks.jobs.empty_task import TASK
from benchmarks.jobs.testbed import Testbed, testbed
from benchmarks.load import Sample, load, wait_for_calm
from benchmarks.results import Target, circumstances, command, publish, table, target_table
from benchmarks.servers import Program, Server, uvicorn, viralfx

ROUNDS = 11
SECONDS = 2
CLIENTS = (1, 32, 128)
MAX_WAITING = 45.0
MAX_FOREIGN = 0.1
PATH = "/api/v1/jobs"
BODY = json.dumps({"task": TASK, "payload": None})
BARE = "bare Litestar, 202 and forget"
INSERT = "bare Litestar, one INSERT"
VIRALFX = "viralfx serve, Postgres"
MANY_CLIENTS = 32
MIN_OF_BARE = 0.55
MIN_OF_INSERT = 0.5
READING = (
    "Accepted jobs are those answered with 202, which viralfx does after the commit. Ratios are "
    "medians of the rounds' own, each with the same number of clients; with one client a rate is "
    "one over the time of an answer. With many clients viralfx stores several jobs by one "
    "statement, and the bare handler does not."
)


@dataclass(frozen=True, slots=True)
class Subject:
    """A server under a number of clients."""

    program: Program
    clients: int


Round = Mapping[Subject, Sample]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(prog="just bench-accept", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"default: {SECONDS}")
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS)
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--dry", action="store_true", help="leave RESULTS.md as it is")
    options = parser.parse_args(arguments)
    with testbed() as bed:
        subjects, rounds = _measure(bed, options)
        where = str(bed)
    targets = _targets(rounds)
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
        *target_table(targets),
        "",
        READING,
    ]
    return publish("jobs.accept", lines, targets, check=options.check, record=not options.dry)


def _measure(bed: Testbed, options: argparse.Namespace) -> tuple[list[Subject], list[Round]]:
    alone = bed.our_environment(bed.ledger(), with_redis=False)
    both = bed.our_environment(bed.ledger())
    programs = (
        uvicorn(BARE, "benchmarks.peers.bare_accept"),
        uvicorn(
            INSERT, "benchmarks.peers.bare_insert", DATABASE_URL=bed.postgres.url(bed.database())
        ),
        viralfx(VIRALFX, **alone),
        viralfx("viralfx serve, Postgres and Redis", **both),
    )
    subjects = [Subject(program, count) for count in options.clients for program in programs]
    rounds: list[Round] = []
    patience = MAX_WAITING
    with ExitStack() as stack:
        servers = {program: stack.enter_context(Server(program)) for program in programs}
        for program, server in servers.items():
            server.wait_for_200(
                "/health/ready" if "viralfx" in program.name else "/schema/openapi.json",
                seconds=60,
            )
        for number in range(1 + options.rounds):
            patience -= wait_for_calm(most_foreign=MAX_FOREIGN, seconds=patience)
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
            if number:  # the first round is the warm-up
                rounds.append(samples)
    return subjects, rounds


def _ratio(rounds: Sequence[Round], one: tuple[str, int], other: str) -> float | None:
    """Compare a server with another one, under the same number of clients; None: not measured."""
    name, clients = one
    found = {(s.program.name, s.clients): s for s in rounds[0]}
    if not {(name, clients), (other, clients)} <= found.keys():
        return None
    ours, theirs = found[name, clients], found[other, clients]
    return statistics.median(r[ours].rate / r[theirs].rate for r in rounds)


def _targets(rounds: Sequence[Round]) -> list[Target]:
    wanted = ((MANY_CLIENTS, BARE, MIN_OF_BARE), (1, INSERT, MIN_OF_INSERT))
    return [
        Target(
            what=f"{VIRALFX} / {other}, {clients} client{'s' * (clients > 1)}",
            measured=ratio,
            limit=limit,
            at_least=True,
            remark="jobs accepted per second",
        )
        for clients, other, limit in wanted
        if (ratio := _ratio(rounds, (VIRALFX, clients), other)) is not None
    ]


def _table(subjects: Sequence[Subject], rounds: Sequence[Round]) -> list[str]:
    def median(subject: Subject, what: Callable[[Sample], float]) -> float:
        return statistics.median(what(samples[subject]) for samples in rounds)

    def ratio(subject: Subject, other: str) -> str:
        found = _ratio(rounds, (subject.program.name, subject.clients), other)
        return "" if found is None else f"{found:.2f}"

    return table(
        (
            "server",
            "clients",
            "accepted /s",
            "x bare 202",
            "x bare INSERT",
            "CPU µs/job",
            "server busy",
        ),
        (
            (
                subject.program.name,
                str(subject.clients),
                f"{median(subject, attrgetter('rate')):,.0f}",
                ratio(subject, BARE),
                ratio(subject, INSERT),
                f"{median(subject, attrgetter('cost')):.0f}",
                f"{median(subject, attrgetter('busy')):.0%}",
            )
            for subject in subjects
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
