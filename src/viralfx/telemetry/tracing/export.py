"""What leaves: spans without secrets, and one line of the log about a collector that is away."""

import gc
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import Context
from typing import overload

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from viralfx.telemetry.tracing.cleaning import Cleaning
from viralfx.telemetry.tracing.listening import Ear

_logger = logging.getLogger("viralfx.tracing")

_CALM = 10.0
"""Seconds without any trouble after which the collector is taken to be back."""
_LONGEST_REASON = 300

_MOST, _MOST_AT_FIRST, _MOST_IN_TROUBLE = 5.0, 2.0, 0.5
"""Seconds that the last spans of a process are worth: where others arrived, where none did yet, and
where the collector is away."""


class ReportingExporter(SpanExporter):
    """Tells once that spans are lost, and once that they arrive again.

    It is called by the processor's thread, one batch after another.
    """

    def __init__(
        self,
        inner: SpanExporter,
        *,
        cleaning: Cleaning | None = None,
        cuts: Collection[int] = (),
        calm: float = _CALM,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """``cuts`` are the lengths at which spans' attributes are cut; see :class:`Ear`.

        ``calm`` is how many seconds without trouble mean that the collector is back.
        """
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
        self._left_out = False
        self._ear = Ear(self._hear, cuts)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send a batch."""
        self._said.clear()
        try:
            with self._ear.open():
                result = self._inner.export(_Cleaned(spans, self._clean))
        except Exception as error:  # noqa: BLE001 - a boundary: whatever it is, they are lost
            self._trouble(f"{type(error).__name__}: {error}")
            return SpanExportResult.FAILURE
        if result is SpanExportResult.SUCCESS:
            self._went_well()
        else:
            # The first says what is wrong, the last what became of it.
            self._trouble("; ".join(dict.fromkeys([*self._said[:1], *self._said[-1:]])))
            # The errors of a client in vain refer to themselves, and so to what it sent. That is
            # let go of while it is young: less than a millisecond, however much else there is.
            gc.collect(1)
        return result

    def _clean(self, span: ReadableSpan) -> ReadableSpan | None:
        try:
            return self._cleaning.span(span)
        except Exception as error:
            # What an application made of it is no reason to lose those beside it.
            if not self._left_out:
                self._left_out = True
                _logger.warning("Spans cannot be sent, and are left out", exc_info=error)
            return None

    def shutdown(self) -> None:
        """Let go of the connection."""
        with self._ear.open():
            self._inner.shutdown()
        self._ear.close()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Nothing is kept here."""
        return self._inner.force_flush(timeout_millis)

    def listening(self) -> AbstractContextManager[None]:
        """Return a block in which what the library says of spans that wait is heard."""
        return self._ear.open()

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


class _Cleaned(Sequence[ReadableSpan]):
    """A batch that is cleaned span by span while it is encoded, and not kept while it is sent."""

    def __init__(
        self,
        spans: Sequence[ReadableSpan],
        clean: Callable[[ReadableSpan], ReadableSpan | None],
    ) -> None:
        self._spans = spans
        self._clean = clean

    def __len__(self) -> int:
        """Count the spans, those that will be left out included."""
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
    """Has its exporter told of spans for which there is no room, and nobody else."""

    def __init__(self, exporter: ReportingExporter, **limits: float) -> None:
        """``limits`` are those of the library's own, instead of the variables."""
        super().__init__(exporter, **limits)  # type: ignore[arg-type]
        self._reporting = exporter
        self._ended = False

    def shutdown(self) -> None:
        """Send what waits, and take in nothing any more."""
        self._ended = True
        super().shutdown()  # type: ignore[no-untyped-call]

    def on_end(self, span: ReadableSpan) -> None:
        """Take in a span that has ended."""
        # The library would log of each that comes too late.
        if self._ended:
            return
        with self._reporting.listening():
            super().on_end(span)
