"""Postgres through asyncpg: pool, check, close stage, saved state, job ledger."""

from viralfx.adapters.postgres.config import PostgresConfig
from viralfx.adapters.postgres.database import PostgresDatabase
from viralfx.adapters.postgres.errors import (
    PoolTimeoutError,
    explain,
    is_rolled_back,
    retry_policy,
    said_by_server,
)
from viralfx.adapters.postgres.health import PostgresHealthCheck
from viralfx.adapters.postgres.job_ledger import PostgresJobLedger
from viralfx.adapters.postgres.slow_queries import without_values
from viralfx.adapters.postgres.stages import ClosePostgres
from viralfx.adapters.postgres.state import PostgresStateStore

__all__ = [
    "ClosePostgres",
    "PoolTimeoutError",
    "PostgresConfig",
    "PostgresDatabase",
    "PostgresHealthCheck",
    "PostgresJobLedger",
    "PostgresStateStore",
    "explain",
    "is_rolled_back",
    "retry_policy",
    "said_by_server",
    "without_values",
]
