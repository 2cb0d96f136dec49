"""Connections to Postgres through asyncpg: pool, errors, retry policy and migrations."""

from viralfx.postgres.connections import Connector, PostgresConfig
from viralfx.postgres.credentials import CertificateError
from viralfx.postgres.database import PostgresDatabase
from viralfx.postgres.errors import PoolTimeoutError, explain, server_message
from viralfx.postgres.pool import without_values
from viralfx.postgres.retry import is_rolled_back, retry_policy

__all__ = [
    "CertificateError",
    "Connector",
    "PoolTimeoutError",
    "PostgresConfig",
    "PostgresDatabase",
    "explain",
    "is_rolled_back",
    "retry_policy",
    "server_message",
    "without_values",
]
