"""Readiness seen from outside, by Prometheus's blackbox_exporter."""

import asyncio
from collections.abc import Iterator
from signal import SIGTERM

import pytest
import yaml
from tests.observability.test_deploy import METRICS
from tests.servers.blackbox import CONFIGURATION, BlackboxExporter
from tests.servers.fixtures import or_skip
from tests.servers.receiver import Behaviour, receiver, status
from tests.servers.waiting import wait_until
from tests.system.service import Service, running

MODULE = "viralfx_ready"


@pytest.fixture(scope="module")
def exporter() -> Iterator[BlackboxExporter]:
    """Return an exporter for the tests of this file."""
    with or_skip(), BlackboxExporter() as server:
        yield server


def ready_at(port: int) -> str:
    """Return the address that the exporter asks."""
    return f"http://127.0.0.1:{port}/health/ready"


def test_readiness_is_seen_from_outside(exporter: BlackboxExporter) -> None:
    """A service that leaves fails the probe while it still answers, and after its end."""
    with running(environment={"SHUTDOWN_READINESS_DELAY": "4000"}) as service:
        service.wait_ready()
        before = exporter.probe(MODULE, ready_at(service.port))
        service.signal(SIGTERM)
        wait_until(lambda: not _is_ready(service), what="it is not ready")
        leaving = exporter.probe(MODULE, ready_at(service.port))
        assert service.exit_code() == 0
        gone = exporter.probe(MODULE, ready_at(service.port))

    seen = (before, leaving, gone)
    found = [(each["probe_success"], each["probe_http_status_code"]) for each in seen]
    assert found == [(1, 200), (0, 503), (0, 0)]


def _answering(body: bytes, code: int = 200, *headers: str) -> Behaviour:
    """Return a behaviour that reads a request without a body and answers it."""

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(status(code, "Connection: close", *headers, body=body))
        await writer.drain()

    return behave


def _is_ready(service: Service) -> bool:
    return service.status("/health/ready") == 200


@pytest.mark.parametrize(
    ("body", "passes"),
    [
        (b'{"ready":true,"checks":{}}', 1),
        (b'{"ready": true}', 1),
        (b'{"ready":false,"reason":"draining"}', 0),
        (b"<html>Welcome to the proxy</html>", 0),
        (b"", 0),
    ],
)
async def test_a_page_of_another_program_is_no_answer(
    exporter: BlackboxExporter, body: bytes, passes: int
) -> None:
    """The status 200 alone does not pass."""
    async with receiver() as other:
        other.behaviours = [_answering(body)]
        seen = await asyncio.to_thread(exporter.probe, MODULE, ready_at(other.port))

    assert seen["probe_http_status_code"] == 200
    assert seen["probe_failed_due_to_regex"] == 1 - passes
    assert seen["probe_success"] == passes


async def test_a_redirect_is_no_answer(exporter: BlackboxExporter) -> None:
    """It is not followed, not even to an answer that passes."""
    async with receiver() as other:
        moved = _answering(b"", 302, f"Location: {ready_at(other.port)}")
        other.behaviours = [moved, _answering(b'{"ready":true}')]
        seen = await asyncio.to_thread(exporter.probe, MODULE, ready_at(other.port))

    assert (seen["probe_success"], seen["probe_http_status_code"]) == (0, 302)
    assert other.connections == 1


def test_the_document_names_the_module_and_the_path() -> None:
    """Prometheus would get 400 for an unknown module."""
    (text,) = [part for part in METRICS.split("```yaml\n")[1:] if "/probe" in part]
    (scrape,) = yaml.safe_load(text.partition("```")[0])["scrape_configs"]
    modules = yaml.safe_load(CONFIGURATION.read_text(encoding="utf-8"))["modules"]

    assert scrape["params"]["module"] == list(modules) == [MODULE]
    assert scrape["static_configs"][0]["targets"][0].endswith("/health/ready")
    # The alerts on missing scrapes are for the jobs of the service itself.
    assert not scrape["job_name"].startswith("viralfx-")
