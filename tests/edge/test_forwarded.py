"""The server accepts forwarded client addresses from trusted proxies only."""

from pathlib import Path

import httpx
import pytest
from tests.edge.test_attacks import APP
from tests.servers.envoy import envoy
from tests.servers.fixtures import or_skip
from tests.servers.haproxy import haproxy
from tests.servers.ports import free_port
from tests.servers.waiting import wait_until
from tests.system.service import running

FORWARDED = {"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "https"}
LIES = {
    **FORWARDED,
    "Forwarded": "for=203.0.113.8;proto=https",
    "x-forwarded-for": "203.0.113.9, 127.0.0.1",
}


@pytest.mark.parametrize(
    ("trusted", "headers", "expected"),
    [
        ("127.0.0.1", FORWARDED, {"host": "203.0.113.7", "scheme": "https"}),
        ("127.0.0.1", {}, {"host": "127.0.0.1", "scheme": "http"}),
        ("192.0.2.1", FORWARDED, {"host": "127.0.0.1", "scheme": "http"}),
        ("", FORWARDED, {"host": "127.0.0.1", "scheme": "http"}),
    ],
    ids=["from a trusted proxy", "without headers", "from an address that is not trusted", "unset"],
)
def test_forwarded_headers_count_from_trusted_proxies_only(
    trusted: str, headers: dict[str, str], expected: dict[str, str]
) -> None:
    """Without TRUSTED_PROXIES no peer is trusted, not even this machine."""
    environment = {"TRUSTED_PROXIES": trusted} if trusted else {}
    with running(*APP, environment=environment) as service:
        service.wait_ready()
        reply = service.get("/client", headers=headers)

    assert reply.json() == expected


@pytest.mark.parametrize("start", [haproxy, envoy], ids=["haproxy", "envoy"])
def test_a_proxy_names_the_client_and_hides_the_operations_endpoints(
    start: object, tmp_path: Path
) -> None:
    """With the shipped file; the address that the client claims is gone.

    ``test_public_side.py`` asks for all routes, and for other forms of their paths.
    """
    port = free_port()
    environment = {"TRUSTED_PROXIES": "127.0.0.1", "MANAGEMENT_TOKEN": "planted"}
    with running(*APP, environment=environment) as service:
        service.wait_ready()
        servers = {"a": service.port, "b": service.port}
        with or_skip(), start(port, servers, tmp_path) as proxy:  # type: ignore[operator]
            wait_until(lambda: proxy.is_up("a") and proxy.is_up("b"), what="both are up")
            with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
                seen = client.get("/client", headers=LIES).json()
                ready = client.get("/health/ready")
                stop = client.post("/health/shutdown", headers={"Authorization": "Bearer planted"})
        shutdown = service.get("/health/shutdown", headers={"Authorization": "Bearer planted"})

    assert seen == {"host": "127.0.0.1", "scheme": "http"}
    assert (ready.status_code, ready.json()["ready"]) == (200, True)
    assert stop.status_code == 404
    assert shutdown.json()["state"] == "ready"
