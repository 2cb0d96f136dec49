"""Series of metrics: a limit on the number of names, exemplars, and a histogram without locks.

An exemplar links one measurement, such as a slow one, to its trace.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from time import time

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar as ExemplarSample

from viralfx.telemetry import current_trace

OTHER = "_OTHER"
"""Stands for all names beyond the limit, as in OpenTelemetry's semantic conventions."""

_MAX_NAMES = 64


class BoundedNames:
    """Limits the number of names in a label: the series of a name are never removed."""

    def __init__(self, limit: int = _MAX_NAMES) -> None:
        self._limit = limit
        self._known: set[str] = set()

    def __call__(self, name: str) -> str:
        """Return the name, or :data:`OTHER` for a new name beyond the limit."""
        if name in self._known:
            return name
        if len(self._known) >= self._limit:
            return OTHER
        self._known.add(name)
        return name


Exemplar = Callable[[], dict[str, str] | None]
"""Returns the exemplar labels of the current trace; None if it is not recorded."""


def current_exemplar() -> dict[str, str] | None:
    """Return the ids of the current recorded span; None if there is none."""
    trace = current_trace()
    return None if trace is None else {"trace_id": trace[0], "span_id": trace[1]}


def no_exemplar() -> None:
    """Return None, for use without tracing."""


class HistogramSeries:
    """The values of one series of a :class:`LoopHistogram`."""

    __slots__ = ("_buckets", "counts", "exemplars", "total")

    def __init__(self, buckets: Sequence[float]) -> None:
        self._buckets = buckets
        self.counts = [0] * (len(buckets) + 1)
        self.exemplars: dict[int, ExemplarSample] = {}
        self.total = 0.0

    def observe(self, value: float, exemplar: dict[str, str] | None = None) -> None:
        """Count a value; ``exemplar`` holds the ids of its trace."""
        place = bisect_left(self._buckets, value)
        self.counts[place] += 1
        self.total += value
        if exemplar is not None:
            self.exemplars[place] = ExemplarSample(exemplar, value, time())


class LoopHistogram(Collector):
    """A histogram whose values all come from the thread of the event loop.

    It replaces the library's histogram, which acquires a lock for each of its counters and costs
    five times as much for each value.
    """

    def __init__(
        self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float]
    ) -> None:
        self._name = name
        self._text = text
        self._labels = labels
        self._buckets = buckets
        self._bounds = [*map(str, map(float, buckets)), "+Inf"]
        self._series: dict[tuple[str, ...], HistogramSeries] = {}

    def series(self, *labels: str) -> HistogramSeries:
        """Return the series with these values of the labels; it exists from now on."""
        found = self._series.get(labels)
        if found is None:
            found = self._series[labels] = HistogramSeries(self._buckets)
        return found

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """Yield the histogram."""
        family = self._family()
        for labels, one in list(self._series.items()):
            buckets = [
                (bound, float(count), one.exemplars[place])
                if place in one.exemplars
                else (bound, float(count))
                for place, (bound, count) in enumerate(
                    zip(self._bounds, accumulate(one.counts), strict=True)
                )
            ]
            family.add_metric(labels, buckets, one.total)
        yield family

    def describe(self) -> Iterable[HistogramMetricFamily]:
        """Yield the metric without samples."""
        yield self._family()

    def _family(self) -> HistogramMetricFamily:
        return HistogramMetricFamily(self._name, self._text, labels=self._labels)
