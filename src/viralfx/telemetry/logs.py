"""Log lines in one shape for every library: JSON for machines, text for people."""

import contextlib
import logging
import logging.config
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict

from viralfx.telemetry.access_log import TakeRequest
from viralfx.telemetry.line_writer import LineWriter
from viralfx.telemetry.log_levels import LEVELS, VERBOSE, word
from viralfx.telemetry.log_lines import STANDARD, JsonLines, plain
from viralfx.telemetry.redaction import Redaction
from viralfx.telemetry.requests import EndedRequest

_SERVERS = ("uvicorn", "uvicorn.error", "uvicorn.access", "litestar")


def configure_logging(
    *,
    level: str,
    console: bool,
    stream: TextIO | None = None,
    redaction: Redaction | None = None,
) -> None:
    """Send every record of the process to ``stream``, one line each; warnings become records.

    Without a stream lines go to the descriptor of standard output, by a thread, so that nobody
    waits for who reads them. Owns the root logger, so it is for programs: a library never calls
    it. A line that cannot be written is lost without an error, as no request may fail for it.
    """
    redaction = redaction or Redaction()
    logging.addLevelName(VERBOSE, "VERBOSE")
    logging.raiseExceptions = False
    output = stream or sys.stdout or sys.stderr
    # Without local variables: they hold whatever a request brought, tokens included.
    explain = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    lines = JsonLines(redaction, explain)
    root = logging.getLogger()
    for handler in root.handlers:
        if isinstance(handler, LineHandler):
            handler.close()
    if console:
        text = _Console(lines, redaction, colors=_is_terminal(output))
        handler = LineHandler(text, output, threaded=stream is None)
    else:
        handler = LineHandler(
            lines.render, output, threaded=stream is None, of_requests=lines.of_requests
        )
    root.handlers[:] = [handler]
    root.setLevel(LEVELS[level])
    for known in root.manager.loggerDict.values():
        if isinstance(known, logging.Logger):
            # By default whoever configures logging disables all loggers that there are.
            known.disabled = False
    for name in _SERVERS:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # Their information lines tell of start and stop, which the lifecycle tells better.
    for name in ("uvicorn.error", "taskiq"):
        logging.getLogger(name).setLevel(max(logging.WARNING, LEVELS[level]))
    warnings.showwarning = _show_warning


def own_logging(*, level: str, console: bool, redaction: Redaction) -> Callable[[], None]:
    """Configure logging, and again whenever an application has configured it otherwise.

    Making a Litestar application does, by default: lines would have another shape, and secrets in
    them. So would what is logged by structlog, which is configured as well. Returns what takes
    logging back where it was done in a way that nobody can be told of.
    """

    def configure() -> None:
        configure_logging(level=level, console=console, redaction=redaction)
        structlog.configure(**_AS_RECORDS)

    class Owned(logging.config.DictConfigurator):
        def configure(self) -> None:
            super().configure()
            configure()

    def reclaim() -> None:
        handlers = logging.getLogger().handlers
        factory = structlog.get_config()["logger_factory"]
        if not any(isinstance(each, LineHandler) for each in handlers) or factory is not _FACTORY:
            configure()

    logging.config.dictConfigClass = Owned  # which exists to be replaced
    configure()
    return reclaim


