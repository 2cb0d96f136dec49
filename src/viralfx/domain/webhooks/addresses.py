"""Which addresses are on the public internet, and which none may be lifted from that rule."""

from collections.abc import Sequence
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import TypeAlias

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network

# Written out, and not `is_global`: what that says differs between the versions of Python.
_NOT_PUBLIC: tuple[Network, ...] = tuple(
    map(
        ip_network,
        (
            # IANA's registry of special-purpose addresses, IPv4.
            "0.0.0.0/8",  # this network
            "10.0.0.0/8",
            "100.64.0.0/10",  # behind a carrier's NAT
            "127.0.0.0/8",
            "169.254.0.0/16",  # link-local; also where clouds keep a machine's credentials
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
            # A public address that each machine of Azure has a service of the host on.
            "168.63.129.16/32",
            # The same registry, IPv6: the parts of 2000::/3 that are not ordinary hosts.
            "2001::/23",  # protocols, Teredo among them
            "2001:db8::/32",
            "2002::/16",  # 6to4: any IPv4 address, in other clothes
            "3fff::/20",
        ),
    )
)
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")

_NEVER: tuple[Network, ...] = tuple(
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


def parse_address(text: str) -> Address:
    """Read an address, an IPv4 one in an IPv6 one's clothes (mapped, NAT64) as what it is.

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
    """Tell whether an address is that of an ordinary host on the internet."""
    if isinstance(address, IPv6Address) and address not in _GLOBAL_UNICAST:
        return False
    return not _within(address, _NOT_PUBLIC)


def parse_network(text: str) -> Network:
    """Read a network that may be reached though it is not public.

    Raises ``ValueError`` for none, and for one that includes what nobody means to call: metadata
    services of clouds, link-local, multicast and reserved addresses.
    """
    network = ip_network(text)
    for never in _NEVER:
        if network.version == never.version and network.overlaps(never):
            raise ValueError(f"includes {never}, which must never be called; make it narrower")
    return network


def reaches(address: Address, lifted: Sequence[Network]) -> bool:
    """Tell whether an address is public, or in a network that may be reached all the same."""
    return is_public(address) or _within(address, lifted)


def _within(address: Address, networks: Sequence[Network]) -> bool:
    return any(address.version == n.version and address in n for n in networks)
