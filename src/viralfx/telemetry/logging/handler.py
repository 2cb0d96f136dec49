"""Log lines in one shape for every library: JSON for machines, text for people."""

import contextlib
import io
import logging
import logging.config
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, ExcInfo

from viralfx.core.errors import printable
from viralfx.telemetry import EndedRequest
from viralfx.telemetry.logging.lines import (
    LEVELS,
    STANDARD,
    VERBOSE,
    FactsInMessages,
    JsonLines,
    RequestSink,
    line_level,
    plain,
)
from viralfx.telemetry.logging.redaction import Redaction
from viralfx.telemetry.logging.writer import LineWriter

_SERVERS = ("uvicorn", "uvicorn.error", "uvicorn.access", "litestar")


def configure_logging(
    *,
    level: str,
    console: bool,
    stream: TextIO | None = None,
    redaction: Redaction | None = None,
    interruptible: bool = True,
) -> None:
    """Send every record of the process to ``stream``, one line each; warnings become records.

    Without a stream, a thread writes the lines to the descriptor of standard output, so that a slow
    reader blocks no caller. This function replaces the handlers of the root logger, so only
    programs call it, never a library. A line that cannot be written is lost without an error,
    because logging must not fail a request. ``interruptible``: SIGINT may raise KeyboardInterrupt,
    which then reaches the caller; otherwise that is an error of a value, like all others.
    """
    redaction = redaction or Redaction()
    logging.addLevelName(VERBOSE, "VERBOSE")
    logging.raiseExceptions = False
    output = stream or sys.stdout or sys.stderr
    # Without local variables: they hold data of requests, tokens included.
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
            lines.render, output, threaded=stream is None, render_requests=lines.render_requests
        )
    handler.interruptible = interruptible
    handler.facts = FactsInMessages(redaction.text)
    root.handlers[:] = [handler]
    root.setLevel(LEVELS[level])
    for known in root.manager.loggerDict.values():
        if isinstance(known, logging.Logger):
            # ``logging.config`` disables existing loggers by default.
            known.disabled = False
    for name in _SERVERS:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # Their info lines duplicate those of the lifecycle about start and stop.
    for name in ("uvicorn.error", "taskiq"):
        logging.getLogger(name).setLevel(max(logging.WARNING, LEVELS[level]))
    warnings.showwarning = _show_warning


def enforce_logging(*, level: str, console: bool, redaction: Redaction) -> Callable[[], None]:
    """Configure logging, and configure it again after each ``dictConfig`` of the application.

    Creating a Litestar application calls ``dictConfig`` by default; its lines would have another
    format and contain secrets. structlog is configured for the same reason. Returns a function
    that reinstalls this configuration after changes that bypass ``dictConfig``. The handler of
    SIGINT must not raise.
    """

    def configure() -> None:
        configure_logging(level=level, console=console, redaction=redaction, interruptible=False)
        structlog.configure(**_STRUCTLOG_CONFIG)

    class ReconfiguringConfigurator(logging.config.DictConfigurator):
        def configure(self) -> None:
            super().configure()
            configure()

    def reinstall() -> None:
        handlers = logging.getLogger().handlers
        factory = structlog.get_config()["logger_factory"]
        if not any(isinstance(each, LineHandler) for each in handlers) or factory is not _FACTORY:
            configure()

    # The module documents this attribute as a hook for replacement.
    logging.config.dictConfigClass = ReconfiguringConfigurator
    configure()
    return reinstall


