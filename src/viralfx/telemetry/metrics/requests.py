"""Metrics of HTTP requests and connections."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge

from viralfx.telemetry.metrics.series import HistogramSeries, LoopHistogram

# The bounds that OpenTelemetry's semantic conventions recommend for this metric.
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)

_REGISTERED_CODES = range(1000, 1016)
_OWN_CODES = range(3000, 5000)
"""Close codes of applications and libraries."""


class AccessMetrics:
    """Counts requests with wrong tokens."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._wrong = Counter(
            "viralfx_wrong_tokens_total",
            "Requests with a wrong token at operations endpoints, console or jobs API.",
            ("place",),
            registry=registry,
        )
        for place in ("operations", "console", "jobs"):
            # Created at the start: Prometheus does not see the first increase of a new series.
            self._wrong.labels(place)

    def count_wrong_token(self, place: str) -> None:
        """Count a request with a wrong token."""
        self._wrong.labels(place).inc()


class RequestMetrics:
    """Counts and measures requests, named after OpenTelemetry's semantic conventions."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._durations = LoopHistogram(
            "http_server_request_duration_seconds",
            "Time from a request's head to its response's end, without probes and event streams.",
            ("http_request_method", "http_route", "http_response_status_code"),
            _BUCKETS,
        )
        registry.register(self._durations)
        self._series: dict[tuple[str, str, int], HistogramSeries] = {}
        self._active = Gauge(
            "http_server_active_requests", "Requests in flight.", registry=registry
        )
        self._cut = Counter(
            "viralfx_requests_cut_total",
            "Requests that the shutdown or the client ended before their response was complete.",
            registry=registry,
        )
        self._streams = Counter(
            "viralfx_event_streams_total",
            "Finished event streams.",
            ("http_route",),
            registry=registry,
        )

        self._websockets = Counter(
            "viralfx_websockets_total",
            "Finished WebSockets.",
            ("http_route", "close_code"),
            registry=registry,
        )
        self._received = Counter(
            "viralfx_websocket_received_bytes_total",
            "Bytes of the messages that clients sent in finished WebSockets.",
            ("http_route",),
            registry=registry,
        )
        self._sent = Counter(
            "viralfx_websocket_sent_bytes_total",
            "Bytes of the messages that clients got in finished WebSockets.",
            ("http_route",),
            registry=registry,
        )

    def count_active(self, in_flight: Callable[[], int]) -> None:
        """Read the number of requests in flight from ``in_flight`` at each scrape."""
        self._active.set_function(in_flight)

    def observe(
        self,
        method: str,
        route: str,
        status: int | None,
        seconds: float,
        trace: tuple[str, str] | None = None,
        *,
        cut: bool = False,
    ) -> None:
        """Record a request; ``cut`` marks an incomplete response.

        ``method`` and ``route`` are those of :class:`EndedRequest`, so that clients cannot create
        series. ``status`` is None if no response started. ``trace`` holds trace id and span id of
        a recorded request.
        """
        if cut or status is None:
            self._cut.inc()
        if status is None:
            return
        key = (method, route, status)
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = self._durations.series(method, route, str(status))
        series.observe(
            seconds, None if trace is None else {"trace_id": trace[0], "span_id": trace[1]}
        )

    def count_stream(self, route: str) -> None:
        """Count a finished event stream.

        Its duration is not recorded: it depends on the client and would distort the latency.
        """
        self._streams.labels(route).inc()

    def count_websocket(
        self, route: str, close_code: int | None, *, received: int, sent: int
    ) -> None:
        """Count a finished WebSocket; ``close_code`` is None for one that was not accepted.

        Clients choose codes from 3000 on, so the label shows only their first digit.
        """
        if close_code is None:
            label = "rejected"
        elif close_code in _REGISTERED_CODES:
            label = str(close_code)
        else:
            label = f"{close_code // 1000}xxx" if close_code in _OWN_CODES else "other"
        self._websockets.labels(route, label).inc()
        self._received.labels(route).inc(received)
        self._sent.labels(route).inc(sent)


class HttpMetrics:
    """Counts the rejections and connections of the HTTP servers of a process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._rejected = Counter(
            "viralfx_http_rejected_total",
            "Requests and connections that a limit of the HTTP server rejected.",
            ("reason",),
            registry=registry,
        )
        self._upgrades = Counter(
            "viralfx_http_upgrades_ignored_total",
            "Requests whose Upgrade header the HTTP server ignored.",
            registry=registry,
        )
        self._open = Gauge(
            "viralfx_http_connections", "Open connections.", ("server",), registry=registry
        )
        self._max = Gauge(
            "viralfx_http_connections_max",
            "Maximum number of open connections.",
            ("server",),
            registry=registry,
        )

    def count_ignored_upgrade(self) -> None:
        """Count a request that asked for an unsupported protocol and was served as usual."""
        self._upgrades.inc()

    def add_server(
        self, name: str, reasons: Iterable[str], connections: Callable[[], int], limit: int
    ) -> Callable[[str], None]:
        """Add the metrics of a server; return a function that counts a rejection by its reason.

        ``connections`` returns the number of open connections, ``limit`` is its maximum. The
        series of all ``reasons`` exist from the start, so that Prometheus sees the first increase.
        """
        counters = {reason: self._rejected.labels(reason) for reason in reasons}
        self._open.labels(name).set_function(connections)
        self._max.labels(name).set(limit)
        return lambda reason: counters[reason].inc()
