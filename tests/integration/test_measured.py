"""Metrics of Postgres, Redis and webhooks, wired as in the service."""

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest
from tests.servers.fault_proxy import BLACKHOLE, PASS
from tests.servers.fixtures import FaultProxies
from tests.servers.postgres import Database
from tests.servers.redis import RedisServer
from tests.servers.waiting import until
from tests.unit.metrics.reading import value

from viralfx.bootstrap import Assembly, assemble
from viralfx.postgres.database import Lease
from viralfx.settings import read_settings

DURATION = "db_client_operation_duration_seconds_count"
FAILED, GAVE_UP = "viralfx_retry_failed_attempts_total", "viralfx_retry_gave_up_total"


@pytest.fixture
async def assembly(migrated_database: Database, redis: RedisServer) -> AsyncIterator[Assembly]:
    """Return the wired services on both servers, with an open pool."""
    assembly = assemble(
        read_settings(
            {
                "DATABASE_URL": migrated_database.url,
                "REDIS_HOST": redis.host,
                "REDIS_PORT": str(redis.port),
            }
        )
    )
    assert assembly.database is not None
    assert assembly.redis is not None
    await assembly.database.open()
    yield assembly
    await assembly.database.close()
    await assembly.redis.close()


async def test_statements_and_commands_are_timed_by_name(assembly: Assembly) -> None:
    """Each finished one, with its error if any."""
    assert assembly.database is not None
    assert assembly.redis is not None
    registry, client = assembly.metrics.registry, assembly.redis.redis
    async with assembly.database.acquire() as connection:
        for _ in range(3):
            await connection.fetch("values (1)")
        with pytest.raises(asyncpg.UndefinedTableError):
            await connection.execute("DELETE FROM nowhere")
    await client.set("key", "text")
    await client.get("key")
    with pytest.raises(Exception, match="WRONGTYPE"):
        await client.rpush("key", "x")
    seen = {
        name: value(registry, DURATION, db_system_name=system, db_operation_name=name)
        for system, name in (
            ("postgresql", "VALUES"),
            ("postgresql", "DELETE"),
            ("redis", "SET"),
            ("redis", "GET"),
            ("redis", "RPUSH"),
        )
    }
    errors = {"db_system_name": "postgresql", "error_type": "UndefinedTableError"}

    assert seen == {"VALUES": 3, "DELETE": 1, "SET": 1, "GET": 1, "RPUSH": 1}
    assert value(registry, "viralfx_db_client_errors_total", **errors) == 1
    assert value(registry, "viralfx_redis_requests_total") == 2
    assert value(registry, "viralfx_redis_failed_requests_total") == 1


async def test_queue_metrics_need_current_counts(
    migrated_database: Database, fault_proxy: FaultProxies
) -> None:
    """They are missing during an outage of the database, and return after it."""
    proxy = fault_proxy(migrated_database.server.port)
    name, server = migrated_database.name, migrated_database.server
    settings = read_settings(
        {
            "DATABASE_URL": server.url(name, host=proxy.host, port=proxy.port),
            "HEALTH_CHECK_INTERVAL": "100",
            "HEALTH_CHECK_TIMEOUT": "500",
        }
    )
    assembly = assemble(settings)
    registry = assembly.metrics.registry

    def waiting() -> float | None:
        return value(registry, "viralfx_queue_jobs", queue="default", state="waiting")

    await assembly.operations.start()
    try:
        await until(lambda: waiting() == 0)
        proxy.mode = BLACKHOLE
        await until(lambda: waiting() is None)
        proxy.mode = PASS
        await until(lambda: waiting() == 0)
    finally:
        proxy.mode = PASS
        await assembly.operations.shutdown.run()


async def test_pool_metrics_are_current(assembly: Assembly) -> None:
    """Acquired connections are active."""
    assert assembly.database is not None
    registry = assembly.metrics.registry
    name = "viralfx_database_pool_connections"
    before = value(registry, name, state="active")
    async with assembly.database.acquire():
        during = value(registry, name, state="active")

    assert (before, during) == (0, 1)
    assert value(registry, "viralfx_database_pool_connections_max") == 10


async def test_retries_of_the_database_are_counted(assembly: Assembly) -> None:
    """Successful ones, and those that gave up."""
    assert assembly.database is not None
    registry, attempts = assembly.metrics.registry, 0

    async def once(_: Lease) -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise asyncpg.SerializationError

    async def never(_: Lease) -> None:
        raise asyncpg.UniqueViolationError

    await assembly.database.execute_with_retry(once)
    with pytest.raises(asyncpg.UniqueViolationError):
        await assembly.database.execute_with_retry(never)

    assert value(registry, FAILED, operation="database") == 2
    assert value(registry, "viralfx_retry_delay_seconds_count", operation="database") == 1
    assert value(registry, GAVE_UP, operation="database", reason="permanent") == 1


async def test_retries_of_the_ledger_are_counted(
    assembly: Assembly, migrated_database: Database
) -> None:
    """A connection lost during a ledger call costs one more attempt."""
    registry, service = assembly.metrics.registry, assembly.jobs.service
    accepting = asyncio.create_task(service.submit("default.prune", None))
    accepted = await accepting
    migrated_database.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where datname = current_database() and pid <> pg_backend_pid()"
    )
    again = await service.get(accepted.job.id)
    await until(lambda: value(registry, FAILED, operation="ledger"))

    assert again.id == accepted.job.id
    labels = {"queue": "default", "task": "default.prune"}
    assert value(registry, "viralfx_jobs_accepted_total", **labels) == 1
