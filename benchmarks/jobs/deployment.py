"""Measures how late jobs start during a rolling deployment and its roll back.

A deployment adds a task and changes a payload. The API is replaced first, then worker by worker,
and back in the same order, while jobs are submitted. Workers with and without Redis take turns.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.jobs.testbed import Testbed, testbed
from benchmarks.results import Target, circumstances, command, publish, table, target_table
from tests.servers.postgres import Database
from tests.servers.waiting import wait_until
from tests.system.deployments import deploy_and_roll_back
from tests.system.service import Service

JOBS = 1000
ROUNDS = 2
MAX_DELAY_SECONDS = 1.0
TRANSPORTS = {"NOTIFY": False, "Redis stream": True}
"""By name: whether there is a Redis."""
READING = (
    "The delay of a job is the time from its acceptance, or from the registration of the first"
    " worker that knows its task and its payload if that is later, to its start, all by the"
    " server's clock."
)


@dataclass(frozen=True, slots=True)
class Seen:
    """The jobs of one deployment."""

    delays: Mapping[str, Sequence[float]]
    """In seconds and in order, by task and payload."""
    not_completed: int
    repeated: int
    """Jobs that spent an attempt."""

    @property
    def late(self) -> int:
        """How many started too late."""
        return sum(delay > MAX_DELAY_SECONDS for each in self.delays.values() for delay in each)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(prog="just bench-deployment", description=__doc__)
    add = parser.add_argument
    add("--jobs", type=int, default=JOBS, help=f"of each deployment; default: {JOBS}")
    add("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    add("--check", action="store_true", help="exit 1 when a target is missed")
    add("--dry", action="store_true", help="leave RESULTS.md as it is")
    options = parser.parse_args(arguments)
    seen: dict[str, list[Seen]] = {name: [] for name in TRANSPORTS}
    with testbed() as bed:
        for number in range(options.rounds):
            for name in sorted(TRANSPORTS, reverse=number % 2 == 1):
                seen[name].append(_measure(bed, options.jobs, with_redis=TRANSPORTS[name]))
        where = str(bed)
    everything = [each for rounds in seen.values() for each in rounds]
    targets = [
        Target(what=what, measured=measured, limit=0, at_least=False)
        for what, measured in (
            (
                f"jobs that start more than {MAX_DELAY_SECONDS:g} s beyond the first able worker",
                sum(each.late for each in everything),
            ),
            ("jobs that did not complete", sum(each.not_completed for each in everything)),
            ("jobs that spent an attempt", sum(each.repeated for each in everything)),
        )
    ]
    lines = [
        *circumstances(
            command("bench-deployment"),
            where,
            f"{options.jobs} jobs and two workers in each of {options.rounds} deployments for each"
            " transport; other settings are the defaults",
        ),
        "",
        *table(
            ("notified by; task and payload", "jobs", "p50 ms", "p99 ms", "longest ms"),
            (
                _row(f"{name}; {what}", sorted(d for each in rounds for d in each.delays[what]))
                for name, rounds in seen.items()
                for what in rounds[0].delays
            ),
        ),
        "",
        *target_table(targets),
        "",
        READING,
    ]
    return publish("jobs.deployment", lines, targets, check=options.check, record=not options.dry)


def _row(name: str, delays: Sequence[float]) -> Sequence[str]:
    at = (delays[len(delays) * 50 // 100], delays[len(delays) * 99 // 100], delays[-1])
    return (name, str(len(delays)), *(f"{1000 * each:.1f}" for each in at))


def _measure(bed: Testbed, jobs: int, *, with_redis: bool) -> Seen:
    name = bed.ledger()
    environment = {**bed.our_environment(name, with_redis=with_redis)}
    # The jobs do nothing, so each queue has the usual number of slots.
    del environment["TASK_MODULES"], environment["JOB_CONCURRENCY"]
    submitter = deploy_and_roll_back(
        Database(bed.postgres, name),
        environment,
        jobs,
        until_unknown=_until_unknown,
        until_known=lambda _: None,
    )
    found, delays = submitter.jobs(), submitter.delays()
    bed.drop(name)
    return Seen(
        delays,
        jobs - sum(each["state"] == "completed" for each in found),
        sum(each["attempts"] > 0 for each in found),
    )


def _until_unknown(service: Service) -> None:
    """Wait until the API warns of jobs that no worker can run."""

    def found() -> bool:
        message = service.get("/health/queues?fresh=1").json()["message"]
        return "no worker knows it" in str(message)

    wait_until(found, seconds=60.0, what="the check warns")


if __name__ == "__main__":
    sys.exit(main())
