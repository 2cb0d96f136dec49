"""Measures the time from the acceptance of a job to its start, by transport of notifications.

NOTIFY, a Redis stream and polls take turns: each has processes and a database of its own, and gets
a job after a random pause. Both times are those of the one Postgres. Afterwards the idle workers'
transactions are counted.
"""

import argparse
import http.client
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from benchmarks.jobs.empty_task import TASK
from benchmarks.jobs.testbed import Testbed, testbed
from benchmarks.results import Target, circumstances, command, publish, table, target_table
from benchmarks.servers import Program, Server, viralfx, worker
from tests.servers.postgres import Database, transactions

JOBS = 300
WORKERS = 2
IDLE_SECONDS = 40.0
START_SECONDS = 15.0
"""Time until the workers have registered, and know of each other."""
FLUSH_SECONDS = 15.0
"""Time until idle sessions have reported the transactions of the jobs to the statistics."""
MAX_PAUSE_SECONDS = 0.25
"""More than the interval of polls, so that jobs come at any time between two of them."""
MAX_LATENCY_MS = 50.0
MAX_TRANSACTIONS = 1.0
NOTIFY, STREAM, POLLS = "NOTIFY", "Redis stream", "polls"
SETTINGS: Mapping[str, Mapping[str, str]] = {
    NOTIFY: {},
    STREAM: {},
    # The server is reached directly, but a pooler is declared, so that no worker listens.
    POLLS: {"DB_POOLER": "transaction"},
}
_LATENCIES = """
SELECT 1000 * extract(epoch FROM started_at - created_at)::float8
FROM viralfx_ops.viralfx_finished_jobs WHERE task = '{task}'
"""
READING = (
    "The time is from the statement that stored the job to the one that claimed it, both by the "
    "server's clock. Transactions are those of one worker, with lease, sweeps, polls and health "
    "checks."
)


@dataclass(frozen=True, slots=True)
class Setup:
    """The processes of one transport."""

    api: Server
    database: Database

    def submit(self) -> None:
        """Have a job accepted."""
        connection = http.client.HTTPConnection("127.0.0.1", self.api.port, timeout=30)
        try:
            body = json.dumps({"task": TASK, "payload": None})
            connection.request("POST", "/api/v1/jobs", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != http.client.ACCEPTED:
                raise RuntimeError(f"the job was answered with {answer.status}")
        finally:
            connection.close()

    def latencies(self) -> list[float]:
        """Return the milliseconds of all jobs."""
        rows = self.database.execute(_LATENCIES.format(task=TASK))
        return [float(latency) for (latency,) in rows]


@dataclass(frozen=True, slots=True)
class Seen:
    """The figures of one transport."""

    latencies: Sequence[float]
    """In milliseconds, in order."""
    transactions: float
    """Of one idle worker in a second."""

    @property
    def median(self) -> float:
        """The median latency."""
        return statistics.median(self.latencies)

    @property
    def p99(self) -> float:
        """The latency that one job in a hundred exceeds."""
        return self.latencies[min(len(self.latencies) - 1, round(len(self.latencies) * 0.99))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(prog="just bench-wakeup", description=__doc__)
    add = parser.add_argument
    add("--jobs", type=int, default=JOBS, help=f"of each transport; default: {JOBS}")
    add("--workers", type=int, default=WORKERS, help=f"of each transport; default: {WORKERS}")
    add("--seconds", type=float, default=IDLE_SECONDS, help="of idleness")
    add("--check", action="store_true", help="exit 1 when a target is missed")
    add("--dry", action="store_true", help="leave RESULTS.md as it is")
    options = parser.parse_args(arguments)
    with testbed() as bed:
        seen = _measure(bed, options.jobs, options.workers, options.seconds)
        where = str(bed)
    targets = [
        Target(
            what="p99 from acceptance to start without Redis",
            measured=seen[NOTIFY].p99,
            limit=MAX_LATENCY_MS,
            at_least=False,
            unit=" ms",
        ),
        Target(
            what="transactions a second of an idle worker without Redis",
            measured=seen[NOTIFY].transactions,
            limit=MAX_TRANSACTIONS,
            at_least=False,
        ),
    ]
    lines = [
        *circumstances(
            command("bench-wakeup"),
            where,
            f"{options.jobs} jobs and {options.workers} workers of each transport;"
            f" {options.seconds:g} s of idleness",
        ),
        "",
        *table(
            ("notified by", "p50 ms", "p99 ms", "longest ms", "transactions/s of an idle worker"),
            (
                (
                    transport,
                    f"{each.median:.1f}",
                    f"{each.p99:.1f}",
                    f"{each.latencies[-1]:.1f}",
                    f"{each.transactions:.2f}",
                )
                for transport, each in seen.items()
            ),
        ),
        "",
        *target_table(targets),
        "",
        READING,
    ]
    return publish("jobs.wakeup", lines, targets, check=options.check, record=not options.dry)


def _measure(bed: Testbed, jobs: int, workers: int, seconds: float) -> Mapping[str, Seen]:
    rng = random.Random(jobs)  # noqa: S311 - the same pauses in each run
    with ExitStack() as stack:
        setups = {
            transport: stack.enter_context(_running(bed, transport, workers))
            for transport in SETTINGS
        }
        time.sleep(START_SECONDS)
        for _ in range(jobs):
            for setup in rng.sample(list(setups.values()), len(setups)):
                time.sleep(rng.uniform(0.0, MAX_PAUSE_SECONDS))
                setup.submit()
        latencies = {transport: _finished(setup, jobs) for transport, setup in setups.items()}
        time.sleep(FLUSH_SECONDS)
        before = {transport: transactions(each.database) for transport, each in setups.items()}
        began = time.monotonic()
        time.sleep(seconds)
        return {
            transport: Seen(
                sorted(latencies[transport]),
                (transactions(each.database) - before[transport])
                / (time.monotonic() - began)
                / workers,
            )
            for transport, each in setups.items()
        }


@contextmanager
def _running(bed: Testbed, transport: str, workers: int) -> Iterator[Setup]:
    name = bed.ledger()
    # Otherwise the checks of the API process would count as transactions of the workers.
    environment = {
        **bed.our_environment(name, with_redis=transport == STREAM),
        **SETTINGS[transport],
    }
    quiet = {"DB_HEALTH_CHECK_INTERVAL": "600000", "HEALTH_CHECK_INTERVAL": "600000"}
    programs: list[Program] = [
        viralfx("viralfx serve", **environment, **quiet),
        *(worker(f"worker {number}", **environment) for number in range(workers)),
    ]
    with ExitStack() as stack:
        servers = [stack.enter_context(Server(program, anywhere=True)) for program in programs]
        for server in servers:
            server.wait_for_200("/health/ready", seconds=60)
        yield Setup(servers[0], Database(bed.postgres, name))


def _finished(setup: Setup, jobs: int) -> list[float]:
    deadline = time.monotonic() + 60.0
    while len(found := setup.latencies()) < jobs:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{len(found)} of {jobs} jobs are finished")
        time.sleep(0.1)
    return found


if __name__ == "__main__":
    sys.exit(main())
