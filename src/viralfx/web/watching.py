"""What is told of each request once it is over."""

from collections.abc import Callable
from time import perf_counter

from viralfx.telemetry.metrics.requests import RequestMetrics
from viralfx.web.exchanges import Exchange


class RequestWatch:
    """Counts the requests that an application answered."""

    def __init__(self, metrics: RequestMetrics) -> None:
        self._metrics = metrics

    def count_active(self, in_flight: Callable[[], int]) -> None:
        """Take from ``in_flight`` how many requests are under way."""
        self._metrics.count_active(in_flight)

    def ended(self, exchange: Exchange) -> None:
        """Take in a request whose application has returned."""
        if exchange.websocket:
            return
        scope = exchange.scope
        seconds = perf_counter() - exchange.began
        # Litestar leaves the template of the route that it found in the scope.
        route = scope.get("path_template")
        self._metrics.observe(scope["method"], route, exchange.status, seconds)
