"""Postgres for operations: check, close stage, saved state, fleet and audit trail."""

from viralfx.adapters.postgres.audit import PostgresAuditStore
from viralfx.adapters.postgres.fleet import PostgresFleetStore
from viralfx.adapters.postgres.health import PostgresHealthCheck
from viralfx.adapters.postgres.shutdown import close_postgres
from viralfx.adapters.postgres.state import PostgresStateStore

__all__ = [
    "PostgresAuditStore",
    "PostgresFleetStore",
    "PostgresHealthCheck",
    "PostgresStateStore",
    "close_postgres",
]
