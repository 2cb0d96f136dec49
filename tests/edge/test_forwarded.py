"""The server accepts forwarded client addresses from trusted proxies only."""

import pytest
from tests.edge.test_attacks import APP
from tests.system.service import running

FORWARDED = {"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "https"}


@pytest.mark.parametrize(
    ("trusted", "headers", "expected"),
    [
        ("127.0.0.1", FORWARDED, {"host": "203.0.113.7", "scheme": "https"}),
        ("127.0.0.1", {}, {"host": "127.0.0.1", "scheme": "http"}),
        ("192.0.2.1", FORWARDED, {"host": "127.0.0.1", "scheme": "http"}),
    ],
    ids=["from a trusted proxy", "without headers", "from an address that is not trusted"],
)
def test_forwarded_headers_count_from_trusted_proxies_only(
    trusted: str, headers: dict[str, str], expected: dict[str, str]
) -> None:
    """FORWARDED_ALLOW_IPS lists the trusted proxies, as with uvicorn itself."""
    with running(*APP, environment={"FORWARDED_ALLOW_IPS": trusted}) as service:
        service.wait_ready()
        reply = service.get("/client", headers=headers)

    assert reply.json() == expected
