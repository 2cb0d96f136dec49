"""Runs jobs under every fault at once, on real processes and servers.

Prints the results and every broken promise, and exits with 1 if there is one.
"""

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from benchmarks.results import circumstances, command, publish, table
from tests.chaos.clients import Clients
from tests.chaos.cluster import Cluster, cluster
from tests.chaos.faults import Faults
from tests.chaos.fleet import Fleet
from tests.chaos.tasks import EFFECTS_FILE
from tests.chaos.verdict import effects_in, every_job, judge
from tests.servers.pgbouncer import MODES
from tests.servers.redis import RedisServer, redis_server
from tests.system.service import command as viralfx

NOTIFY = "notify"
_SETTLED_WITHIN = 120.0
_EMPTY_LOOKS = 10
_EFFECTS = "CREATE TABLE chaos_effects (job text NOT NULL, number int NOT NULL)"
_WORKERS = 3
_LEASE = 4.0
_SETTINGS = {
    "TASK_MODULES": "tests.chaos.tasks",
    "JOB_LEASE": f"{_LEASE * 1000:.0f}",
    "JOB_SWEEP_INTERVAL": "1000",
    # Faults kill the workers here, not the jobs.
    "JOB_MAX_CRASHES": "1000",
    "HEALTH_CHECK_INTERVAL": "500",
    "DB_RECONNECT_DELAY": "500",
    "DB_MAX_RECONNECT_ATTEMPTS": "60",
    "SHUTDOWN_DRAIN_TIMEOUT": "3000",
}


@dataclass
class Report:
    """The results of a run, and the promises that were broken."""

    jobs: int = 0
    states: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    spared: list[str] = field(default_factory=list)
    """Faults that are possible here, and did not happen."""
    cut: int = 0
    """Connections to Postgres that were cut at the end of a statement."""
    refused: Counter[str] = field(default_factory=Counter)
    repeated: int = 0
    """Effects outside the database that happened more than once."""
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"jobs acknowledged {self.jobs}, states {dict(self.states)}",
            f"faults {dict(self.faults)}, connections cut at commits: {self.cut}",
            f"asked again after {dict(self.refused)}",
            f"effects outside the database repeated: {self.repeated}",
            f"{self.seconds:.0f} s, problems: {len(self.problems)}",
            *self.problems[:20],
        ]
        return "\n".join(lines)


async def suffer(
    jobs: int, seed: int, seconds: float, *, postgres: Cluster, redis: RedisServer | None
) -> Report:
    """Have ``jobs`` jobs accepted within about ``seconds`` while faults happen.

    Without Redis the workers are notified by NOTIFY. More jobs and seconds follow until each kind
    of fault has happened.
    """
    began, rng = time.monotonic(), random.Random(seed)  # noqa: S311 - to be repeated
    folder = Path(tempfile.mkdtemp(prefix="viralfx-chaos-"))
    file = folder / "effects"
    file.touch()
    database = postgres.create_database()
    environment = {
        **_SETTINGS,
        "DATABASE_URL": postgres.url(database),
        **({} if redis is None else {"REDIS_HOST": redis.host, "REDIS_PORT": str(redis.port)}),
        EFFECTS_FILE: os.fspath(file),
    }
    if postgres.pooler is not None:
        environment["DB_POOLER"] = postgres.pooler.mode
    migrated = viralfx(
        "migrate",
        environment={"DATABASE_URL": postgres.url(database, past_proxy=True)},
        fresh=True,
    )
    assert migrated.returncode == 0, migrated.stderr
    postgres.execute(_EFFECTS, database)
    fleet = Fleet(environment, folder, _WORKERS)
    try:
        await fleet.open()
        clients = Clients(fleet, rng)
        faults = Faults(fleet, postgres, redis, rng, lease=_LEASE)
        trouble = asyncio.create_task(faults.run(max(0.5, seconds / 60)))
        users = asyncio.create_task(
            clients.run(jobs, jobs / seconds, enough=lambda: not faults.spared())
        )
        done, _ = await asyncio.wait({trouble, users}, return_when=asyncio.FIRST_COMPLETED)
        trouble.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await trouble
        await users
        assert users in done
        unsettled = await _settled(fleet.api)
        found = await asyncio.to_thread(every_job, fleet.api)
        select = "SELECT job, number FROM chaos_effects"
        rows = await asyncio.to_thread(postgres.execute, select, database)
        effects = effects_in(rows, file)
        await fleet.close()
    finally:
        fleet.kill()
    report = Report(
        jobs=sum(1 for ids in clients.acknowledged.values() if ids),
        states=Counter(str(job["state"]) for job in found.values()),
        faults=faults.happened,
        spared=faults.spared(),
        cut=postgres.cut,
        refused=clients.refused,
        repeated=sum(count - 1 for count in effects.lines.values()),
        seconds=time.monotonic() - began,
        problems=[
            *unsettled,
            *clients.problems,
            *fleet.problems,
            *judge(clients.acknowledged, found, effects),
        ],
    )
    if report.problems:
        print(f"the logs are in {folder}")
    else:
        shutil.rmtree(folder)
    return report


