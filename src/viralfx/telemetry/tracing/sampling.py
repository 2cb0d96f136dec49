"""Which spans are recorded, and how a trace is called that begins here."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from opentelemetry.context import Context
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import (
    Decision,
    Sampler,
    SamplingResult,
    TraceIdRatioBased,
)
from opentelemetry.trace import Link, SpanKind, TraceState, get_current_span
from opentelemetry.util.types import Attributes

from viralfx.telemetry.tracing.variables import Sampling

_CLEANING = "SELECT pg_advisory_unlock_all()"
"""What the driver's pool asks of each connection that is given back: nobody's own statement."""

_DROPPED = SamplingResult(Decision.DROP)
_UNSAMPLED = re.compile(
    r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f][02468ace]"
).fullmatch
"""The context of a caller who does not record."""


class WithoutOrphans(Sampler):
    """The sampler of the variables, but for calls to others that belong to nothing.

    Workers that look for jobs, heartbeats and health checks ask Postgres and Redis all the time.
    Each question would be a trace of one span, and together they would be most of all traces.
    """

    def __init__(self, inner: Sampler, sampling: Sampling) -> None:
        """Take the sampler of the variables, and what they say it does."""
        self._inner = inner
        self._least_dropped = TraceIdRatioBased.get_bound_for_rate(sampling.share)
        self._follows_parents = sampling.follows_parents
        self.closed = False
        """Whether nothing is recorded any more, because nobody sends it."""

    def drops_trace(self, trace_id: int) -> bool:
        """Tell whether a trace that begins here is dropped.

        What :meth:`should_sample` says of it, at a twentieth of the cost: most requests are asked
        this and nothing else.
        """
        return self.closed or trace_id & TraceIdRatioBased.TRACE_ID_LIMIT >= self._least_dropped

    def drops_continued(self, traceparent: str) -> int | None:
        """Return the id of a caller's trace if it is certain that nothing of it is recorded here.

        None where :meth:`should_sample` has to be asked.
        """
        if not self._follows_parents or (found := _UNSAMPLED(traceparent)) is None:
            return None
        return int(found[1], 16)

    def should_sample(  # noqa: PLR0917 - the library's
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """Decide about a span."""
        if self.closed:
            return _DROPPED
        if kind is SpanKind.CLIENT:
            if not get_current_span(parent_context).get_span_context().is_valid:
                return _DROPPED
            if attributes:
                text = attributes.get("db.query.text") or attributes.get("db.statement")
                if text is not None and str(text).startswith(_CLEANING):
                    return _DROPPED
        return self._inner.should_sample(
            parent_context, trace_id, name, kind, attributes, links, trace_state
        )

    def get_description(self) -> str:
        """Name it."""
        return f"WithoutOrphans({self._inner.get_description()})"


_chosen: ContextVar[int | None] = ContextVar("viralfx_trace_id", default=None)


class ChosenIds(RandomIdGenerator):
    """Random ids, but for a trace whose id is chosen already: as the correlation id is made."""

    def generate_trace_id(self) -> int:
        """Return the chosen id, or a random one."""
        return _chosen.get() or super().generate_trace_id()


@contextmanager
def trace_called(trace_id: int | None) -> Iterator[None]:
    """Give a trace that begins within the block this id; None for any."""
    token = _chosen.set(trace_id)
    try:
        yield
    finally:
        _chosen.reset(token)
