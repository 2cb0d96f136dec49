"""SSRF protection for webhooks: strict URL parsing, the allow list, and address checks."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import TypeAlias

from viralfx.core.errors import ViralFXError


class WebhookError(ViralFXError):
    """A webhook was not delivered."""


class WebhookRefusedError(WebhookError):
    """The webhook was not sent because its URL or destination is not allowed. Do not retry."""


class WebhookRejectedError(WebhookError):
    """The receiver rejected the webhook for good. Do not retry."""

    def __init__(self, message: str, status: int) -> None:
        self.status = status
        super().__init__(message)


class WebhookUnavailableError(WebhookError):
    """The receiver is unavailable or did not respond; it may have processed the webhook.

    ``retry_after`` is the wait in seconds that the receiver requested, or None.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        self.retry_after = retry_after
        super().__init__(message)


Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network

# Listed here because the result of `is_global` differs between Python versions.
_NOT_PUBLIC: tuple[Network, ...] = tuple(
    map(
        ip_network,
        (
            # IANA's registry of special-purpose addresses, IPv4.
            "0.0.0.0/8",  # this network
            "10.0.0.0/8",
            "100.64.0.0/10",  # carrier-grade NAT
            "127.0.0.0/8",
            "169.254.0.0/16",  # link-local; also the metadata services of clouds
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.0.2.0/24",
            "192.88.99.0/24",  # relays of 6to4
            "192.168.0.0/16",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved, and broadcast
            # A public address at which each Azure machine reaches a service of its host.
            "168.63.129.16/32",
            # The same registry, IPv6: the parts of 2000::/3 that are not public hosts.
            "2001::/23",  # protocols, Teredo among them
            "2001:db8::/32",
            "2002::/16",  # 6to4: embeds any IPv4 address
            "3fff::/20",
        ),
    )
)
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")

_FORBIDDEN: tuple[Network, ...] = tuple(
    map(
        ip_network,
        (
            "0.0.0.0/8",
            "169.254.0.0/16",
            "224.0.0.0/4",
            "240.0.0.0/4",
            "168.63.129.16/32",
            "100.100.100.200/32",  # Alibaba's metadata service
            "::/128",
            "fd00:ec2::254/128",  # Amazon's
            "fd20:ce::254/128",  # Google's
            "fe80::/10",
            "ff00::/8",
        ),
    )
)

_EMBEDDING: tuple[Network, ...] = tuple(
    map(
        ip_network,
        (
            "::/96",  # IPv4-compatible
            "::ffff:0:0/96",  # IPv4-mapped
            "::ffff:0:0:0/96",  # translated by SIIT
            "64:ff9b::/96",  # NAT64
            "64:ff9b:1::/48",  # NAT64 with a local prefix
            "2001::/32",  # Teredo
            "2002::/16",  # 6to4
        ),
    )
)
"""Networks whose addresses embed an IPv4 address; the rules above do not check that address."""
_LOOPBACK = IPv6Network("::1/128")


def parse_address(text: str) -> Address:
    """Parse an address; return the embedded IPv4 address of a mapped or NAT64 one.

    Raises ``ValueError``.
    """
    address = ip_address(text)
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def is_public(address: Address) -> bool:
    """Return whether an address belongs to a public host on the internet."""
    if isinstance(address, IPv6Address) and address not in _GLOBAL_UNICAST:
        return False
    return not _within(address, _NOT_PUBLIC)


def parse_network(text: str) -> Network:
    """Parse a network that webhooks may reach although it is not public.

    Raises ``ValueError`` for text that is not a network, for a network that includes addresses
    which are never allowed (metadata services of clouds, link-local, multicast, reserved), and for
    IPv6 networks whose addresses embed an IPv4 address.
    """
    network = ip_network(text)
    for forbidden in _FORBIDDEN:
        if network.version == forbidden.version and network.overlaps(forbidden):
            raise ValueError(f"includes {forbidden}, which is never allowed; make it narrower")
    for embedding in _EMBEDDING:
        if network != _LOOPBACK and network.version == 6 and network.overlaps(embedding):  # noqa: PLR2004
            raise ValueError(
                f"includes addresses of {embedding}, which embed IPv4 addresses; list the IPv4"
                " network instead"
            )
    return network


