"""Jobs in Postgres as in a deployment: the API in one process, workers in others."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tests import forked
from tests.forked import FRESH
from tests.servers.postgres import Database, PostgresServer
from tests.system.service import Service, running

LEASE, SWEEP = 2.0, 0.3
"""Seconds. On a busy machine a shorter lease may end while its worker runs."""


def environment_of(database: Database | PostgresServer, **more: str) -> dict[str, str]:
    """Return the variables of every process on a database, which is migrated unless it is."""
    environment = {
        "DATABASE_URL": database.url() if isinstance(database, PostgresServer) else database.url,
        "TASK_MODULES": "tests.job_tasks",
        "JOB_LEASE": str(int(LEASE * 1000)),
        "JOB_SWEEP_INTERVAL": str(int(SWEEP * 1000)),
        **more,
    }
    if not (isinstance(database, Database) and _is_migrated(database)):
        migrated = forked.viralfx("migrate", environ=environment)
        assert migrated.returncode == 0, migrated.stderr
    return environment


def _is_migrated(database: Database) -> bool:
    # The copy of a migrated database: to ask costs a tenth of a run that finds nothing to do.
    return database.execute("select to_regclass('viralfx_ops.viralfx_migrations')") != [(None,)]


@contextmanager
def worker(
    environment: Mapping[str, str], *arguments: str, fresh: bool = FRESH
) -> Iterator[Service]:
    """Run a worker and wait until it is ready."""
    with running(
        *arguments, program="worker", management=True, environment=environment, fresh=fresh
    ) as process:
        yield process.wait_ready()


@contextmanager
def api(environment: Mapping[str, str], *arguments: str, fresh: bool = FRESH) -> Iterator[Service]:
    """Run the service and wait until it is ready."""
    with running(*arguments, environment=environment, fresh=fresh) as service:
        yield service.wait_ready()
