"""Wires the Postgres adapter; imported only where DATABASE_URL is set."""

import socket
from collections.abc import Callable

from viralfx.adapters.postgres import (
    ClosePostgres,
    PostgresConfig,
    PostgresDatabase,
    PostgresHealthCheck,
    PostgresJobLedger,
    PostgresStateStore,
    without_values,
)
from viralfx.bootstrap.backend import CHECK_SHARE, Backend, unusable_certificates
from viralfx.domain.clock import Clock
from viralfx.domain.errors import ConfigurationError
from viralfx.domain.jobs.ledger import Counts, JobLedger
from viralfx.domain.state import StateStore
from viralfx.settings import Settings

_SHARED_FOR = 1.25
"""Intervals for which one answer serves two checks: the later one need not ask just before it."""


def postgres_config(settings: Settings) -> PostgresConfig:
    """Return how Postgres is reached.

    Raises :class:`ConfigurationError` when DATABASE_URL is missing or cannot be understood.
    """
    try:
        address = settings.database_address
    except ValueError as error:
        raise ConfigurationError([f"DATABASE_URL: {error}"]) from None
    if address is None:
        raise ConfigurationError(["DATABASE_URL: not set, so there is no database"])
    db = settings.db
    return PostgresConfig(
        host=address.host,
        port=address.port,
        user=address.user,
        password=address.password if db.password is None else db.password.value,
        database=address.database,
        schema=address.schema,
        application_name=address.application_name,
        tls_mode=db.tls_mode,
        tls_ca_file=db.tls_ca_file,
        pool_min=db.pool_min,
        pool_max=db.pool_max,
        pool_timeout=db.pool_timeout / 1000,
        connection_timeout=db.connection_timeout / 1000,
        statement_timeout=db.statement_timeout / 1000,
        slow_query_threshold=db.slow_query_threshold / 1000,
        doubt_after=settings.health_check_timeout / 1000,
        connect_attempts=db.max_reconnect_attempts,
        connect_delay=db.reconnect_delay / 1000,
    )


def wire_postgres(
    settings: Settings, clock: Clock, on_doubt: Callable[[], None]
) -> tuple[PostgresDatabase, Counts, Backend]:
    """Wire the Postgres adapter; nothing is connected yet.

    Returns beside it how the health check of the queues counts them: where the database was asked
    within an interval, its answer holds the counts already.

    Raises :class:`ConfigurationError` for certificates that cannot be used.
    """
    config = postgres_config(settings)
    try:
        database = PostgresDatabase(config, clock=clock, on_doubt=on_doubt)
    except OSError as error:
        raise unusable_certificates("DB_TLS_CA_FILE", config.tls_ca_file, error) from None
    check = PostgresHealthCheck(
        database, clock, timeout=settings.health_check_timeout / 1000 * CHECK_SHARE
    )
    max_age = settings.health_check_interval / 1000 * _SHARED_FOR
    return (
        database,
        lambda: check.question.counts(max_age),
        Backend(check=check, resource=database, close=ClosePostgres(database, check, clock)),
    )


def clean_statement(statement: str) -> str:
    """Return a statement without the values in it, for whoever shows it to people."""
    return without_values(statement)


def job_ledger(database: PostgresDatabase, clock: Clock) -> JobLedger:
    """Keep jobs in the database."""
    return PostgresJobLedger(database, clock=clock)


def state_store(database: PostgresDatabase) -> StateStore:
    """Keep saved state in the database, under this machine's name: in Kubernetes, the pod's."""
    return PostgresStateStore(database, socket.gethostname())
