"""What is told of each request once it is over."""

from collections.abc import Callable, Iterable
from time import perf_counter, time

from viralfx.domain.correlation import current_correlation_id, current_user_id
from viralfx.telemetry.access_log import AccessLog
from viralfx.telemetry.metrics.requests import RequestMetrics
from viralfx.telemetry.requests import METHODS, OTHER, UNMATCHED, EndedRequest, mount_of
from viralfx.telemetry.trace_context import TRACE
from viralfx.web.exchanges import Exchange

_DIGITS = 20
"""As many make no number that a request could have; a client may write any."""


class RequestWatch:
    """Counts the requests that an application answered, and logs each of them."""

    def __init__(self, metrics: RequestMetrics, *, access_log: bool) -> None:
        self._metrics = metrics
        self._access_log = AccessLog() if access_log else None

    def count_active(self, in_flight: Callable[[], int]) -> None:
        """Take from ``in_flight`` how many requests are under way."""
        self._metrics.count_active(in_flight)

    def ended(self, exchange: Exchange) -> None:
        """Take in a request whose application has returned."""
        if exchange.websocket:
            return
        scope = exchange.scope
        seconds = perf_counter() - exchange.began
        # A client chooses paths and methods: neither is counted by or logged as it comes. Litestar
        # leaves the template of the route that it found in the scope; an empty one where another
        # application is mounted.
        route = scope.get("path_template") or mount_of(scope) or UNMATCHED
        method = scope["method"]
        if method not in METHODS:
            method = OTHER
        status, trace = exchange.status, scope.get(TRACE)
        if exchange.lasts:
            self._metrics.count_stream(route)
        else:
            self._metrics.observe(method, route, status, seconds, trace)
        if (log := self._access_log) is not None and log.wanted():
            log.write(
                EndedRequest(
                    time(),
                    current_correlation_id(),
                    current_user_id(),
                    trace,
                    method,
                    route,
                    status,
                    seconds,
                    _announced(scope["headers"]),
                    0 if status is None else exchange.sent,
                    not exchange.complete or status is None,
                )
            )


def _announced(headers: Iterable[tuple[bytes, bytes]]) -> int | None:
    for name, value in headers:
        if name == b"content-length":
            return int(value) if value.isdigit() and len(value) < _DIGITS else None
    return None
