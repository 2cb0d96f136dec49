"""What leaves: spans without secrets, and one line of the log about a collector that is away."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from viralfx.telemetry.tracing.cleaning import Cleaning

_logger = logging.getLogger("viralfx.tracing")

_OWN_LOGGERS = ("opentelemetry.exporter", "opentelemetry.sdk._shared_internal")
"""What says more about a collector than anybody wants to read, and says it all the time."""

_CALM = 10.0
"""Seconds without any trouble after which the collector is taken to be back."""
_LONGEST_REASON = 300

_MOST, _MOST_AT_FIRST, _MOST_IN_TROUBLE = 5.0, 2.0, 0.5
"""Seconds that the last spans of a process are worth: where others arrived, where none did yet, and
where the collector is away."""


class _Ear(logging.Handler):
    """Takes in what a library logs instead of everybody else."""

    def __init__(self, hear: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._hear = hear

    def emit(self, record: logging.LogRecord) -> None:
        """Take in one record."""
        self._hear(record.getMessage())


def listen_to(names: Sequence[str], hear: Callable[[str], None]) -> Callable[[], None]:
    """Have ``hear`` told of the warnings and errors of loggers, and nobody else of anything.

    It is told of all of them: filters are left out. Returns what undoes it.
    """
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger, logger.propagate, logger.level, list(logger.filters)) for logger in loggers]
    ear = _Ear(hear)
    for logger in loggers:
        logger.addHandler(ear)
        logger.propagate = False
        logger.setLevel(logging.WARNING)
        # The library's own drops what it has said within 20 s: spans that are lost all the time
        # would seem to be lost now and then.
        logger.filters.clear()

    def undo() -> None:
        for logger, propagate, level, filters in before:
            logger.removeHandler(ear)
            logger.propagate = propagate
            logger.setLevel(level)
            logger.filters[:] = filters

    return undo


@contextmanager
def complaints(name: str) -> Iterator[list[str]]:
    """Gather what a library complains of within the block, which is then logged nowhere."""
    heard: list[str] = []
    undo = listen_to([name], heard.append)
    try:
        yield heard
    finally:
        undo()


class ReportingExporter(SpanExporter):
    """Tells once that spans are lost, and once that they arrive again.

    It is called by the processor's thread, one batch after another.
    """

    def __init__(
        self,
        inner: SpanExporter,
        *,
        cleaning: Cleaning | None = None,
        calm: float = _CALM,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """``calm`` is how many seconds without trouble mean that the collector is back."""
        self._inner = inner
        self._cleaning = cleaning or Cleaning()
        self._calm = calm
        self._now = now
        self._lock = threading.Lock()
        self._last_trouble = 0.0
        self._said: list[str] = []
        self.in_trouble = False
        """Whether spans were lost a moment ago."""
        self._arrived = False
        self._undo = listen_to(_OWN_LOGGERS, self._hear)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send a batch."""
        self._said.clear()
        try:
            result = self._inner.export([self._cleaning.span(span) for span in spans])
        except Exception as error:  # noqa: BLE001 - a boundary: whatever it is, they are lost
            self._trouble(f"{type(error).__name__}: {error}")
            return SpanExportResult.FAILURE
        if result is SpanExportResult.SUCCESS:
            self._went_well()
        else:
            # The first says what is wrong, the last what became of it.
            self._trouble("; ".join(dict.fromkeys([*self._said[:1], *self._said[-1:]])))
        return result

    def shutdown(self) -> None:
        """Let go of the connection."""
        self._inner.shutdown()
        self._undo()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Nothing is kept here."""
        return self._inner.force_flush(timeout_millis)

    def _hear(self, message: str) -> None:
        if message.startswith("Queue full"):
            self._trouble("the collector takes fewer spans than there are")
        else:
            self._said.append(message)

    def _trouble(self, reason: str) -> None:
        # Also from the threads of those who end spans, when there is no room for one.
        with self._lock:
            self._last_trouble = self._now()
            told, self.in_trouble = self.in_trouble, True
        if not told:
            # In no context: it is nobody's request, although one may have been the first to find.
            extra = {"reason": self._cleaning.text(reason)[:_LONGEST_REASON]}
            Context().run(_logger.warning, "Traces are lost", extra=extra)

    def patience(self) -> float:
        """Return how many seconds the last spans are worth waiting for."""
        if self.in_trouble:
            return _MOST_IN_TROUBLE
        return _MOST if self._arrived else _MOST_AT_FIRST

    def _went_well(self) -> None:
        self._arrived = True
        with self._lock:
            if not self.in_trouble or self._now() - self._last_trouble < self._calm:
                return
            self.in_trouble = False
        _logger.info("Traces arrive again")
