"""Wires the Postgres adapter; imported only if ``DATABASE_URL`` is set."""

import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import msgspec

from viralfx.adapters.postgres import (
    CertificateError,
    Connector,
    PostgresConfig,
    PostgresDatabase,
    PostgresFleetStore,
    PostgresHealthCheck,
    PostgresJobLedger,
    PostgresLeaseStore,
    PostgresNotifier,
    PostgresStateStore,
    close_postgres,
    without_values,
)
from viralfx.domain.clock import Clock
from viralfx.domain.errors import ConfigurationError
from viralfx.domain.fleet import FleetStore
from viralfx.domain.jobs.ledger import Counts, JobLedger, LeaseStore
from viralfx.domain.jobs.notifier import JobNotifier
from viralfx.domain.operations import CHECK_SHARE, Backend, StateStore
from viralfx.settings import (
    CredentialsCallable,
    DatabaseAddress,
    DatabaseSettings,
    Settings,
)

_MAX_AGE_INTERVALS = 1.25
"""Check intervals for which one result of the health query serves both checks."""


def postgres_config(
    settings: Settings, ask_password: CredentialsCallable | None = None
) -> PostgresConfig:
    """Return address and settings of the database.

    ``ask_password`` returns its password for each connection. Raises :class:`ConfigurationError`
    if DATABASE_URL is missing or invalid.
    """
    try:
        address = settings.database_address
    except ValueError as error:
        raise ConfigurationError([f"DATABASE_URL: {error}"]) from None
    if address is None:
        raise ConfigurationError(["DATABASE_URL: not set, so there is no database"])
    return PostgresConfig(
        address=address,
        settings=settings.db,
        suspect_after=settings.health_check_timeout,
        url=settings.database_url,
        ask_password=ask_password,
    )


def migration_config(settings: Settings) -> PostgresConfig:
    """Return address and settings of the database for migrations.

    They are those of ``DATABASE_MIGRATION_URL``, which leads past a pooler, or else those of
    ``DATABASE_URL``. Raises :class:`ConfigurationError` if the one that counts is invalid.
    """
    try:
        address = settings.database_migration_address
    except ValueError as error:
        raise ConfigurationError([f"DATABASE_MIGRATION_URL: {error}"]) from None
    if address is None:
        return postgres_config(settings)
    address = _with_tls(settings, address)
    return PostgresConfig(
        address=address,
        settings=_past_pooler(settings.db, address),
        url=settings.database_migration_url,
        url_variable="DATABASE_MIGRATION_URL",
    )


def _past_pooler(settings: DatabaseSettings, address: DatabaseAddress) -> DatabaseSettings:
    """Return the settings for an ``address`` that leads past a pooler."""
    if not _has_password(address):
        return msgspec.structs.replace(settings, pooler="none")
    # DB_PASSWORD is that of the user in DATABASE_URL.
    return msgspec.structs.replace(settings, pooler="none", password=None)


def _with_tls(settings: Settings, address: DatabaseAddress) -> DatabaseAddress:
    """Return an ``address`` with the passphrase and versions of DATABASE_URL where it has none."""
    try:
        main = settings.database_address
    except ValueError:
        return address  # not the one that counts
    if main is None:
        return address
    return replace(
        address,
        key_password=address.key_password or main.key_password,
        tls_versions=address.tls_versions or main.tls_versions,
    )


def _has_password(address: DatabaseAddress) -> bool:
    return address.password is not None or address.passfile is not None


def wire_postgres(
    settings: Settings,
    clock: Clock,
    on_suspected_outage: Callable[[], None],
    ask_password: CredentialsCallable | None = None,
) -> tuple[PostgresDatabase, Counts, Backend]:
    """Wire the Postgres adapter; nothing is connected yet.

    The second result counts the queues for their health check; it shares a recent result of the
    database's health query.

    Raises :class:`ConfigurationError` for unusable certificates.
    """
    config = postgres_config(settings, ask_password)
    try:
        database = PostgresDatabase(config, clock=clock, on_suspected_outage=on_suspected_outage)
    except CertificateError as error:
        raise ConfigurationError([str(error)]) from None
    check = PostgresHealthCheck(
        database, clock, timeout=settings.health_check_timeout * CHECK_SHARE
    )
    max_age = settings.health_check_interval * _MAX_AGE_INTERVALS
    return (
        database,
        lambda: check.query.counts(max_age),
        Backend(
            check=check, resource=database, close=partial(close_postgres, database, check, clock)
        ),
    )


def clean_statement(statement: str) -> str:
    """Return a statement without its literal values."""
    return without_values(statement)


def job_ledger(database: PostgresDatabase, clock: Clock, *, notifies: bool) -> JobLedger:
    """Return the job ledger in the database; ``notifies``: whether workers listen to it."""
    return PostgresJobLedger(database, clock=clock, notifies=notifies)


def lease_store(database: PostgresDatabase) -> LeaseStore:
    """Return a store that renews leases from another thread; it has a connection of its own."""
    return PostgresLeaseStore(database)


def notifier(settings: Settings, database: PostgresDatabase, clock: Clock) -> JobNotifier:
    """Return a notifier over LISTEN and NOTIFY.

    It listens at ``DATABASE_LISTEN_URL`` if that is set. Raises :class:`ConfigurationError` if it
    is invalid, or for unusable certificates.
    """
    try:
        address = settings.database_listen_address
    except ValueError as error:
        raise ConfigurationError([f"DATABASE_LISTEN_URL: {error}"]) from None
    if address is None:
        may_listen = settings.db.pooler != "transaction"
        return PostgresNotifier(database, may_listen=may_listen, clock=clock)
    config = replace(
        database.config,
        address=_with_tls(settings, address),
        url=settings.database_listen_url,
        url_variable="DATABASE_LISTEN_URL",
        settings=_past_pooler(settings.db, address),
        # As DB_PASSWORD.
        ask_password=None if _has_password(address) else database.config.ask_password,
    )
    try:
        connector = Connector(config)
    except CertificateError as error:
        raise ConfigurationError([str(error)]) from None
    return PostgresNotifier(database, connector=connector, clock=clock)


def state_store(database: PostgresDatabase) -> StateStore:
    """Return the state store in the database; its key is the host name (the pod's name)."""
    return PostgresStateStore(database, socket.gethostname())


def fleet_store(database: PostgresDatabase) -> FleetStore:
    """Return the store of the fleet in the database."""
    return PostgresFleetStore(database)
