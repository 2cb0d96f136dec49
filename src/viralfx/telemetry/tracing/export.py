"""The export of spans: secrets are removed, and an unreachable collector is logged once.

OpenTelemetry's log records about this project's spans are captured. Records about spans of the
application come from the same loggers; they pass unchanged.
"""

import gc
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import Context, ContextVar
from typing import overload

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from viralfx.telemetry.tracing.cleaning import Cleaning

_PROCESSING = "opentelemetry.sdk._shared_internal"
_EXPORTING = "opentelemetry.exporter."
_ATTRIBUTES = "opentelemetry.attributes"

_capturing: ContextVar["SdkLogCapture | None"] = ContextVar("viralfx_sdk_log_capture", default=None)


class SdkLogCapture(logging.Filter):
    """Captures log records of the OpenTelemetry SDK inside :meth:`capture`; passes others on."""

    def __init__(
        self, on_warning: Callable[[str], object], own_limits: Collection[int] = ()
    ) -> None:
        """Install the filter on the SDK's loggers.

        ``on_warning`` gets the messages of captured warnings and errors; captured records of lower
        levels are dropped. ``own_limits`` are attribute lengths at which this project truncates on
        purpose; the SDK's warnings about them are dropped.
        """
        super().__init__()
        self._on_warning = on_warning
        self._own_limits = own_limits
        known = [_PROCESSING, _ATTRIBUTES, *logging.root.manager.loggerDict]
        self._loggers = [
            logging.getLogger(name)
            for name in dict.fromkeys(known)
            if name in {_PROCESSING, _ATTRIBUTES} or name.startswith(_EXPORTING)
        ]
        for logger in self._loggers:
            # Ahead of the library's own filter, which drops repetitions within 20 s: a permanent
            # loss of spans would look like an occasional one.
            logger.filters.insert(0, self)

    def close(self) -> None:
        """Remove the filter from the SDK's loggers."""
        for logger in self._loggers:
            logger.removeFilter(self)

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Capture records of the current context (task or thread) until the block ends."""
        token = _capturing.set(self)
        try:
            yield
        finally:
            _capturing.reset(token)

    def filter(self, record: logging.LogRecord) -> bool:
        """Return False for a captured record, so that no handler sees it."""
        if record.name == _ATTRIBUTES:
            arguments = record.args
            return not (
                isinstance(arguments, tuple) and arguments and arguments[0] in self._own_limits
            )
        if _capturing.get() is not self:
            return True
        if record.levelno >= logging.WARNING:
            self._on_warning(record.getMessage())
        return False


class _WarningCollector(logging.Handler):
    """Collects the warnings of the thread that created it; passes those of other threads on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if threading.get_ident() == self._thread:
            self.messages.append(record.getMessage())
        else:
            logging.root.handle(record)


@contextmanager
def collected_warnings(name: str) -> Iterator[list[str]]:
    """Yield a list that collects the logger's warnings of this thread; they are not logged."""
    logger, handler = logging.getLogger(name), _WarningCollector()
    propagate, level = logger.propagate, logger.level
    logger.addHandler(handler)
    logger.propagate = False
    if not logger.isEnabledFor(logging.WARNING):
        logger.setLevel(logging.WARNING)
    try:
        yield handler.messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
        logger.setLevel(level)


_logger = logging.getLogger("viralfx.tracing")

_RECOVERY_SECONDS = 10.0
"""Time without failures after which the collector counts as available again."""
_MAX_REASON_CHARACTERS = 300

_FLUSH_SECONDS, _FIRST_FLUSH_SECONDS, _FAILING_FLUSH_SECONDS = 5.0, 2.0, 0.5
"""Limits of the last flush: after a successful export, before the first one, and while exports
fail."""


