"""The client of a request behind proxies."""

from typing import Any

import pytest
from tests.unit.test_settings import problems

from viralfx.settings import Settings
from viralfx.web.client_address import TrustedProxies, is_on_this_machine

PROXIES = ("10.0.0.0/24", "2001:db8:1::/48", "192.0.2.1")


def seen(
    *headers: tuple[str, str], peer: str | None = "10.0.0.5", kind: str = "http"
) -> tuple[Any, str]:
    """Return the client and the scheme of a request with these headers."""
    scope: dict[str, Any] = {
        "type": kind,
        "client": None if peer is None else (peer, 4711),
        "scheme": "ws" if kind == "websocket" else "http",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers],
    }
    TrustedProxies(PROXIES).apply(scope)
    return scope["client"] and scope["client"][0], scope["scheme"]


def listed(text: str, **more: Any) -> Any:
    """Return the client for a value of X-Forwarded-For."""
    return seen(("x-forwarded-for", text), **more)[0]


@pytest.mark.parametrize(
    ("text", "client"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("203.0.113.9, 203.0.113.7", "203.0.113.7"),
        ("203.0.113.9, 203.0.113.7, 10.0.0.9, 192.0.2.1", "203.0.113.7"),
        ("203.0.113.7:8080", "203.0.113.7"),
        ("2001:db8::7", "2001:db8::7"),
        ("[2001:db8::7]:443", "2001:db8::7"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("fe80::7%outcome=done" + "x" * 500, "fe80::7"),
        ("10.0.0.8, 10.0.0.9", "10.0.0.8"),
        ("203.0.113.9, unknown", "10.0.0.5"),
        ("203.0.113.9, unknown, 10.0.0.9", "10.0.0.9"),
        ("203.0.113.9, <script>", "10.0.0.5"),
        ("", "10.0.0.5"),
        (",,,", "10.0.0.5"),
        ("\xff", "10.0.0.5"),
        ("203.0.113.9, " * 10_000 + "203.0.113.7", "203.0.113.7"),
        ("203.0.113.9, " + "10.0.0.9, " * 10_000 + "10.0.0.8", "10.0.0.9"),
    ],
    ids=lambda text: text[:40] or "empty",
)
def test_the_first_address_from_the_right_that_is_no_proxy_is_the_client(
    text: str, client: str
) -> None:
    """The addresses before it may be invented; a text that is no address ends the list."""
    assert listed(text) == client


@pytest.mark.parametrize("peer", ["10.0.1.5", "203.0.113.1", "2001:db8:2::1", "testclient", None])
def test_a_peer_that_is_not_trusted_names_no_client(peer: str | None) -> None:
    """Nor a scheme."""
    headers = (("x-forwarded-for", "203.0.113.7"), ("x-forwarded-proto", "https"))
    assert seen(*headers, peer=peer) == (peer, "http")


@pytest.mark.parametrize("peer", ["::ffff:10.0.0.5", "2001:db8:1::5", "192.0.2.1"])
def test_a_trusted_peer_may_have_either_version(peer: str) -> None:
    """A socket for both versions shows IPv4 as a form of IPv6."""
    assert listed("203.0.113.7", peer=peer) == "203.0.113.7"


def test_several_headers_are_one_list() -> None:
    """RFC 9110, 5.3."""
    headers = (("x-forwarded-for", "203.0.113.9"), ("x-forwarded-for", "203.0.113.7, 10.0.0.9"))
    assert seen(*headers)[0] == "203.0.113.7"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("for=203.0.113.7", ("203.0.113.7", "http")),
        ("for=203.0.113.9, for=203.0.113.7;proto=https", ("203.0.113.7", "https")),
        ('For="[2001:db8::7]:4711";by=10.0.0.5', ("2001:db8::7", "http")),
        ("for=203.0.113.9, for=_hidden", ("10.0.0.5", "http")),
        ("by=10.0.0.9;proto=https", ("10.0.0.5", "https")),
    ],
)
def test_the_standard_header_is_read(text: str, expected: tuple[str, str]) -> None:
    """RFC 7239."""
    assert seen(("forwarded", text)) == expected


