"""Log lines in one shape for every library: JSON for machines, text for people."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from viralfx.domain.clock import timestamp
from viralfx.domain.correlation import current_correlation_id

VERBOSE = 5
"""Below DEBUG: very detailed tracing."""

LEVELS = {
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "log": logging.INFO,
    "debug": logging.DEBUG,
    "verbose": VERBOSE,
}
"""The words that LOG_LEVEL accepts."""


def configure_logging(*, level: str, console: bool, stream: TextIO | None = None) -> None:
    """Send every record of the process to ``stream`` (standard output), one line each.

    Owns the root logger, so it is for programs: a library never calls it. A record that cannot be
    written is dropped without an error, as no request may fail for its log line.
    """
    stream = stream or sys.stdout
    logging.addLevelName(VERBOSE, "VERBOSE")
    logging.raiseExceptions = False
    pipeline: list[Processor] = [
        structlog.stdlib.ExtraAdder(),
        _shape,
        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
    ]
    if console:
        pipeline += [_for_people, _console(colors=stream.isatty())]
    else:
        pipeline += [
            # Without local variables: they hold whatever a request brought, tokens included.
            structlog.processors.ExceptionRenderer(
                structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
            ),
            structlog.processors.JSONRenderer(serializer=_to_json),
        ]
    handler = logging.StreamHandler(stream)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processors=pipeline))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(LEVELS[level])
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "litestar"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # Their information lines tell of start and stop, which the lifecycle tells better.
    for name in ("uvicorn.error", "taskiq"):
        logging.getLogger(name).setLevel(max(logging.WARNING, LEVELS[level]))


def _shape(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    record: logging.LogRecord = event["_record"]
    shaped: EventDict = {
        "timestamp": timestamp(datetime.fromtimestamp(record.created, UTC)),
        "level": _word(record.levelno),
        "context": record.name.removeprefix("viralfx."),
        "message": event.pop("event"),
    }
    if (correlation_id := current_correlation_id()) is not None:
        shaped["correlationId"] = correlation_id
    if record.exc_info:
        shaped["exc_info"] = record.exc_info
    # Nothing that a caller adds can take the place of these, but for an id it knows better.
    return {**shaped, **event, **{k: v for k, v in shaped.items() if k != "correlationId"}}


def _to_json(event: EventDict, **_: object) -> str:
    try:
        return json.dumps(event, default=str, allow_nan=False)
    except ValueError:
        # A number that JSON has no word for, or a value that contains itself.
        plain = {k: v if isinstance(v, str | int) else repr(v) for k, v in event.items()}
        return json.dumps(plain)


def _console(*, colors: bool) -> Processor:
    # Its usual tracebacks show local variables, which hold whatever a request brought.
    return structlog.dev.ConsoleRenderer(
        colors=colors, exception_formatter=structlog.dev.plain_traceback
    )


def _for_people(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    event["event"] = event.pop("message")
    event["logger"] = event.pop("context")
    return event


def _word(level: int) -> str:
    if level >= logging.ERROR:
        return "error"
    if level >= logging.WARNING:
        return "warn"
    if level >= logging.INFO:
        return "info"
    return "debug" if level >= logging.DEBUG else "verbose"
