"""The address of a client, which trusted proxies alone may name, and whether it is local."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from viralfx.server.interface import Scope
from viralfx.settings import Settings

_MAX_HOPS = 50
"""Addresses of a header that are read, from the right; clients choose its length."""
_SCHEMES = {"http": ("http", "ws"), "https": ("https", "wss")}
"""The schemes of a request and of a WebSocket, by the scheme that a proxy names."""

_FORWARDED = frozenset(
    {b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip"}
)
"""Headers of requests that came through a proxy."""

Address = IPv4Address | IPv6Address


class TrustedProxies:
    """Takes the client and the scheme of a request from the headers of trusted proxies.

    Each proxy appends the address of its own client, so the list is read from the right: the first
    address that is no trusted proxy is the client, and all before it may be invented. Without a
    trusted peer the headers have no meaning.
    """

    def __init__(self, networks: Iterable[str]) -> None:
        """``networks`` are addresses and networks. Raises ``ValueError`` for another text."""
        self._networks = [ip_network(each) for each in networks]

    @classmethod
    def from_settings(cls, settings: Settings) -> "TrustedProxies | None":
        """Return those of TRUSTED_PROXIES; None if no peer is trusted."""
        return cls(settings.trusted_proxies) if settings.trusted_proxies else None

    def apply(self, scope: Scope) -> None:
        """Replace client and scheme of a request by those that trusted proxies name."""
        peer = scope.get("client")
        address = _parsed(peer[0]) if peer else None
        if address is None or not self._trusts(address):
            return
        names: dict[bytes, list[str]] = {
            b"x-forwarded-for": [],
            b"x-forwarded-proto": [],
            b"forwarded": [],
        }
        for name, value in scope["headers"]:
            if name in names:
                names[name] += value.decode("latin-1").split(",")
        listed, protocols, forwarded = names.values()
        pairs = [_pairs(each) for each in forwarded[-_MAX_HOPS:]]
        by_list = self._client(address, listed)
        by_pairs = self._client(address, [each.get("for", "") for each in pairs])
        if listed and forwarded and by_list != by_pairs:
            # A proxy writes one of both and passes on the other, which the client has invented.
            return
        client = by_list if listed else by_pairs
        if client != address:
            scope["client"] = (str(client), 0)
        protocol = protocols[-1] if protocols else pairs[-1].get("proto", "") if pairs else ""
        if (schemes := _SCHEMES.get(protocol.strip().lower())) is not None:
            scope["scheme"] = schemes[scope["type"] == "websocket"]

    def _client(self, peer: Address, listed: Sequence[str]) -> Address:
        """Return the address that the list names, or the last one that a trusted proxy vouches for.

        A text that is no address, such as ``unknown``, ends the list.
        """
        client = peer
        for text in reversed(listed[-_MAX_HOPS:]):
            address = _parsed(_without_port(text.strip()))
            if address is None:
                break
            client = address
            if not self._trusts(address):
                break
        return client

    def _trusts(self, address: Address) -> bool:
        return any(address in network for network in self._networks)


def is_on_this_machine(scope: Scope) -> bool:
    """Return True if the caller of a request is on this machine: by loopback or a Unix socket.

    A request that came through a proxy is not: its address may be that of the proxy. An address
    that is no IP address is that of a client in this process, as in tests, or of a Unix socket.
    """
    client = scope.get("client")
    if client and not _is_local(client[0]):
        return False
    return all(name not in _FORWARDED for name, _ in scope["headers"])


@lru_cache(maxsize=256)
def _is_local(text: str) -> bool:
    address = _parsed(text)
    return address is None or address.is_loopback


def _parsed(text: str) -> Address | None:
    try:
        # The zone of `fe80::1%eth0` has a meaning on one machine alone, and may be any text.
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    # A socket that listens for both versions shows a client of IPv4 in this form.
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _without_port(text: str) -> str:
    """Return the address of ``192.0.2.7:80``, ``[2001:db8::7]:80`` and the same without a port."""
    text = text.strip('"')
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text


def _pairs(element: str) -> dict[str, str]:
    """Return the pairs of one element of ``Forwarded`` (RFC 7239)."""
    parts = (each.partition("=") for each in element.split(";"))
    return {name.strip().lower(): value.strip().strip('"') for name, _, value in parts}
