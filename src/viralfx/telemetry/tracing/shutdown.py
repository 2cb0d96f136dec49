"""The shutdown as a trace, and the stage that sends it with all the others."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from opentelemetry.trace import SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation import set_span_in_context

from viralfx.domain.correlation import current_correlation_id
from viralfx.domain.shutdown import (
    Outcome,
    Phase,
    ShutdownEvent,
    ShutdownTriggered,
    StageFinished,
    StageReport,
)
from viralfx.telemetry.tracing.context import NOTHING
from viralfx.telemetry.tracing.sampling import trace_called

_SHARE = 0.8
"""Part of the stage's budget that sending may take."""
_A_SECOND = 1_000_000_000


@dataclass(frozen=True, slots=True)
class _Stage:
    phase: Phase
    report: StageReport
    ended: int
    """Nanoseconds since 1970."""

    @property
    def began(self) -> int:
        return self.ended - round(self.report.duration * _A_SECOND)


class ShutdownTrace:
    """Remembers the stages when they end: a listener; :meth:`finish` makes them spans."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._began: int | None = None
        self._reason = ""
        self._stages: list[_Stage] = []

    def __call__(self, event: ShutdownEvent) -> None:
        """Take in one event of the shutdown."""
        if isinstance(event, ShutdownTriggered):
            self._began, self._reason = time.time_ns(), event.reason
        elif isinstance(event, StageFinished):
            self._stages.append(_Stage(event.phase, event.report, time.time_ns()))

    def finish(self) -> None:
        """Record the trace; the stage that calls this is not in it."""
        if self._began is None:
            return
        # Made by the sequence, in the shape of a trace's id: the lines of the log lead here.
        own = current_correlation_id()
        with trace_called(None if own is None else int(own, 16)):
            root = self._tracer.start_span(
                "shutdown",
                NOTHING,
                SpanKind.INTERNAL,
                {"viralfx.shutdown.reason": self._reason},
                start_time=min([self._began, *(stage.began for stage in self._stages)]),
            )
        inside = set_span_in_context(root, NOTHING)
        for stage in self._stages:
            report = stage.report
            span = self._tracer.start_span(
                f"stage {report.name}",
                inside,
                SpanKind.INTERNAL,
                {
                    "viralfx.shutdown.phase": str(stage.phase),
                    "viralfx.shutdown.outcome": str(report.outcome),
                },
                start_time=stage.began,
            )
            if report.outcome is not Outcome.OK:
                span.set_status(StatusCode.ERROR, str(report.outcome))
                root.set_status(StatusCode.ERROR)
            if report.error is not None:
                span.set_attribute("error.type", type(report.error).__qualname__)
            span.end(stage.ended)
        root.end()


class FlushTraces:
    """Shutdown stage: sends what is left, and never fails for a collector."""

    def __init__(
        self, trace: ShutdownTrace, end: Callable[[], object], patience: Callable[[], float]
    ) -> None:
        """``end`` sends everything and blocks meanwhile, for ``patience`` seconds at most."""
        self._trace = trace
        self._end = end
        self._patience = patience

    async def run(self, budget: float) -> None:
        """Send for as long as the budget allows; what is left then is lost."""
        self._trace.finish()
        limit = min(budget * _SHARE, self._patience())
        loop, sent = asyncio.get_running_loop(), asyncio.Event()

        def send() -> None:
            try:
                self._end()
            finally:
                _call_soon(loop, sent.set)

        # A thread of its own, that nobody waits for at the process's end.
        threading.Thread(target=send, name="telemetry", daemon=True).start()
        try:
            async with asyncio.timeout(limit):
                await sent.wait()
        except TimeoutError:
            return


def _call_soon(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> None:
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:
        return  # the loop is closed: it was not waited for
