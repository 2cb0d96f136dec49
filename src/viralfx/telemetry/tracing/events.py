"""Listeners that tell the current span of retries and of circuits that change."""

from opentelemetry.trace import get_current_span

from viralfx.domain.resilience.circuit import CircuitEvent, StateChanged
from viralfx.domain.resilience.retry_decision import AttemptFailed, BudgetExhausted, RetryEvent


def trace_retry(event: RetryEvent) -> None:
    """Tell the span around a retried operation of its attempts."""
    span = get_current_span()
    if not span.is_recording():
        return
    operation = {"viralfx.retry.operation": event.name}
    if isinstance(event, BudgetExhausted):
        span.add_event("viralfx.retry.budget_exhausted", operation)
        return
    failure = {**operation, "error.type": type(event.error).__qualname__}
    if isinstance(event, AttemptFailed):
        known: dict[str, str | int | float] = {**failure, "viralfx.retry.attempt": event.attempt}
        if event.delay is not None:
            known["viralfx.retry.delay"] = event.delay
        span.add_event("viralfx.retry.attempt_failed", known)
        return
    span.add_event(
        "viralfx.retry.gave_up",
        {
            **failure,
            "viralfx.retry.attempts": event.attempts,
            "viralfx.retry.reason": str(event.reason),
        },
    )


def trace_circuit(event: CircuitEvent) -> None:
    """Tell the span of whoever changed a circuit, or was rejected by it."""
    span = get_current_span()
    if not span.is_recording():
        return
    if isinstance(event, StateChanged):
        span.add_event(
            "viralfx.circuit.changed",
            {
                "viralfx.circuit": event.name,
                "viralfx.circuit.old": str(event.old),
                "viralfx.circuit.new": str(event.new),
            },
        )
        return
    span.add_event(
        "viralfx.circuit.rejected",
        {"viralfx.circuit": event.name, "viralfx.operation": event.operation},
    )
