"""Who takes part, and how one of them is let into the arena."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.jobs.arena import Arena
from benchmarks.jobs.bout import Bout
from benchmarks.jobs.peer import DATABASE, REDIS
from benchmarks.jobs.servers_cpu import SERVERS
from benchmarks.servers import ROOT
from tests.servers.ports import free_port

APART = ROOT / ".venv-bench-jobs" / "bin" / "python"
"""The interpreter of those whose dependencies do not go with ours."""
LEAST_JOBS = 300
"""Several times what a worker may take before it runs the first one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A job queue, in one set-up."""

    name: str
    module: str
    durable: bool = False
    """Whether a job that was accepted survives the death of worker, Redis and machine."""
    apart: bool = False
    share: float = 1.0
    """How many of the jobs it gets, where all of them would take too long."""
    ours: bool = False
    with_redis: bool = True
    finished: int = 0
    """Finished jobs in our ledger before."""

    def jobs(self, jobs: int) -> int:
        """Return how many of so many jobs it gets."""
        return max(LEAST_JOBS, round(jobs * self.share))

    @property
    def python(self) -> Path:
        """The interpreter that has it installed."""
        return APART if self.apart else Path(sys.executable)


def _peer(name: str, module: str, share: float = 1.0, *, apart: bool = False) -> Contender:
    durable = module.endswith("_postgres")
    path = f"benchmarks.jobs.peers.{module}"
    return Contender(name=name, module=path, durable=durable, share=share, apart=apart)


def ours(name: str, *, with_redis: bool = True, finished: int = 0) -> Contender:
    """Return ours in one set-up."""
    return Contender(
        name=name,
        module="benchmarks.jobs.peers.ours",
        durable=True,
        ours=True,
        with_redis=with_redis,
        finished=finished,
    )


OURS = ours("viralfx")
WITHOUT_REDIS = ours("viralfx without Redis", with_redis=False)
TASKIQ_STREAM = _peer("taskiq RedisStream", "taskiq_stream")
PROCRASTINATE = _peer("procrastinate", "procrastinate_postgres", 0.3)
PEERS = (
    TASKIQ_STREAM,
    _peer("taskiq list", "taskiq_list"),
    _peer("SAQ", "saq_redis", apart=True),
    _peer("arq", "arq_redis", apart=True),
    _peer("Celery", "celery_redis"),
    PROCRASTINATE,
    _peer("litestar-queues, Redis", "litestar_queues_redis", 0.3),
    _peer("litestar-queues, Postgres", "litestar_queues_postgres", 0.03),
)


def with_rows(rows: int) -> Contender:
    """Return ours with so many finished jobs in the ledger."""
    return ours(f"viralfx, {rows:,} finished", finished=rows)


class FailedBoutError(Exception):
    """A contender did not finish; the message holds what it said."""


def fight(contender: Contender, arena: Arena, *, jobs: int, one_by_one: int) -> Bout:
    """Let a contender into an empty arena, in processes of its own.

    Raises :class:`FailedBoutError`.
    """
    jobs = contender.jobs(jobs)
    arena.redis.flush()
    database = arena.ledger(contender.finished) if contender.ours else arena.database()
    environment = {
        REDIS: arena.redis.url(),
        DATABASE: arena.postgres.url(database),
        SERVERS: f"{arena.postgres.pids[0]} {arena.redis.pids[0]}",
    }
    if contender.ours:
        environment |= arena.our_environment(database, with_redis=contender.with_redis)
        environment["MANAGEMENT_PORT"] = str(free_port())
    command = (contender.python, "-m", "benchmarks.jobs.bout", contender.module)
    try:
        done = subprocess.run(
            [*command, str(jobs), str(min(one_by_one, jobs // 3))],
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        arena.drop(database)
    if done.returncode:
        raise FailedBoutError(f"{contender.name}: {done.stdout[-1000:]}{done.stderr[-4000:]}")
    return Bout(**json.loads(done.stdout.splitlines()[-1]))