def is_never_allowed(address: Address) -> bool:
    """Return whether no setting can allow an address: link-local, metadata service, reserved.

    An IPv6 address that embeds an IPv4 address is one, unless :func:`parse_address` unwraps it.
    """
    if _within(address, _FORBIDDEN):
        return True
    return address != _LOOPBACK.network_address and _within(address, _EMBEDDING)


def is_allowed(address: Address, networks: Sequence[Network]) -> bool:
    """Return whether an address is public or in one of the listed networks."""
    return is_public(address) or _within(address, networks)


def _within(address: Address, networks: Sequence[Network]) -> bool:
    return any(address.version == n.version and address in n for n in networks)


MAX_URL_CHARACTERS = 2048
DEFAULT_PORTS = {"https": 443, "http": 80}

_VISIBLE = re.compile(r"[!-\[\]-~]+").fullmatch  # ASCII without spaces and backslashes
_URL = re.compile(r"(https?)://([^/?#]+)(/[^?#]*)?(\?[^#]*)?", re.IGNORECASE).fullmatch
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::([0-9]{1,5}))?", re.IGNORECASE).fullmatch
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)").fullmatch
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*").fullmatch
MAX_HOST_CHARACTERS = 253


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """The destination of a webhook: the normalized parts of its URL."""

    scheme: str
    host: str
    """Lower case; an IPv6 address has no brackets."""
    port: int
    target: str = field(repr=False)
    """Path and query. They may contain a secret."""
    address: Address | None = None
    """The host as an address, or None if it is a name."""

    @property
    def authority(self) -> str:
        """Host and port for the ``Host`` header, without a default port."""
        host = f"[{self.host}]" if isinstance(self.address, IPv6Address) else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def origin(self) -> str:
        """Scheme, host and port, always with the port: the receiver that a key belongs to."""
        host = f"[{self.host}]" if isinstance(self.address, IPv6Address) else self.host
        return f"{self.scheme}://{host}:{self.port}"


def parse_destination(url: str) -> Destination:
    """Parse a URL strictly; raise :class:`WebhookRefusedError` if it is not in the usual form.

    Internationalized names must be written as ``xn--...`` and addresses in canonical form. A user,
    password or fragment is not allowed.
    """
    if len(url) > MAX_URL_CHARACTERS:
        raise WebhookRefusedError(f"the URL is longer than {MAX_URL_CHARACTERS} characters")
    if not _VISIBLE(url):
        raise WebhookRefusedError(
            "the URL contains a character that must be encoded in ASCII: xn--... in the host,"
            " %.. elsewhere"
        )
    parts = _URL(url)
    if parts is None:
        raise WebhookRefusedError("the URL must be https://host/path, without a fragment")
    scheme, authority = parts[1].lower(), parts[2].lower()
    if "@" in authority:
        raise WebhookRefusedError("the URL contains a user or a password")
    host, port, address = parse_authority(authority)
    return Destination(
        scheme=scheme,
        host=host,
        port=DEFAULT_PORTS[scheme] if port is None else port,
        target=(parts[3] or "/") + (parts[4] or ""),
        address=address,
    )


def parse_authority(authority: str) -> tuple[str, int | None, Address | None]:
    """Parse lower-case ``host[:port]`` into host, port and the address if the host is one.

    Raises :class:`WebhookRefusedError`.
    """
    parts = _AUTHORITY(authority)
    if parts is None:
        raise WebhookRefusedError("the URL's host and port are not host or host:port")
    port = None if parts[2] is None else int(parts[2])
    if port is not None and not 0 < port < 1 << 16:
        raise WebhookRefusedError(f"port {port} is not from 1 to 65535")
    host, address = _host(parts[1])
    return host, port, address


def _host(written: str) -> tuple[str, Address | None]:
    try:
        if written.startswith("["):
            six = IPv6Address(written[1:-1])
            return six.compressed, six
        labels = written.split(".")
        # Browsers and resolvers also treat 127.1, 0x7f.1 and 2130706433 as addresses.
        if _NUMBER(labels[-1]):
            four = IPv4Address(written)
            return str(four), four
    except ValueError:
        raise WebhookRefusedError("the URL's host is an address that is not canonical") from None
    if len(written) > MAX_HOST_CHARACTERS or not all(map(_LABEL, labels)):
        raise WebhookRefusedError("the URL's host is not a valid DNS name")
    return written, None


