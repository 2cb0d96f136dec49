"""Traces through a real collector: both protocols, and an outage of the collector."""

from collections.abc import Iterator
from contextlib import contextmanager
from signal import SIGTERM

import pytest
from tests.servers.collector import Collector, http_collector
from tests.servers.fixtures import or_skip
from tests.servers.rotel import Rotel, rotel
from tests.servers.waiting import wait_until
from tests.system.jobs import accept
from tests.system.service import Service, running

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PROTOCOLS = ["http/protobuf", "grpc"]


@contextmanager
def collected(protocol: str) -> Iterator[tuple[Service, Rotel, Collector]]:
    """Run the service with a real collector, and a receiver of the spans that it forwards."""
    with http_collector() as received, or_skip(), rotel(protocol, received.port) as collector:
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
            "OTEL_EXPORTER_OTLP_TIMEOUT": "2",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=staging",
            "TASK_MODULES": "tests.job_tasks",
        }
        with running(environment=environment) as service:
            yield service.wait_ready(), collector, received


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_real_collector_accepts_the_spans(protocol: str) -> None:
    """It forwards ids, parents, kinds, attributes and resources, also of the shutdown's spans."""
    with collected(protocol) as (service, _collector, received):
        headers = {"traceparent": f"00-{TRACE}-{CALLER}-01", "X-Correlation-ID": "order-17"}
        accept(service, "parcels.echo", None, **headers)
        request, send, process = received.wait_for(
            "POST /api/v1/jobs", "send analytics", "process analytics"
        )
        service.signal(SIGTERM)
        assert service.exit_code() == 0
        (shutdown,) = received.wait_for("shutdown")

    assert {span.trace for span in (request, send, process)} == {TRACE}
    assert [request.parent, send.parent, process.parent] == [CALLER, request.id, send.id]
    assert [request.kind, send.kind, process.kind] == ["SERVER", "PRODUCER", "CONSUMER"]
    assert request.attributes["http.response.status_code"] == 202
    assert process.attributes["viralfx.correlation_id"] == "order-17"
    assert shutdown.attributes["viralfx.shutdown.reason"] == "SIGTERM"
    for span in (request, send, process, shutdown):
        assert span.resource["service.name"] == "viralfx-backend"
        assert span.resource["deployment.environment.name"] == "staging"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_spans_arrive_again_after_an_outage_of_the_collector(protocol: str) -> None:
    """The loss and the recovery are one line each, and requests are answered all the time."""
    with collected(protocol) as (service, collector, received):
        assert service.get("/before").status == 404
        received.wait_for("GET")
        collector.kill()

        def lost() -> bool:
            assert service.get("/during").status == 404
            return bool(service.logged("Traces are lost"))

        wait_until(lost, seconds=30, what="the loss is logged")
        collector.start()
        received.spans.clear()

        def again() -> bool:
            assert service.get("/after").status == 404
            return bool(service.logged("Traces arrive again"))

        wait_until(again, seconds=60, what="the recovery is logged")
        received.wait_for("GET")
        service.signal(SIGTERM)
        assert service.exit_code() == 0

    assert len(service.logged("Traces are lost")) == 1
    assert len(service.logged("Traces arrive again")) == 1
    assert service.errors == []
