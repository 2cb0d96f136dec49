"""Requests: how many, how long, how they ended, and how many are under way."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from viralfx.telemetry.metrics.exemplars import Exemplar, no_exemplar

# The bounds that OpenTelemetry's semantic conventions advise for this very metric.
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)

METHODS = frozenset(
    {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"}
)

OTHER = "_OTHER"
"""The method of a request whose method is none of those."""

UNMATCHED = "unmatched"
"""The route of a request that none of the application's routes is for."""


class RequestMetrics:
    """Counts requests under names of OpenTelemetry's semantic conventions.

    A client chooses paths and methods, so neither is a label as it comes: the route is its
    template, and an unknown method is ``_OTHER``.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        exemplar: Exemplar = no_exemplar,
    ) -> None:
        self._exemplar = exemplar
        self._duration = Histogram(
            "http_server_request_duration_seconds",
            "Time from a request's head to the end of its answer. Probes are not counted.",
            ("http_request_method", "http_route", "http_response_status_code"),
            buckets=_BUCKETS,
            registry=registry,
        )
        self._active = Gauge(
            "http_server_active_requests", "Requests that are under way.", registry=registry
        )
        self._cut = Counter(
            "viralfx_requests_cut_total",
            "Requests that the shutdown or the client ended before their answer.",
            registry=registry,
        )
        # A look-up by labels takes longer than all the rest, and there are few of them.
        self._series: dict[tuple[str, str, int], Histogram] = {}

    def count_active(self, in_flight: Callable[[], int]) -> None:
        """Take the number of requests that are under way from ``in_flight`` at each scrape."""
        self._active.set_function(in_flight)

    def observe(self, method: str, route: str | None, status: int | None, seconds: float) -> None:
        """Count a request; ``route`` is a template, ``status`` None where no answer began."""
        if status is None:
            self._cut.inc()
            return
        key = (method, route or UNMATCHED, status)
        series = self._series.get(key)
        if series is None:
            known = method if method in METHODS else OTHER
            series = self._duration.labels(known, key[1], str(status))
            if known == method:
                self._series[key] = series
        series.observe(seconds, self._exemplar())
