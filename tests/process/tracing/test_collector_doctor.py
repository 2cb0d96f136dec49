"""``viralfx doctor`` connects to the collector of traces, without sending anything."""

import asyncio

import pytest
from tests.servers.ports import free_port

from viralfx.bootstrap.doctor import doctor_checks
from viralfx.domain.doctor import Area, Finding, Verdict
from viralfx.settings import Settings

PROXIES = ("http_proxy", "https_proxy", "grpc_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def unproxied(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Remove the proxies of this machine; return the patcher."""
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


async def examined(endpoint: str, protocol: str = "http/protobuf") -> Finding:
    """Return the finding about an endpoint."""
    environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
    }
    (found,) = await dict(doctor_checks(Settings(), environ))[Area.TRACING].check()
    return found


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
async def test_a_collector_that_listens_passes(protocol: str) -> None:
    """It gets a connection and no byte."""
    received = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.set_result(await reader.read())
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        found = await examined(f"http://127.0.0.1:{port}", protocol)
        sent = await asyncio.wait_for(received, 10)

    assert (found.verdict, sent) == (Verdict.PASS, b"")
    assert f"traces go to http://127.0.0.1:{port} by" in found.found


@pytest.mark.parametrize(
    ("endpoint", "protocol", "text"),
    [
        ("http://u:hunter2@127.0.0.1:{}/x", "http/protobuf", "http://127.0.0.1:{} does not listen"),
        ("127.0.0.1:{}", "grpc", "127.0.0.1:{} does not listen"),
        ("http://collector.invalid:4318", "http/protobuf", "has an unknown host name"),
    ],
)
async def test_a_collector_that_does_not_listen_is_found(
    endpoint: str, protocol: str, text: str
) -> None:
    """The service works without it, so this is a warning; its remedy names the variable."""
    port = free_port()
    found = await examined(endpoint.format(port), protocol)

    assert found.verdict is Verdict.WARN
    assert f"{text.format(port)}: no trace arrives" in found.found
    assert found.remedy == "start the collector, or correct OTEL_EXPORTER_OTLP_ENDPOINT"
    assert "hunter2" not in found.found


async def test_a_collector_behind_a_proxy_is_not_tried(unproxied: pytest.MonkeyPatch) -> None:
    """A direct connection would prove nothing about the way of the spans."""
    unproxied.setenv("http_proxy", "http://proxy.invalid:3128")
    away = await examined("http://collector.invalid:4318")
    unproxied.setenv("no_proxy", "127.0.0.1")
    near = await examined(f"http://127.0.0.1:{free_port()}")

    assert (away.verdict, near.verdict) == (Verdict.PASS, Verdict.WARN)
    assert "through a proxy, so the collector itself was not tried" in away.found
