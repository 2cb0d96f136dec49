"""The trace that the present work belongs to, asked without OpenTelemetry where nothing is traced.

Log lines and exemplars ask here. Tracing puts its answer in place when it starts.
"""

from collections.abc import Callable

TRACE = "viralfx.trace"
"""Where the scope of a request that is recorded has the ids of its trace and of its span."""

CurrentTrace = Callable[[], tuple[str, str] | None]
"""Returns the ids of the trace and of the span that the present work belongs to, in small hex
digits, if the span is recorded; None otherwise."""


def _none() -> None:
    return None


_current: CurrentTrace = _none


def current_trace() -> tuple[str, str] | None:
    """Return the ids of the current recorded span, its trace's first; None where there is none."""
    return _current()


def answer_with(current: CurrentTrace | None) -> None:
    """Have ``current`` answer from now on; None where nothing is traced any more."""
    global _current  # noqa: PLW0603 - one process has one context
    _current = current or _none
