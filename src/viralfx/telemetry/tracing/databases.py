"""Spans of statements and commands, by OpenTelemetry's own instrumentation of the drivers.

Each is imported only by those who use the driver: it imports that.
"""

from typing import Any

from opentelemetry.trace import TracerProvider


def trace_asyncpg(provider: TracerProvider) -> None:
    """Have every connection make spans, of whichever pool: the driver is changed as a whole.

    Doing it again has them go to another provider.
    """
    from opentelemetry.instrumentation.asyncpg import AsyncPGInstrumentor  # noqa: PLC0415

    instrumentor = AsyncPGInstrumentor()  # type: ignore[no-untyped-call]
    if instrumentor.is_instrumented_by_opentelemetry:
        instrumentor.uninstrument()
    instrumentor.instrument(tracer_provider=provider)


def trace_redis(client: Any, provider: TracerProvider) -> None:
    """Have a client of redis-py make spans."""
    from opentelemetry.instrumentation.redis import RedisInstrumentor  # noqa: PLC0415

    RedisInstrumentor.instrument_client(client, tracer_provider=provider)
