"""Jobs under every fault at once: ``python -m tests.chaos.ordeal JOBS SEED [SECONDS] [MODE]``.

With the mode of a pooler, ``session`` or ``transaction``, PgBouncer is in front of Postgres. With
``notify`` there is no Redis, and workers are notified by NOTIFY. It uses real processes and
servers, prints the results and every broken promise, and exits with 1 if there is one.
"""

import asyncio
import contextlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tests.chaos.clients import Clients
from tests.chaos.cluster import Cluster, cluster
from tests.chaos.faults import Faults
from tests.chaos.fleet import Fleet
from tests.chaos.tasks import EFFECTS_FILE
from tests.chaos.verdict import effects_in, every_job, judge
from tests.servers.pgbouncer import MODES
from tests.servers.redis import RedisServer, redis_server
from tests.system.service import command

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
    migrated = command(
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


def main() -> int:
    """Read the arguments, run, print the report; return the exit code."""
    given, mode = sys.argv[1:], None
    if given[-1] in (*MODES, NOTIFY):
        mode = given.pop()
    pooler = None if mode == NOTIFY else mode
    jobs, seed = int(given[0]), int(given[1])
    seconds = float(given[2]) if len(given) > 2 else jobs / 40
    print(f"{jobs} jobs within {seconds:g} s, seed {seed}", flush=True)
    random_cuts = random.Random(seed)  # noqa: S311 - to be repeated
    with (
        cluster(random_cuts, pooler=pooler) as postgres,
        contextlib.nullcontext() if mode == NOTIFY else redis_server() as redis,
    ):
        report = asyncio.run(suffer(jobs, seed, seconds, postgres=postgres, redis=redis))
    print(report)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
