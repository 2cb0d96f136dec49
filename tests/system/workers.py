"""Jobs in Postgres, as a deployment has them: the API in one process, workers in others."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tests import forked
from tests.servers.postgres import Database, PostgresServer
from tests.system.service import Service, running

LEASE, SWEEP = 2.0, 0.3
"""Seconds. A shorter lease may end while a worker lives, where its machine is busy."""


def environment_of(database: Database | PostgresServer, **more: str) -> dict[str, str]:
    """Return the variables of every process on a database that is migrated."""
    environment = {
        "DATABASE_URL": database.url() if isinstance(database, PostgresServer) else database.url,
        "TASK_MODULES": "tests.job_tasks",
        "JOB_LEASE": str(int(LEASE * 1000)),
        "JOB_SWEEP_INTERVAL": str(int(SWEEP * 1000)),
        **more,
    }
    migrated = forked.viralfx("migrate", environ=environment)
    assert migrated.returncode == 0, migrated.stderr
    return environment


@contextmanager
def worker(environment: Mapping[str, str], *arguments: str) -> Iterator[Service]:
    """Run a worker, ready."""
    with running(*arguments, program="worker", management=True, environment=environment) as process:
        yield process.wait_ready()


@contextmanager
def api(environment: Mapping[str, str], *arguments: str) -> Iterator[Service]:
    """Run the service, ready."""
    with running(*arguments, environment=environment) as service:
        yield service.wait_ready()
