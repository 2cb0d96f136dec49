"""Counts the messages of taskiq that never run when their workers are killed.

LedgerBroker and taskiq's own RedisStreamBroker take turns: each gets messages for one
``taskiq worker``, which is killed several times and started again at once. Afterwards the worker
has time to run what is left.
"""

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.jobs.kill_tasks import BROKER, LEDGER, RUNS, STREAM, TASK_SECONDS
from benchmarks.jobs.testbed import Testbed, testbed
from benchmarks.results import Target, circumstances, command, publish, table, target_table
from benchmarks.servers import ROOT

MESSAGES = 1000
KILLS = 5
LEFT_SECONDS = 60.0
MODULE = "benchmarks.jobs.kill_tasks"
LEASE_SECONDS = 5
READING = (
    "Lost are the messages that did not run within {seconds:g} s after the last one that did. The"
    " stream broker reads 100 messages at once, and hands those of a dead worker on after ten"
    " minutes by default (`idle_timeout`), once a new message comes. Run again are messages that a"
    " killed worker had just finished."
)


@dataclass(frozen=True, slots=True)
class Seen:
    """The fate of the messages of one broker."""

    lost: int
    again: int
    """Runs beyond the first of each message."""
    seconds: float
    """Until the last message that ran."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(prog="just bench-taskiq-kill", description=__doc__)
    add = parser.add_argument
    add("--messages", type=int, default=MESSAGES, help=f"of each broker; default: {MESSAGES}")
    add("--kills", type=int, default=KILLS, help=f"of each worker; default: {KILLS}")
    add("--seconds", type=float, default=LEFT_SECONDS, help="for what is left; default: 60")
    add("--check", action="store_true", help="exit 1 when a target is missed")
    add("--dry", action="store_true", help="leave RESULTS.md as it is")
    options = parser.parse_args(arguments)
    with testbed() as bed:
        seen = {
            name: _measure(bed, name, options.messages, options.kills, options.seconds)
            for name in (LEDGER, STREAM)
        }
        where = str(bed)
    targets = [
        Target(
            what="messages that LedgerBroker loses",
            measured=seen[LEDGER].lost,
            limit=0,
            at_least=False,
        )
    ]
    lines = [
        *circumstances(
            command("bench-taskiq-kill"),
            where,
            f"{options.messages} messages of {TASK_SECONDS:g} s and {options.kills} kills of each;"
            f" `taskiq worker --workers 1 --max-async-tasks 10`; JOB_LEASE {LEASE_SECONDS} s",
        ),
        "",
        *table(
            ("broker", "sent", "lost", "run again", "seconds"),
            (
                (
                    name,
                    str(options.messages),
                    str(each.lost),
                    str(each.again),
                    f"{each.seconds:.1f}",
                )
                for name, each in seen.items()
            ),
        ),
        "",
        *target_table(targets),
        "",
        READING.format(seconds=options.seconds),
    ]
    return publish("jobs.kill", lines, targets, check=options.check, record=not options.dry)


def _measure(bed: Testbed, name: str, messages: int, kills: int, patience: float) -> Seen:
    bed.redis.flush()
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder, "runs")
        runs.touch()
        environment = {
            **os.environ,
            **bed.our_environment(bed.ledger(), with_redis=False),
            "BENCH_REDIS_URL": bed.redis.url(),
            "JOB_CONCURRENCY": "10",
            "JOB_LEASE": str(LEASE_SECONDS * 1000),
            BROKER: name,
            RUNS: str(runs),
        }
        environment.pop("TASK_MODULES")
        began = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "benchmarks.jobs.kill", "--send", str(messages)],
            cwd=ROOT,
            env=environment,
            check=True,
        )
        for kill in range(1, kills + 1):
            with _worker(environment):
                _wait(runs, messages * kill // (kills + 1), patience)
        with _worker(environment):
            _wait(runs, messages, patience)
        counted = Counter(runs.read_text(encoding="utf-8").split())
        ended = runs.stat().st_mtime - (time.time() - time.monotonic()) - began
    return Seen(messages - len(counted), counted.total() - len(counted), ended)


@contextmanager
def _worker(environment: Mapping[str, str]) -> Iterator[None]:
    options = "--workers 1 --max-async-tasks 10 --log-level WARNING"
    process = subprocess.Popen(
        [sys.executable, "-m", "taskiq", "worker", f"{MODULE}:broker", *options.split()],
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(runs: Path, messages: int, patience: float) -> None:
    """Wait until this many messages ran, or none ran for some time."""
    seen, since = 0, time.monotonic()
    while seen < messages and time.monotonic() - since < patience:
        now = len(set(runs.read_text(encoding="utf-8").split()))
        if now > seen:
            seen, since = now, time.monotonic()
        time.sleep(0.05)


async def _send(messages: int) -> None:
    from benchmarks.jobs.kill_tasks import broker, run  # noqa: PLC0415 - in the sender alone

    async with broker:
        for number in range(messages):
            await run.kiq(number)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--send"]:
        asyncio.run(_send(int(sys.argv[2])))
        sys.exit()
    sys.exit(main())
