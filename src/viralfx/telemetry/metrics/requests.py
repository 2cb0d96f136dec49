"""Requests: how many, how long, how they ended, and how many are under way."""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import accumulate
from time import time

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

# The bounds that OpenTelemetry's semantic conventions advise for this very metric.
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_BOUNDS = [*map(str, map(float, _BUCKETS)), "+Inf"]


class RequestMetrics:
    """Counts requests under names of OpenTelemetry's semantic conventions."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._durations = _Durations()
        registry.register(self._durations)
        self._active = Gauge(
            "http_server_active_requests", "Requests that are under way.", registry=registry
        )
        self._cut = Counter(
            "viralfx_requests_cut_total",
            "Requests that the shutdown or the client ended before their answer.",
            registry=registry,
        )
        self._streams = Counter(
            "viralfx_event_streams_total",
            "Event streams that ended.",
            ("http_route",),
            registry=registry,
        )

    def count_active(self, in_flight: Callable[[], int]) -> None:
        """Take the number of requests that are under way from ``in_flight`` at each scrape."""
        self._active.set_function(in_flight)

    def observe(
        self,
        method: str,
        route: str,
        status: int | None,
        seconds: float,
        trace: tuple[str, str] | None = None,
    ) -> None:
        """Count a request.

        ``method`` and ``route`` are as in :class:`EndedRequest`: a client can make up neither.
        ``status`` is None where no answer began; ``trace`` are the ids of the trace and the span
        that were recorded of it.
        """
        if status is None:
            self._cut.inc()
            return
        series = self._durations.series
        key = (method, route, status)
        one = series.get(key)
        if one is None:
            one = series[key] = _Series()
        place = bisect_left(_BUCKETS, seconds)
        one.counts[place] += 1
        one.total += seconds
        if trace is not None:
            ids = {"trace_id": trace[0], "span_id": trace[1]}
            one.exemplars[place] = Exemplar(ids, seconds, time())

    def count_stream(self, route: str) -> None:
        """Count an event stream, which lasted for as long as somebody listened.

        Among the durations it would make the service look slow.
        """
        self._streams.labels(route).inc()


class _Series:
    """The durations of one kind of request."""

    __slots__ = ("counts", "exemplars", "total")

    def __init__(self) -> None:
        self.counts = [0] * len(_BOUNDS)
        self.exemplars: dict[int, Exemplar] = {}
        self.total = 0.0


class _Durations(Collector):
    """The histogram of all requests.

    Not the library's own, which takes a lock for each of the numbers that it counts up and so
    costs each request five times as much: requests end on the event loop alone.
    """

    def __init__(self) -> None:
        self.series: dict[tuple[str, str, int], _Series] = {}

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """Yield what was counted so far."""
        family = self._family()
        for (method, route, status), one in list(self.series.items()):
            buckets = [
                (bound, float(count), one.exemplars[place])
                if place in one.exemplars
                else (bound, float(count))
                for place, (bound, count) in enumerate(
                    zip(_BOUNDS, accumulate(one.counts), strict=True)
                )
            ]
            family.add_metric((method, route, str(status)), buckets, one.total)
        yield family

    def describe(self) -> Iterable[HistogramMetricFamily]:
        """Yield what it is called."""
        yield self._family()

    @staticmethod
    def _family() -> HistogramMetricFamily:
        return HistogramMetricFamily(
            "http_server_request_duration_seconds",
            "Time from a request's head to its answer's end, but for probes and event streams.",
            labels=("http_request_method", "http_route", "http_response_status_code"),
        )
