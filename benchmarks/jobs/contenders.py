"""The compared job queues, and a run of each in processes of its own."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.jobs.cpu_seconds import SERVERS
from benchmarks.jobs.peer import DATABASE, REDIS
from benchmarks.jobs.testbed import Testbed
from benchmarks.jobs.trial import Trial
from benchmarks.servers import ROOT
from tests.servers.pgbouncer import PgBouncer
from tests.servers.ports import free_port

APART = ROOT / ".venv-bench-jobs" / "bin" / "python"
"""The interpreter of contenders whose dependencies conflict with ours."""
MIN_JOBS = 300
"""Several times the longest start of a worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A job queue, in one set-up."""

    name: str
    module: str
    durable: bool = False
    """Whether an accepted job survives the end of worker, Redis and machine."""
    apart: bool = False
    share: float = 1.0
    """The share of the jobs it gets, if all of them would take too long."""
    ours: bool = False
    """Whether it has our tables and reads our settings."""
    with_redis: bool = True
    finished: int = 0
    """Finished jobs in our ledger before the run."""
    pooler: str = ""
    """The mode of a PgBouncer between us and Postgres; empty: there is none."""

    def jobs(self, jobs: int) -> int:
        """Return the number of jobs for it."""
        return max(MIN_JOBS, round(jobs * self.share))

    @property
    def python(self) -> Path:
        """The interpreter with its packages."""
        return APART if self.apart else Path(sys.executable)


def _peer(name: str, module: str, share: float = 1.0, *, apart: bool = False) -> Contender:
    durable = module.endswith("_postgres")
    path = f"benchmarks.jobs.peers.{module}"
    return Contender(name=name, module=path, durable=durable, share=share, apart=apart)


def ours(name: str, *, with_redis: bool = True, finished: int = 0, pooler: str = "") -> Contender:
    """Return viralfx in one set-up."""
    return Contender(
        name=name,
        module="benchmarks.jobs.peers.ours",
        durable=True,
        ours=True,
        with_redis=with_redis,
        finished=finished,
        pooler=pooler,
    )


VIRALFX = ours("viralfx")
WITHOUT_REDIS = ours("viralfx without Redis", with_redis=False)
LEDGER_BROKER = Contender(
    name="taskiq LedgerBroker",
    module="benchmarks.jobs.peers.taskiq_ledger",
    durable=True,
    ours=True,
    with_redis=False,
)
TASKIQ_STREAM = _peer("taskiq RedisStream", "taskiq_stream")
PROCRASTINATE = _peer("procrastinate", "procrastinate_postgres", 0.1)
PEERS = (
    LEDGER_BROKER,
    TASKIQ_STREAM,
    _peer("taskiq list", "taskiq_list"),
    _peer("SAQ", "saq_redis", 0.3, apart=True),
    _peer("arq", "arq_redis", 0.3, apart=True),
    _peer("Celery", "celery_redis", 0.3),
    PROCRASTINATE,
    _peer("litestar-queues, Redis", "litestar_queues_redis", 0.1),
    _peer("litestar-queues, Postgres", "litestar_queues_postgres", 0.01),
)


def with_rows(rows: int) -> Contender:
    """Return viralfx with this number of finished jobs in the ledger."""
    return ours(f"viralfx, {rows:,} finished", finished=rows)


def behind(pooler: str) -> Contender:
    """Return viralfx behind a pooler in this mode, without prepared statements in it."""
    return ours(f"viralfx, PgBouncer in {pooler} mode", pooler=pooler)


class FailedTrialError(Exception):
    """A contender did not finish; the message holds its output."""


def run_trial(contender: Contender, bed: Testbed, *, jobs: int, one_by_one: int) -> Trial:
    """Run a contender on empty servers in its own processes. Raises :class:`FailedTrialError`."""
    with bed.pooler(contender.pooler) as pooler:
        return _run(contender, bed, pooler, jobs=jobs, one_by_one=one_by_one)


def _run(
    contender: Contender, bed: Testbed, pooler: PgBouncer | None, *, jobs: int, one_by_one: int
) -> Trial:
    jobs = contender.jobs(jobs)
    bed.redis.flush()
    servers = [bed.postgres, bed.redis, *([pooler] if pooler else [])]
    database = bed.ledger(contender.finished) if contender.ours else bed.database()
    environment = {
        REDIS: bed.redis.url(),
        DATABASE: bed.postgres.url(database),
        SERVERS: " ".join(str(server.pids[0]) for server in servers),
    }
    if contender.ours:
        environment |= bed.our_environment(database, with_redis=contender.with_redis, pooler=pooler)
        environment["MANAGEMENT_PORT"] = str(free_port())
    command = (contender.python, "-m", "benchmarks.jobs.trial", contender.module)
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
        bed.drop(database)
    if done.returncode:
        raise FailedTrialError(f"{contender.name}: {done.stdout[-1000:]}{done.stderr[-4000:]}")
    return Trial(**json.loads(done.stdout.splitlines()[-1]))
