"""What can be scraped: one registry per assembly, and how it is written out."""

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder

from viralfx.telemetry.metrics.exemplars import Exemplar, no_exemplar
from viralfx.telemetry.metrics.requests import RequestMetrics


class Metrics:
    """The metrics of one assembly.

    They have a registry of their own, not the library's global one, so that two applications in
    one process do not count into each other's.
    """

    def __init__(self, exemplar: Exemplar = no_exemplar) -> None:
        """``exemplar`` names the trace of what is measured."""
        self.registry = CollectorRegistry(auto_describe=True)
        self.exemplar = exemplar
        """What names the trace of a measurement, for those who measure."""
        self.requests = RequestMetrics(self.registry)
        ProcessCollector(registry=self.registry)

    def render(self, accept: str) -> tuple[bytes, str]:
        """Write everything out; returns the body and its media type.

        ``accept`` is the header of the request: who asks for OpenMetrics gets it, exemplars
        included, and everybody else the older text format. So does who asks for a version that is
        none.
        """
        try:
            encode, media_type = choose_encoder(accept)
        except (TypeError, ValueError):  # the library takes a version apart without looking
            encode, media_type = choose_encoder("")
        return encode(self.registry), media_type