def _to_record(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Return what a logger of the standard library takes of what one of structlog was told."""
    known = {name: event.pop(name) for name in _OF_RECORDS if name in event}
    message = event.pop("event", "")
    # A field may be called anything there.
    extra = {f"{name}_" if name in STANDARD else name: value for name, value in event.items()}
    return {"msg": message, "extra": extra, **known}


_OF_RECORDS = ("exc_info", "stack_info", "stacklevel")
_FACTORY = structlog.stdlib.LoggerFactory()
_AS_RECORDS: dict[str, Any] = {
    "processors": [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.filter_by_level,
        _to_record,
    ],
    "wrapper_class": structlog.make_filtering_bound_logger(0),
    "logger_factory": _FACTORY,
    "cache_logger_on_first_use": False,
}
"""Sends what an application logs by structlog, which prints it otherwise, to its logger."""


class LineHandler(logging.Handler):
    """Renders records and passes the lines on; whoever logs neither waits nor fails for them."""

    take_request: TakeRequest | None = None
    """Takes the line of a request without a record, where that can be done."""

    def __init__(
        self,
        render: Callable[[logging.LogRecord], bytes],
        output: TextIO | None,
        *,
        threaded: bool,
        of_requests: Callable[[Sequence[EndedRequest]], bytes] | None = None,
    ) -> None:
        """``threaded`` writes to the descriptor of ``output``, if it has one, in a thread.

        ``of_requests`` renders what requests are logged by, many at a time.
        """
        super().__init__()
        self._render = render
        self._output = output
        self._writer: LineWriter | None = None
        if threaded and output is not None:
            make = of_requests or b"".join
            with contextlib.suppress(OSError, ValueError):  # no file, or it is closed
                self._writer = LineWriter(output.fileno(), tell_lost=self._tell_lost, make=make)
                if of_requests is not None:
                    self.take_request = self._writer.write_later

    def handle(self, record: logging.LogRecord) -> bool:
        """Take a record; without the lock of other handlers, for which there is nothing to do."""
        # From Python 3.12 on a filter may give another record in its place.
        verdict: object = self.filter(record) if self.filters else True
        if verdict:
            self.emit(verdict if isinstance(verdict, logging.LogRecord) else record)
        return bool(verdict)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        try:
            line = self._render(record)
            if self._writer is not None:
                self._writer.write(line, urgent=record.levelno >= logging.WARNING)
            elif self._output is not None:
                self._output.write(line.decode())
                self._output.flush()
        except Exception:  # noqa: BLE001 - whatever a value's text or a stream does
            if self._writer is not None:
                self._writer.count_lost(1)
            self.handleError(record)

    def flush(self) -> None:
        """Wait for what is to be written, for a moment at most."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Write what is left, and end the thread."""
        if self._writer is not None:
            self._writer.close()
        super().close()

    def _tell_lost(self, count: int) -> bytes:
        record = logging.LogRecord(
            "viralfx.logs", logging.WARNING, "", 0, "Log lines were lost", (), None
        )
        record.lost = count
        return self._render(record)


class _Console:
    """Text for people, with the same content."""

    def __init__(self, lines: JsonLines, redaction: Redaction, *, colors: bool) -> None:
        self._lines = lines
        self._redaction = redaction
        # Its usual tracebacks show local variables, which hold whatever a request brought.
        self._renderer = structlog.dev.ConsoleRenderer(
            colors=colors, exception_formatter=structlog.dev.plain_traceback
        )

    def __call__(self, record: logging.LogRecord) -> bytes:
        event, _ = self._lines.fields(record)
        event["event"] = event.pop("message")
        event["logger"] = event.pop("context")
        if record.exc_info and event.pop("exception", None) is not None:
            event["exc_info"] = record.exc_info
        for name in ("stack", "exception"):  # which it prints as they are
            if name in event and not isinstance(value := event[name], str):
                lines = value if isinstance(value, list) else [value]
                event[name] = "\n".join(str(plain(line)) for line in lines)
        try:
            text = self._renderer(None, word(record.levelno), event.copy())
        except Exception:  # noqa: BLE001 - whatever the text of somebody's value does
            event = {k: v if k == "exc_info" else plain(v) for k, v in event.items()}
            text = self._renderer(None, word(record.levelno), event)
        return self._redaction.text(f"{text}\n").encode("utf-8", "backslashreplace")


def _show_warning(  # noqa: PLR0917 - as the library calls it
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    del file, line
    logging.getLogger("warnings").warning(
        "%s", message, extra={"category": category.__name__, "where": f"{filename}:{lineno}"}
    )


def _is_terminal(output: TextIO | None) -> bool:
    try:
        return output is not None and output.isatty()
    except ValueError:  # it is closed
        return False