@dataclass(frozen=True, slots=True, kw_only=True)
class AllowedHost:
    """An entry of the allow list: scheme, port, and a host or all hosts below a domain."""

    scheme: str
    host: str
    port: int
    below: bool = False
    """True for the hosts below ``host``, without ``host`` itself."""

    def covers(self, destination: Destination) -> bool:
        """Return whether the entry allows the destination."""
        if (destination.scheme, destination.port) != (self.scheme, self.port):
            return False
        if self.below:
            return destination.host.endswith(f".{self.host}")
        return destination.host == self.host


def parse_allowed(entry: str) -> AllowedHost | Network:
    """Parse one entry of the allow list. Raises ``ValueError`` that describes the problem.

    - ``hooks.example.com``: this host, by https on port 443.
    - ``*.example.com``: every host below the domain, without the domain itself.
    - ``hooks.example.com:8443``: another port.
    - ``http://hooks.example.com``: without TLS, on port 80 or the given port.
    - ``192.0.2.7`` and ``[2001:db8::7]``: URLs whose host is exactly this address, which need not
      be public.
    - ``10.20.0.0/16``: a network, not a host: listed hosts may have addresses in it although it is
      not public.
    """
    scheme, separator, rest = entry.lower().rpartition("://")
    if not separator:
        scheme = "https"
        if "/" in rest:
            return _network(rest)
    if scheme not in DEFAULT_PORTS:
        raise ValueError(f"{entry!r} must have the scheme https or http, or no scheme")
    below = rest.startswith("*.")
    try:
        host, port, address = parse_authority(rest.removeprefix("*."))
    except WebhookRefusedError:
        raise ValueError(
            f"{entry!r} is not a host, host:port, *.domain, http://host, address or network"
        ) from None
    if below and address is not None:
        raise ValueError(f"{entry!r} must have a domain after the asterisk")
    if address is not None:
        _check_literal(host)
    return AllowedHost(
        scheme=scheme,
        host=host,
        port=DEFAULT_PORTS[scheme] if port is None else port,
        below=below,
    )


def _network(text: str) -> Network:
    try:
        return parse_network(text)
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None


def _check_literal(host: str) -> None:
    # A literal address may be listed although it is not public, unless it is never allowed.
    address = parse_address(host)
    if not is_public(address):
        _network(str(address))


class AllowList:
    """The hosts and networks that webhooks may be sent to. An empty list allows nothing."""

    def __init__(self, entries: Iterable[str] = (), *, also: str | None = None) -> None:
        """``entries`` have the form described at :func:`parse_allowed`.

        ``also`` is a URL whose host is allowed without an entry, such as the URL for alerts; its
        addresses are checked like those of other hosts. Raises ``ValueError`` for an invalid
        entry, and :class:`WebhookRefusedError` for an invalid URL.
        """
        hosts: list[AllowedHost] = []
        networks: list[Network] = []
        for entry in entries:
            parsed = parse_allowed(entry)
            if isinstance(parsed, AllowedHost):
                hosts.append(parsed)
            else:
                networks.append(parsed)
        if also is not None:
            there = parse_destination(also)
            if there.address is not None:
                _check_literal(there.host)
            hosts.append(AllowedHost(scheme=there.scheme, host=there.host, port=there.port))
        self._hosts = tuple(hosts)
        self._networks = tuple(networks)

    @property
    def empty(self) -> bool:
        """True if the list allows no webhook."""
        return not self._hosts

    def admit(self, url: str) -> Destination:
        """Parse a URL and return its destination.

        Raises :class:`WebhookRefusedError` if the list does not allow it.
        """
        destination = parse_destination(url)
        if not any(host.covers(destination) for host in self._hosts):
            where = f"{destination.scheme}://{destination.authority}"
            raise WebhookRefusedError(f"WEBHOOK_ALLOWED_HOSTS does not list {where}")
        return destination

    def check_addresses(self, destination: Destination, addresses: Iterable[str]) -> None:
        """Check that every address of a host is public or in a listed network.

        Call it with exactly the addresses that you will connect to, so that a second DNS query
        cannot change them. Raises :class:`WebhookRefusedError`.
        """
        if destination.address is not None:
            return
        for written in addresses:
            address = parse_address(written)
            if not is_allowed(address, self._networks):
                raise WebhookRefusedError(
                    f"{destination.host} has the address {address}, which is not public and not in"
                    " a network that WEBHOOK_ALLOWED_HOSTS lists"
                )
