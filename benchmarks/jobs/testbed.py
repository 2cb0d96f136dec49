"""The Postgres and the Redis of a comparison, and the databases in that Postgres."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import asyncpg
from benchmarks.ledger import fill
from benchmarks.servers import ROOT
from tests.integration.postgres_clients import config_of, opened
from tests.servers import supply
from tests.servers.pgbouncer import PgBouncer, pgbouncer
from tests.servers.postgres import Database, PostgresServer, postgres_server
from tests.servers.redis import RedisServer, redis_server

POSTGRES = {
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    "shared_buffers": "256MB",
    "max_wal_size": "4GB",
}
"""Settings under which an acknowledged commit is as durable as in production."""
TASK_MODULE = "benchmarks.jobs.empty_task"
CONCURRENCY = 100

_MAX_SECONDS = 600.0


@dataclass
class Testbed:
    """A running Postgres and a running Redis."""

    postgres: PostgresServer
    redis: RedisServer
    _templates: dict[int, str] = field(default_factory=dict)
    _databases: int = 0

    def our_environment(
        self, database: str, *, with_redis: bool = True, pooler: PgBouncer | None = None
    ) -> Mapping[str, str]:
        """Return the variables for our processes, which reach Postgres through ``pooler``."""
        where = {"REDIS_HOST": self.redis.host, "REDIS_PORT": str(self.redis.port)}
        return {
            "DATABASE_URL": self._url(database, pooler),
            "DB_POOLER": "none" if pooler is None else pooler.mode,
            "TASK_MODULES": TASK_MODULE,
            "JOB_CONCURRENCY": str(CONCURRENCY),
            "LOG_LEVEL": "warn",
            # The finished jobs of a fill are old; deleting them is not part of a rate.
            "JOB_RETENTION": "0",
            "JOB_RETENTION_FAILED": "0",
            **(where if with_redis else {}),
        }

    @contextmanager
    def pooler(self, mode: str) -> Iterator[PgBouncer | None]:
        """Run a PgBouncer in front of Postgres; none if ``mode`` is empty."""
        if not mode:
            yield None
            return
        with pgbouncer(self.postgres, mode, max_prepared_statements=0) as pooler:
            yield pooler

    def _url(self, database: str, pooler: PgBouncer | None) -> str:
        if pooler is None:
            return self.postgres.url(database)
        return self.postgres.url(database, host=pooler.host, port=pooler.port)

    def ledger(self, finished: int = 0) -> str:
        """Return a new database with our tables and this number of finished jobs."""
        if finished not in self._templates:
            self._templates[finished] = self._filled(finished)
        return self._create(self._templates[finished])

    def database(self) -> str:
        """Return a new, empty database."""
        return self._create("template0")

    def drop(self, database: str) -> None:
        """Remove a database."""
        asyncio.run(self._execute(f"DROP DATABASE {database} WITH (FORCE)"))

    def _filled(self, rows: int) -> str:
        if not rows:
            database = self.database()
            subprocess.run(
                [sys.executable, "-m", "viralfx", "migrate"],
                cwd=ROOT,
                env={**os.environ, **self.our_environment(database)},
                check=True,
                stdout=subprocess.DEVNULL,
            )
            return database
        database = self.ledger()
        asyncio.run(self._fill(database, rows))
        return database

    async def _fill(self, database: str, rows: int) -> None:
        async with opened(
            config_of(Database(self.postgres, database), statement_timeout=0)
        ) as pool:
            await fill(pool, rows)

    def _create(self, template: str) -> str:
        self._databases += 1
        name = f"bench_{self._databases}"
        # A copy of the files, after a checkpoint, so that no run pays for an earlier one.
        copy = f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy"
        asyncio.run(self._execute(copy))
        return name

    async def _execute(self, statement: str) -> None:
        # Without a time limit: the server's own method has one for tests.
        connection = await asyncpg.connect(self.postgres.url(), command_timeout=_MAX_SECONDS)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in POSTGRES.items())
        servers = f"Postgres {supply.chosen().postgres}, Redis {supply.chosen().redis}"
        return f"{servers}, which keeps nothing on disk; {settings}"


@contextmanager
def testbed() -> Iterator[Testbed]:
    """Run both servers."""
    with postgres_server(settings=POSTGRES) as postgres, redis_server() as redis:
        yield Testbed(postgres, redis)
