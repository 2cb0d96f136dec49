"""Which spans are recorded, and how a trace is called that begins here."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from opentelemetry.context import Context
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import Link, SpanKind, TraceState, get_current_span
from opentelemetry.util.types import Attributes

_CLEANING = "SELECT pg_advisory_unlock_all()"
"""What the driver's pool asks of each connection that is given back: nobody's own statement."""

_DROPPED = SamplingResult(Decision.DROP)


class WithoutOrphans(Sampler):
    """The sampler of the variables, but for calls to others that belong to nothing.

    Workers that look for jobs, heartbeats and health checks ask Postgres and Redis all the time.
    Each question would be a trace of one span, and together they would be most of all traces.
    """

    def __init__(self, inner: Sampler) -> None:
        self._inner = inner
        self.closed = False
        """Whether nothing is recorded any more, because nobody sends it."""

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
            if attributes and str(attributes.get("db.query.text", "")).startswith(_CLEANING):
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
def trace_called(trace_id: str | None) -> Iterator[None]:
    """Give a trace that begins within the block this id: 32 hexadecimal digits, None for any."""
    token = _chosen.set(None if trace_id is None else int(trace_id, 16))
    try:
        yield
    finally:
        _chosen.reset(token)