def test_headers_that_disagree_have_no_meaning() -> None:
    """A proxy writes one of them, and passes on the one that its client has sent."""
    lie, truth = ("forwarded", "for=203.0.113.9"), ("x-forwarded-for", "203.0.113.7")
    assert seen(lie, truth)[0] == "10.0.0.5"
    assert seen(("forwarded", "for=203.0.113.7"), truth)[0] == "203.0.113.7"


@pytest.mark.parametrize(
    ("kind", "text", "scheme"),
    [
        ("http", "https", "https"),
        ("http", "HTTPS", "https"),
        ("http", "javascript", "http"),
        ("http", "http, https", "https"),
        ("websocket", "https", "wss"),
        ("websocket", "http", "ws"),
    ],
)
def test_the_scheme_is_that_of_the_nearest_proxy(kind: str, text: str, scheme: str) -> None:
    """Of a WebSocket its own form."""
    assert seen(("x-forwarded-proto", text), kind=kind)[1] == scheme


def test_without_a_setting_no_peer_is_trusted() -> None:
    """Not even this machine."""
    assert TrustedProxies.from_settings(Settings()) is None


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ("10.0.0.1/24", "host bits set"),
        ("10.0.0.0/33", "10.0.0.0/33"),
        ("proxy.internal", "proxy.internal"),
        ("0.0.0.0/0", "0.0.0.0/0 is wider than /8, so clients in it choose their address"),
        ("0.0.0.0/1", "0.0.0.0/1 is wider than /8, so clients in it choose their address"),
        ("10.0.0.0/8,128.0.0.0/7", "128.0.0.0/7 is wider than /8"),
        ("::/0", "::/0 is wider than /16, so clients in it choose their address"),
        ("2000::/3", "2000::/3 is wider than /16"),
        ("fc00::/15", "fc00::/15 is wider than /16"),
    ],
)
def test_a_wrong_network_is_an_error(value: str, word: str) -> None:
    """Also one that is so wide that two or a few of them trust every peer."""
    (problem,) = problems(TRUSTED_PROXIES=value)
    assert problem.startswith("TRUSTED_PROXIES: ")
    assert word in problem


def test_a_network_as_wide_as_those_of_private_addresses_is_none() -> None:
    """A cluster may have all of 10.0.0.0/8, and the prefix of a provider."""
    assert problems(TRUSTED_PROXIES="10.0.0.0/8,fd00::/16") == []


@pytest.mark.parametrize(
    ("client", "header", "local"),
    [
        ("127.0.0.1", None, True),
        ("127.9.8.7", None, True),
        ("::1", None, True),
        ("::ffff:127.0.0.1", None, True),
        (None, None, True),
        ("testclient", None, True),
        ("192.0.2.7", None, False),
        ("10.0.0.5", None, False),
        ("172.17.0.1", None, False),
        ("fe80::7%eth0", None, False),
        ("::ffff:192.0.2.7", None, False),
        ("0.0.0.0", None, False),  # noqa: S104 - no socket is bound
        *(
            ("127.0.0.1", header, False)
            for header in ("x-forwarded-for", "forwarded", "x-real-ip", "x-forwarded-host", "via")
        ),
        (None, "x-forwarded-for", False),
        ("127.0.0.1", "x-forwarded-proto-of-mine", True),
    ],
)
def test_a_caller_on_this_machine_has_loopback_and_no_proxy(
    client: str | None, header: str | None, *, local: bool
) -> None:
    """A Unix socket is on this machine, too; a request through a proxy may come from anywhere."""
    headers = [] if header is None else [(header.encode(), b"127.0.0.1")]
    scope: dict[str, Any] = {"client": client and (client, 4711), "headers": headers}

    assert is_on_this_machine(scope) is local
