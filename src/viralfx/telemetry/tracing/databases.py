"""Spans of statements and commands, by OpenTelemetry's own instrumentation of the drivers.

Each is imported only by those who use the driver: it imports that.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable
from functools import partial
from types import MethodType
from typing import Any, TypeAlias

from opentelemetry.trace import StatusCode, TracerProvider, get_current_span

from viralfx.telemetry.tracing.variables import as_the_library_reads

_Method: TypeAlias = Callable[..., Awaitable[object]]
_Arguments: TypeAlias = tuple[Any, ...]
_Named: TypeAlias = dict[str, Any]


def trace_asyncpg(provider: TracerProvider) -> None:
    """Have every connection make spans, of whichever pool: the driver is changed as a whole.

    Doing it again has them go to another provider.
    """
    from opentelemetry.instrumentation.asyncpg import AsyncPGInstrumentor  # noqa: PLC0415

    instrumentor = AsyncPGInstrumentor()  # type: ignore[no-untyped-call]
    if instrumentor.is_instrumented_by_opentelemetry:
        instrumentor.uninstrument()
    # What the library puts around the driver's methods is looked up when it does so.
    library: Any = AsyncPGInstrumentor
    traced = partial(library._do_execute, instrumentor)  # noqa: SLF001 - no other way
    wrapped: Any = partial(_statement_first, traced)
    instrumentor._do_execute = wrapped  # type: ignore[method-assign]  # noqa: SLF001
    with as_the_library_reads(os.environ):
        instrumentor.instrument(tracer_provider=provider)


def trace_redis(client: Any, provider: TracerProvider) -> None:
    """Have a client of redis-py make spans."""
    from opentelemetry.instrumentation.redis import RedisInstrumentor  # noqa: PLC0415

    execute = client.execute_command

    def execute_command(_client: Any, *arguments: Any, **named: Any) -> Awaitable[object]:
        return _cancelled_aloud(execute, *arguments, **named)

    # A method, of which the library asks whose it is.
    client.execute_command = MethodType(execute_command, client)
    with as_the_library_reads(os.environ):
        RedisInstrumentor.instrument_client(client, tracer_provider=provider)


def _statement_first(
    traced: Callable[[_Method, object, _Arguments, _Named], Awaitable[object]],
    method: _Method,
    connection: object,
    arguments: _Arguments,
    named: _Named,
) -> Awaitable[object]:
    """Call the library's wrapper, which takes it for granted that no statement is given by name.

    ``executemany`` calls it a command.
    """
    if not arguments:
        name = "query" if "query" in named else "command"
        if name not in named:
            return method(**named)  # which says itself what is missing
        arguments = (named[name],)
        named = {key: value for key, value in named.items() if key != name}
    return traced(partial(_cancelled_aloud, method), connection, arguments, named)


async def _cancelled_aloud(method: _Method, /, *arguments: Any, **named: Any) -> object:
    """Call a method; have its span tell of a cancellation, which the library does not."""
    try:
        return await method(*arguments, **named)
    except asyncio.CancelledError as error:
        span = get_current_span()
        span.set_attribute("error.type", type(error).__name__)
        span.set_status(StatusCode.ERROR)
        raise
