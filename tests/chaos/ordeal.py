"""Jobs under every fault at once: ``python -m tests.chaos.ordeal JOBS SEED [SECONDS]``.

Real processes, real servers. Prints what happened, and every promise that was broken; exits with
1 if one was.
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
from tests.chaos.faults import Faults
from tests.chaos.fleet import Fleet
from tests.chaos.tasks import EFFECTS_FILE
from tests.chaos.verdict import effects_in, every_job, judge
from tests.servers.postgres import Database, PostgresServer, postgres_server
from tests.servers.redis import RedisServer, redis_server
from tests.system.service import command

_SETTLED_WITHIN = 120.0
_EMPTY_LOOKS = 10
_WORKERS = 3
_SETTINGS = {
    "TASK_MODULES": "tests.chaos.tasks",
    "JOB_LEASE": "4000",
    "JOB_SWEEP_INTERVAL": "1000",
    # Deaths here are the faults', not the jobs'.
    "JOB_MAX_CRASHES": "1000",
    "HEALTH_CHECK_INTERVAL": "500",
    "DB_RECONNECT_DELAY": "500",
    "DB_MAX_RECONNECT_ATTEMPTS": "60",
    "SHUTDOWN_DRAIN_TIMEOUT": "3000",
}


@dataclass
class Report:
    """What happened, and what was wrong."""

    jobs: int = 0
    states: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    repeated: int = 0
    """Effects outside the database that happened more than once."""
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"jobs acknowledged {self.jobs}, states {dict(self.states)}",
            f"faults {dict(self.faults)}",
            f"asked again after {dict(self.refused)}",
            f"effects outside the database repeated: {self.repeated}",
            f"{self.seconds:.0f} s, problems: {len(self.problems)}",
            *self.problems[:20],
        ]
        return "\n".join(lines)


async def suffer(
    jobs: int, seed: int, seconds: float, *, postgres: PostgresServer, redis: RedisServer
) -> Report:
    """Have ``jobs`` jobs accepted within about ``seconds`` while everything happens to them."""
    began, rng = time.monotonic(), random.Random(seed)  # noqa: S311 - to be repeated
    folder = Path(tempfile.mkdtemp(prefix="viralfx-chaos-"))
    file = folder / "effects"
    file.touch()
    database = Database(postgres, postgres.create_database())
    environment = {
        **_SETTINGS,
        "DATABASE_URL": database.url,
        "REDIS_HOST": redis.host,
        "REDIS_PORT": str(redis.port),
        EFFECTS_FILE: os.fspath(file),
    }
    migrated = command("migrate", environment=environment)
    assert migrated.returncode == 0, migrated.stderr
    database.execute("CREATE TABLE chaos_effects (job text NOT NULL, number int NOT NULL)")
    fleet = Fleet(environment, folder, _WORKERS)
    try:
        await fleet.open()
        clients, faults = Clients(fleet, rng), Faults(fleet, postgres, redis, rng)
        trouble = asyncio.create_task(faults.run(max(1.0, seconds / 40)))
        users = asyncio.create_task(clients.run(jobs, jobs / seconds))
        done, _ = await asyncio.wait({trouble, users}, return_when=asyncio.FIRST_COMPLETED)
        trouble.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await trouble
        await users
        assert users in done
        unsettled = await _settled(fleet.api)
        found = await asyncio.to_thread(every_job, fleet.api)
        rows = await asyncio.to_thread(database.execute, "SELECT job, number FROM chaos_effects")
        effects = effects_in(rows, file)
        await fleet.close()
    finally:
        fleet.kill()
    report = Report(
        jobs=sum(1 for ids in clients.acknowledged.values() if ids),
        states=Counter(str(job["state"]) for job in found.values()),
        faults=faults.happened,
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
    """Wait until no job waits or runs; return a problem where that never is so."""
    left: list[Any] = []
    # A job that goes from one state to the other between two questions is in neither answer.
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
    # What the service gives itself to do periodically has no end.
    return isinstance(job, dict) and not job["task"].startswith("chaos.")


def main() -> int:
    """Read the arguments, run, print; return the exit code."""
    jobs, seed = int(sys.argv[1]), int(sys.argv[2])
    seconds = float(sys.argv[3]) if len(sys.argv) > 3 else jobs / 40
    print(f"{jobs} jobs within {seconds:g} s, seed {seed}", flush=True)
    with postgres_server() as postgres, redis_server() as redis:
        report = asyncio.run(suffer(jobs, seed, seconds, postgres=postgres, redis=redis))
    print(report)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
