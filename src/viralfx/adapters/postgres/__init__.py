"""Postgres through asyncpg: pool, check, close stage, saved state, job ledger and notifier."""

from viralfx.adapters.postgres.audit import PostgresAuditStore
from viralfx.adapters.postgres.claims import PostgresLeaseStore
from viralfx.adapters.postgres.connections import Connector, PostgresConfig
from viralfx.adapters.postgres.credentials import CertificateError
from viralfx.adapters.postgres.database import PostgresDatabase
from viralfx.adapters.postgres.errors import (
    PoolTimeoutError,
    explain,
    server_message,
)
from viralfx.adapters.postgres.fleet import PostgresFleetStore
from viralfx.adapters.postgres.health import PostgresHealthCheck
from viralfx.adapters.postgres.ledger import PostgresJobLedger
from viralfx.adapters.postgres.notifier import PostgresNotifier
from viralfx.adapters.postgres.pool import without_values
from viralfx.adapters.postgres.retry import is_rolled_back, retry_policy
from viralfx.adapters.postgres.shutdown import close_postgres
from viralfx.adapters.postgres.state import PostgresStateStore

__all__ = [
    "CertificateError",
    "Connector",
    "PoolTimeoutError",
    "PostgresAuditStore",
    "PostgresConfig",
    "PostgresDatabase",
    "PostgresFleetStore",
    "PostgresHealthCheck",
    "PostgresJobLedger",
    "PostgresLeaseStore",
    "PostgresNotifier",
    "PostgresStateStore",
    "close_postgres",
    "explain",
    "is_rolled_back",
    "retry_policy",
    "server_message",
    "without_values",
]