def _to_record(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Convert an event of structlog to the arguments of a standard logger's method."""
    known = {name: event.pop(name) for name in _RECORD_ARGUMENTS if name in event}
    message = event.pop("event", "")
    # structlog allows any field name; logging reserves those of LogRecord.
    extra = {f"{name}_" if name in STANDARD else name: value for name, value in event.items()}
    return {"msg": message, "extra": extra, **known}


_RECORD_ARGUMENTS = ("exc_info", "stack_info", "stacklevel")
_FACTORY = structlog.stdlib.LoggerFactory()
_STRUCTLOG_CONFIG: dict[str, Any] = {
    "processors": [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.filter_by_level,
        _to_record,
    ],
    "wrapper_class": structlog.make_filtering_bound_logger(0),
    "logger_factory": _FACTORY,
    "cache_logger_on_first_use": False,
}
"""Routes structlog events to standard loggers; by default structlog prints them."""


class LineHandler(logging.Handler):
    """Renders records and writes the lines; it neither blocks callers nor raises."""

    accept_request: RequestSink | None = None
    """Accepts a finished request without a ``LogRecord``; None if this handler cannot."""
    interruptible = True
    """True if a KeyboardInterrupt may come from SIGINT."""
    facts: FactsInMessages | None = None
    """Completes the messages of this package for handlers after this one; None: nothing does."""

    def __init__(
        self,
        render: Callable[[logging.LogRecord], bytes],
        output: TextIO | None,
        *,
        threaded: bool,
        render_requests: Callable[[Sequence[EndedRequest]], bytes] | None = None,
    ) -> None:
        """``threaded`` writes in a thread to the descriptor of ``output``, if it has one.

        ``render_requests`` renders the lines of finished requests, many at a time.
        """
        super().__init__()
        self._render = render
        self._output = output
        self._writer: LineWriter | None = None
        if threaded and output is not None:
            render_deferred = render_requests or b"".join
            with contextlib.suppress(OSError, ValueError):  # not a file, or a closed one
                self._writer = LineWriter(
                    output.fileno(),
                    lost_warning=self._render_lost_warning,
                    render_deferred=render_deferred,
                )
                if render_requests is not None:
                    self.accept_request = self._writer.write_later

    def handle(self, record: logging.LogRecord) -> bool:
        """Emit a record that passes the filters; unlike the base class, without a lock."""
        # Since Python 3.12 a filter may return a replacement record.
        verdict: object = self.filter(record) if self.filters else True
        if verdict:
            self.emit(verdict if isinstance(verdict, logging.LogRecord) else record)
        if self.facts is not None and len(logging.root.handlers) > 1:
            # The application has a handler of its own, after this one. Its formatter may show the
            # message alone.
            try:
                self.facts.complete(record)
            except BaseException as error:  # the line itself is written
                if self._is_interrupt(error):
                    raise
        return bool(verdict)

    def _is_interrupt(self, error: BaseException) -> bool:
        """Return True for an error that does not come from the code of a value, such as a repr."""
        return self.interruptible and issubclass(type(error), KeyboardInterrupt)

    def emit(self, record: logging.LogRecord) -> None:
        """Render a record and write or enqueue its line; a failure counts the line as lost."""
        try:
            line = self._render(record)
            if self._writer is not None:
                self._writer.write(line, urgent=record.levelno >= logging.WARNING)
            elif self._output is not None:
                self._output.write(line.decode())
                self._output.flush()
        except BaseException as error:  # raised by a value's repr or by the stream
            if self._is_interrupt(error):
                raise
            if self._writer is not None:
                self._writer.count_lost(1)
            self.handleError(record)

    def flush(self) -> None:
        """Wait until queued lines are written, for about a second at most."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Write the remaining lines and end the thread."""
        if self._writer is not None:
            self._writer.close()
        super().close()

    def _render_lost_warning(self, count: int) -> bytes:
        record = logging.LogRecord(
            "viralfx.logs", logging.WARNING, "", 0, "Log lines were lost", (), None
        )
        record.lost = count
        return self._render(record)


class _Console:
    """Renders records as text for people, with the content of the JSON lines.

    Characters that a terminal may interpret are escaped, except for the newlines and tabs of
    messages, stacks and tracebacks: clients choose some of the values.
    """

    def __init__(self, lines: JsonLines, redaction: Redaction, *, colors: bool) -> None:
        self._lines = lines
        self._redaction = redaction
        self._renderer = structlog.dev.ConsoleRenderer(
            colors=colors, exception_formatter=_write_traceback
        )

    def __call__(self, record: logging.LogRecord) -> bytes:
        event, _ = self._lines.fields(record)
        whole = {"event": event.pop("message"), "logger": event.pop("context")}
        if record.exc_info and event.pop("exception", None) is not None:
            whole["exc_info"] = record.exc_info
        for name in ("stack", "exception"):  # the renderer prints both unchanged
            if name in event:
                value = event.pop(name)
                lines = value if isinstance(value, list) else [value]
                whole[name] = "\n".join(str(plain(line)) for line in lines)
        shown = {name: _Shown.of(value) for name, value in event.items()}
        shown |= {k: _printable(v) if isinstance(v, str) else v for k, v in whole.items()}
        text = self._renderer(None, line_level(record.levelno), shown)
        return self._redaction.text(f"{text}\n").encode("utf-8", "backslashreplace")


class _Shown:
    """A value as the console shows it."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    # The renderer writes the repr of each value that is not a string.
    def __repr__(self) -> str:
        return self._text

    @classmethod
    def of(cls, value: object) -> object:
        """Return a value that the renderer can write, and writes without control characters."""
        simple = plain(value)
        if not isinstance(simple, str):
            return simple
        if not isinstance(value, str):
            return cls(_printable(simple))
        return simple if simple.isprintable() else cls(repr(simple))


_printable = partial(printable, kept="\n\t")


def _write_traceback(output: TextIO, error: ExcInfo) -> None:
    """Write a traceback; structlog's default ones show local variables, which hold client data."""
    written = io.StringIO()
    structlog.dev.plain_traceback(written, error)
    output.write(_printable(written.getvalue()))


def _show_warning(  # noqa: PLR0917 - the signature of ``warnings.showwarning``
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
    except ValueError:  # the stream is closed
        return False
