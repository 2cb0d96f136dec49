"""Wires the traces, where they are wanted."""

from typing import TYPE_CHECKING

from viralfx.domain.operations import Operations
from viralfx.domain.resilience.retry_decision import listen_to_retries
from viralfx.domain.shutdown import Phase
from viralfx.settings import Settings
from viralfx.telemetry.redaction import Redaction, secrets_of
from viralfx.telemetry.tracing import start_tracing

if TYPE_CHECKING:
    from viralfx.adapters.postgres import PostgresDatabase
    from viralfx.adapters.redis import RedisClient
    from viralfx.telemetry.tracing.wiring import Tracing


def wire_tracing(settings: Settings, instance: str) -> "Tracing | None":
    """Begin to trace; None where no endpoint is named. ``instance`` is this process's name.

    Raises :class:`ConfigurationError` for values of ``OTEL_*`` that cannot be used.
    """
    clean_sql = None
    if settings.database_url is not None:
        # Not at the top: a process without Postgres does without its driver.
        from viralfx.bootstrap.postgres import clean_statement  # noqa: PLC0415

        clean_sql = clean_statement
    return start_tracing(
        instance=instance,
        environment=settings.environment,
        clean=Redaction(secrets_of(settings)).text,
        clean_sql=clean_sql,
    )


def trace(
    tracing: "Tracing",
    operations: Operations,
    *,
    database: "PostgresDatabase | None",
    redis: "RedisClient | None",
) -> None:
    """Have everything traced that was wired."""
    if database is not None:
        tracing.asyncpg()
    if redis is not None:
        tracing.redis(redis.redis)
    operations.breakers.subscribe(tracing.on_circuit)
    listen_to_retries(tracing.on_retry)
    operations.shutdown.subscribe(tracing.on_shutdown)
    # The runner's own stages are still to come, and are to be in the trace.
    operations.shutdown.register(Phase.CLOSE, "telemetry", tracing.stage, last=True)