class ReportingExporter(SpanExporter):
    """Logs once when spans are lost and once when exports succeed again.

    The processor's thread calls it, one batch at a time.
    """

    def __init__(
        self,
        inner: SpanExporter,
        *,
        cleaning: Cleaning | None = None,
        own_limits: Collection[int] = (),
        recovery_seconds: float = _RECOVERY_SECONDS,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """``own_limits`` are this project's lengths of attributes; see :class:`SdkLogCapture`.

        ``recovery_seconds`` is the time without failures after which the collector counts as
        available again.
        """
        self._inner = inner
        self._cleaning = cleaning or Cleaning()
        self._recovery_seconds = recovery_seconds
        self._now = now
        self._lock = threading.Lock()
        self._last_failure = 0.0
        self._sdk_messages: list[str] = []
        self.lost = 0
        """Number of spans that were recorded and not exported."""
        self.is_losing = False
        """Whether spans are being lost."""
        self._ever_succeeded = False
        self._reported_dropped = False
        self._sdk_log = SdkLogCapture(self._on_sdk_warning, own_limits)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Clean and send a batch; a failure is logged and never raised."""
        self._sdk_messages.clear()
        try:
            with self._sdk_log.capture():
                result = self._inner.export(_CleanedBatch(spans, self._clean))
        except Exception as error:  # noqa: BLE001 - a boundary: any error loses the batch
            self._record_failure(f"{type(error).__name__}: {error}", len(spans))
            return SpanExportResult.FAILURE
        if result is SpanExportResult.SUCCESS:
            self._record_success()
        else:
            # The first message has the cause, the last one the consequence.
            self._record_failure(
                "; ".join(dict.fromkeys([*self._sdk_messages[:1], *self._sdk_messages[-1:]])),
                len(spans),
            )
            # Exceptions of a failed client are reference cycles that keep the sent batch alive.
            # Collecting the young generations frees it in less than a millisecond.
            gc.collect(1)
        return result

    def _clean(self, span: ReadableSpan) -> ReadableSpan | None:
        try:
            return self._cleaning.span(span)
        except Exception as error:
            # One malformed span of the application must not cost the rest of the batch.
            with self._lock:
                self.lost += 1
            if not self._reported_dropped:
                self._reported_dropped = True
                _logger.warning("Spans cannot be sent, and are left out", exc_info=error)
            return None

    def shutdown(self) -> None:
        """Close the connection to the collector."""
        with self._sdk_log.capture():
            self._inner.shutdown()
        self._sdk_log.close()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Flush the inner exporter; this one buffers nothing."""
        return self._inner.force_flush(timeout_millis)

    def capture_log(self) -> AbstractContextManager[None]:
        """Return a context in which the SDK's warnings about queued spans are captured."""
        return self._sdk_log.capture()

    def _on_sdk_warning(self, message: str) -> None:
        if message.startswith("Queue full"):
            self._record_failure("the collector accepts fewer spans than are recorded", 1)
        else:
            self._sdk_messages.append(message)

    def _record_failure(self, reason: str, spans: int) -> None:
        # Also called on the threads that end spans, when the queue is full.
        with self._lock:
            self.lost += spans
            self._last_failure = self._now()
            reported, self.is_losing = self.is_losing, True
        if not reported:
            # In an empty context: the line must not get the correlation id of the current request.
            extra = {"reason": self._cleaning.text(reason)[:_MAX_REASON_CHARACTERS]}
            Context().run(_logger.warning, "Traces are lost", extra=extra)

    def flush_timeout(self) -> float:
        """Return the limit in seconds for sending the last spans of the process."""
        if self.is_losing:
            return _FAILING_FLUSH_SECONDS
        return _FLUSH_SECONDS if self._ever_succeeded else _FIRST_FLUSH_SECONDS

    def _record_success(self) -> None:
        self._ever_succeeded = True
        with self._lock:
            if not self.is_losing or self._now() - self._last_failure < self._recovery_seconds:
                return
            self.is_losing = False
        _logger.info("Traces arrive again")


class _CleanedBatch(Sequence[ReadableSpan]):
    """A batch whose spans are cleaned one by one during encoding; no cleaned copy is kept."""

    def __init__(
        self,
        spans: Sequence[ReadableSpan],
        clean: Callable[[ReadableSpan], ReadableSpan | None],
    ) -> None:
        self._spans = spans
        self._clean = clean

    def __len__(self) -> int:
        """Return the number of spans, including those that cleaning will drop."""
        return len(self._spans)

    def __iter__(self) -> Iterator[ReadableSpan]:
        for span in self._spans:
            if (cleaned := self._clean(span)) is not None:
                yield cleaned

    @overload
    def __getitem__(self, index: int) -> ReadableSpan: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ReadableSpan]: ...
    def __getitem__(self, index: int | slice) -> ReadableSpan | Sequence[ReadableSpan]:
        return list(self)[index]


class ReportingProcessor(BatchSpanProcessor):
    """Reports spans that do not fit into the queue to its exporter instead of the SDK's log."""

    def __init__(self, exporter: ReportingExporter, **limits: float) -> None:
        """``limits`` are arguments of the base class; they override the variables."""
        super().__init__(exporter, **limits)  # type: ignore[arg-type]
        self._reporting = exporter
        self._ended = False

    def shutdown(self) -> None:
        """Send the queued spans and ignore spans that end later."""
        self._ended = True
        super().shutdown()  # type: ignore[no-untyped-call]

    def on_end(self, span: ReadableSpan) -> None:
        """Queue a span that has ended."""
        # The library would log a warning for each span after the shutdown.
        if self._ended:
            return
        with self._reporting.capture_log():
            super().on_end(span)
