"""Cross-origin requests: the comparison of ``Origin`` and ``Host``."""

import pytest

from viralfx.web.auth import is_cross_origin

SAME = [
    ("http://localhost:3000", "localhost:3000"),
    ("http://api.example.com", "api.example.com"),
    ("https://api.example.com", "api.example.com"),
    ("https://api.example.com", "api.example.com:443"),
    ("https://api.example.com:443", "api.example.com"),
    ("http://api.example.com:80", "api.example.com"),
    ("HTTP://API.example.com", "api.EXAMPLE.com"),
    ("https://api.example.com:8443", "api.example.com:8443"),
    ("http://[::1]:3000", "[::1]:3000"),
    ("http://[::1]", "[::1]:80"),
]
OTHER = [
    ("null", "localhost:3000"),
    ("", "localhost:3000"),
    ("http://evil.example", "localhost:3000"),
    ("http://localhost", "localhost:3000"),
    ("http://localhost:3001", "localhost:3000"),
    ("https://api.example.com", "api.example.com:80"),
    ("http://api.example.com", "api.example.com:443"),
    ("http://api.example.com.evil.example", "api.example.com"),
    ("http://evil.example@api.example.com", "api.example.com"),
    ("http://api.example.com/", "api.example.com"),
    ("http://api.example.com:", "api.example.com"),
    ("http://api.example.com:99999", "api.example.com"),
    ("http://api.example.com:x", "api.example.com"),
    ("http://[::1", "[::1"),
    ("http://\xe4", "localhost"),
    ("http://", ""),
    ("file://", "localhost"),
    ("chrome-extension://localhost", "localhost"),
    ("api.example.com", "api.example.com"),
    ("http://a http://b", "a"),
]


def headers(origin: str, *hosts: str) -> list[tuple[bytes, bytes]]:
    """Return the headers of a request as ASGI gives them."""
    sent = [(b"host", host.encode("latin-1")) for host in hosts]
    return [*sent, (b"origin", origin.encode("latin-1"))]


@pytest.mark.parametrize(("origin", "host"), SAME)
def test_the_same_host_and_port_is_not_cross_origin(origin: str, host: str) -> None:
    """Case does not matter, and a missing port is the default of the origin's scheme."""
    assert not is_cross_origin(headers(origin, host))


@pytest.mark.parametrize(("origin", "host"), OTHER)
def test_another_host_or_port_is_cross_origin(origin: str, host: str) -> None:
    """An empty host and an invalid origin are cross-origin, too."""
    assert is_cross_origin(headers(origin, host))


def test_a_missing_or_repeated_header() -> None:
    """No ``Origin`` is same-origin; no ``Host``, or two of either header, is cross-origin."""
    origin = "http://localhost"

    assert not is_cross_origin([(b"host", b"localhost")])
    assert is_cross_origin([*headers(origin, "localhost"), (b"origin", origin.encode())])
    assert is_cross_origin(headers(origin, "localhost", "localhost"))
    assert is_cross_origin(headers(origin))
