"""The W3C trace context of requests and jobs: read with care, written as it is."""

import re
from collections.abc import Mapping, Sequence

from opentelemetry.context import Context
from opentelemetry.trace import SpanContext, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from viralfx.domain.correlation import is_traceparent

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"

NOTHING = Context()
"""A context without a span, and without baggage: whatever came from outside is not trusted."""

_propagator = TraceContextTextMapPropagator()
_LONGEST_STATE = 512
_MOST_MEMBERS = 32
# A member that does not fit makes the whole state be ignored, and quietly: it comes from outside,
# and the library would log a line about each.
_MEMBER = re.compile(
    r"[a-z0-9][a-z0-9_\-*/@]{0,255}=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
).fullmatch


def remote_parent(traceparents: Sequence[str], tracestates: Sequence[str] = ()) -> Context:
    """Return the context of a caller; one without a span where it says nothing that can be read."""
    if len(traceparents) != 1 or not is_traceparent(traceparents[0]):
        return NOTHING
    carrier = {TRACEPARENT: traceparents[0]}
    if tracestates and (state := _readable(",".join(tracestates))):
        carrier[TRACESTATE] = state
    return _propagator.extract(carrier, context=NOTHING)


def headers_of(span_context: SpanContext) -> Mapping[str, str]:
    """Return what tells others of a span; nothing where it is none."""
    if not span_context.is_valid:
        return {}
    headers = {TRACEPARENT: traceparent_of(span_context)}
    if span_context.trace_state:
        headers[TRACESTATE] = span_context.trace_state.to_header()
    return headers


def traceparent_of(span_context: SpanContext) -> str:
    """Write a span's context as W3C has it."""
    ids = f"{span_context.trace_id:032x}-{span_context.span_id:016x}"
    return f"00-{ids}-{span_context.trace_flags:02x}"


def is_sampled(traceparent: str) -> bool:
    """Tell whether a context that was written here is that of a recorded span."""
    return bool(int(traceparent[-2:], 16) & 1)


def current_ids() -> tuple[str, str] | None:
    """Return the ids of the current span and its trace, the trace's first, if it is recorded."""
    span_context = get_current_span().get_span_context()
    if not span_context.trace_flags.sampled:
        return None
    return f"{span_context.trace_id:032x}", f"{span_context.span_id:016x}"


def _readable(state: str) -> str:
    if len(state) > _LONGEST_STATE:
        return ""
    members = [member for each in state.split(",") if (member := each.strip(" \t"))]
    keys = {member.partition("=")[0] for member in members}
    fits = len(keys) == len(members) <= _MOST_MEMBERS and all(map(_MEMBER, members))
    return ",".join(members) if fits else ""
