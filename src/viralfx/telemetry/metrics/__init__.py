"""The Prometheus metrics of an assembly: one registry and its rendering."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder

from viralfx.telemetry.metrics.merged import MergedRegistries, MetricsRegistry
from viralfx.telemetry.metrics.requests import HttpMetrics, RequestMetrics
from viralfx.telemetry.metrics.series import Exemplar, no_exemplar


class Metrics:
    """The metrics of one assembly.

    The registry is separate from the library's global one, so that two applications in one process
    do not mix their counts.
    """

    def __init__(
        self, exemplar: Exemplar = no_exemplar, registries: Sequence[MetricsRegistry] = ()
    ) -> None:
        """``exemplar`` returns the labels of an exemplar for the current trace.

        ``registries`` are those of the application, which the rendering shows, too.
        """
        self.registry = CollectorRegistry(auto_describe=True)
        self._whole = MergedRegistries([self.registry, *registries])
        self.exemplar = exemplar
        """The exemplar function, for other metrics of this assembly."""
        self.requests = RequestMetrics(self.registry)
        self.http = HttpMetrics(self.registry)
        self._rendered: dict[str, bytes] = {}
        """The renderings of the current event loop iteration, by media type."""
        ProcessCollector(registry=self.registry)

    def render(self, accept: str) -> tuple[bytes, str]:
        """Render all metrics; return the body and its media type.

        ``accept`` is the ``Accept`` header. It selects OpenMetrics with exemplars or the older text
        format, which is also the answer to unknown versions. Requests in the same iteration of the
        event loop share one rendering, so that a flood of scrapes costs a single rendering.
        """
        try:
            encode, media_type = choose_encoder(accept)
        except (TypeError, ValueError):  # the library does not validate the version
            encode, media_type = choose_encoder("")
        body = self._rendered.get(media_type)
        if body is None:
            body = encode(self._whole)
            with suppress(RuntimeError):  # no event loop runs
                asyncio.get_running_loop().call_soon(self._rendered.clear)
                self._rendered[media_type] = body
        return body, media_type