async def _settled(api: str) -> list[str]:
    """Wait until no job waits or runs; return a problem if that does not happen."""
    left: list[Any] = []
    # A job that changes its state between two requests is in neither response.
    empty = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_SETTLED_WITHIN), httpx.AsyncClient(base_url=api) as client:
            while True:
                left = []
                for state in ("waiting", "active"):
                    try:
                        answer = await client.get("/api/v1/jobs", params={"state": state})
                        answer.raise_for_status()
                        left += answer.json()["items"]
                    except httpx.HTTPError as error:
                        left.append(repr(error))
                busy = [one for one in left if not _of_the_service(one)]
                empty = 0 if busy else empty + 1
                if empty == _EMPTY_LOOKS:
                    return []
                await asyncio.sleep(1 / 10)
    return [f"not settled within {_SETTLED_WITHIN:g} s: {left[:5]}"]


def _of_the_service(job: Any) -> bool:
    # Scheduled jobs of the service keep coming.
    return isinstance(job, dict) and not job["task"].startswith("chaos.")


CLAIM = (
    "No accepted job is lost, and each completes; its effect in the transaction of its outcome"
    " happens once."
)


def lines_of(report: Report, setting: str) -> Iterator[str]:
    """Yield the lines of a section of the results."""
    yield from circumstances(command("chaos"), setting)
    yield from ("", CLAIM, "")
    kinds = {
        "jobs": report.states,
        "fault": report.faults,
        "fault left out": Counter(report.spared),
        "asked again after": report.refused,
    }
    counts = {"jobs acknowledged": report.jobs}
    for kind, counted in kinds.items():
        counts |= {f"{kind}: {name}": number for name, number in sorted(counted.items())}
    counts |= {
        "connections cut at commits": report.cut,
        "effects outside the database that were repeated": report.repeated,
        "seconds": round(report.seconds),
        "problems": len(report.problems),
    }
    yield from table(("what", "number"), ((what, str(n)) for what, n in counts.items()))
    if report.problems:
        yield ""
    yield from (f"- {' '.join(problem.split())}" for problem in report.problems[:20])


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the arguments, run, print the report; return the exit code."""
    parser = argparse.ArgumentParser(prog="just chaos", description=__doc__)
    add = parser.add_argument
    add("jobs", type=int, help="jobs to be accepted at least")
    add("seed", type=int, help="of the random faults and jobs")
    add("seconds", type=float, help="in which they are accepted")
    add(
        "mode",
        nargs="?",
        choices=(*MODES, NOTIFY),
        help="a PgBouncer in that mode in front of Postgres; notify: no Redis",
    )
    add("--prepared", type=int, default=0, help="max_prepared_statements of the PgBouncer")
    add("--record", action="store_true", help="publish the report in RESULTS.md")
    options = parser.parse_args(arguments)
    jobs, seed, seconds, mode = options.jobs, options.seed, options.seconds, options.mode
    pooler = mode if mode in MODES else None
    if options.prepared and pooler is None:
        parser.error(f"--prepared needs a pooler: add {' or '.join(MODES)}")
    print(f"{jobs} jobs within {seconds:g} s, seed {seed}", flush=True)
    random_cuts = random.Random(seed)  # noqa: S311 - to be repeated
    with (
        cluster(random_cuts, pooler=pooler, prepared=options.prepared) as postgres,
        contextlib.nullcontext() if mode == NOTIFY else redis_server() as redis,
    ):
        report = asyncio.run(suffer(jobs, seed, seconds, postgres=postgres, redis=redis))
    print(report)
    where = {None: "Redis and Postgres", NOTIFY: "Postgres alone"}.get(mode) or (
        f"Redis, and PgBouncer in {mode} mode with max_prepared_statements {options.prepared}"
    )
    setting = f"{jobs} jobs within {seconds:g} s, seed {seed}; {_WORKERS} workers, {where}"
    name = " ".join(
        ["chaos", *([mode] if mode else []), *([str(options.prepared)] if pooler else [])]
    )
    publish(name, lines_of(report, setting), (), check=False, record=options.record)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
