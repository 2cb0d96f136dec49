"""Exemplars: the trace of one measurement among many, so that a slow one can be looked into."""

from collections.abc import Callable

from viralfx.telemetry.trace_context import current_trace

Exemplar = Callable[[], dict[str, str] | None]
"""Names the trace of what is being measured, if it is recorded; called at the measurement."""


def current_exemplar() -> dict[str, str] | None:
    """Name the current recorded span; None where nothing is traced."""
    trace = current_trace()
    return None if trace is None else {"trace_id": trace[0], "span_id": trace[1]}


def no_exemplar() -> None:
    """Name none: nothing is traced."""
