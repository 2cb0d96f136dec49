"""SSRF protection: which addresses are public, can be allowed, or are never allowed."""

import pytest

from viralfx.domain.webhooks.url import is_allowed, is_public, parse_address, parse_network


@pytest.mark.parametrize(
    "address",
    [
        "1.1.1.1",
        "8.8.8.8",
        "9.255.255.255",
        "11.0.0.0",
        "100.63.255.255",
        "100.128.0.0",
        "126.255.255.255",
        "128.0.0.0",
        "169.253.255.255",
        "169.255.0.0",
        "172.15.255.255",
        "172.32.0.0",
        "192.0.1.0",
        "192.167.255.255",
        "192.169.0.0",
        "198.17.255.255",
        "198.20.0.0",
        "223.255.255.255",
        "2001:4860:4860::8888",
        "2606:4700:4700::1111",
        "2a00:1450:4001::1",
        "::ffff:8.8.8.8",
        "64:ff9b::8.8.8.8",
    ],
)
def test_public_addresses(address: str) -> None:
    """Also those next to the edges of other networks."""
    assert is_public(parse_address(address))


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",  # noqa: S104 - not a bind address
        "0.1.2.3",
        "10.0.0.0",
        "10.255.255.255",
        "100.64.0.0",
        "100.127.255.255",
        "127.0.0.1",
        "127.255.255.255",
        "168.63.129.16",
        "169.254.0.1",
        "169.254.169.254",
        "172.16.0.0",
        "172.31.255.255",
        "192.0.0.1",
        "192.0.0.192",
        "192.0.2.1",
        "192.88.99.1",
        "192.168.0.1",
        "198.18.0.1",
        "198.19.255.255",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",  # compatible, long deprecated
        "::ffff:10.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "::ffff:0:10.0.0.1",  # translated
        "64:ff9b::10.0.0.1",
        "64:ff9b::169.254.169.254",
        "64:ff9b:1::8.8.8.8",
        "100::1",
        "2001::1",  # Teredo
        "2001:10::1",
        "2001:db8::1",
        "2002:7f00:1::1",  # 6to4 of 127.0.0.1
        "2002:a00:1::1",
        "2002:808:808::1",
        "3fff::1",
        "4000::1",
        "5f00::1",
        "fc00::1",
        "fd00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "ff02::1",
        "ffff::1",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    """Private, loopback, link-local, multicast, reserved, shared, and embedded ones."""
    assert not is_public(parse_address(address))


def test_addresses_that_python_calls_private_are_not_public() -> None:
    """Checked with one address of each /12. Other addresses may differ: the list is stricter."""
    for number in range(0, 1 << 32, (1 << 20) - 1):
        address = parse_address(
            f"{number >> 24}.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
        )
        if not address.is_global or address.is_multicast:
            assert not is_public(address), address


@pytest.mark.parametrize("network", ["10.0.0.0/8", "127.0.0.1", "fd12::/16", "::1/128"])
def test_a_private_network_can_be_allowed(network: str) -> None:
    """Other private networks stay forbidden."""
    lifted = [parse_network(network)]
    inside = parse_address(str(lifted[0].network_address + 0))
    assert not is_allowed(inside, [])
    assert is_allowed(inside, lifted)
    assert not is_allowed(parse_address("192.168.0.1"), lifted)
    assert is_allowed(parse_address("8.8.8.8"), lifted)


def test_a_mapped_address_is_checked_as_ipv4() -> None:
    """An IPv4-mapped address is the IPv4 address."""
    lifted = [parse_network("127.0.0.0/8")]
    assert is_allowed(parse_address("::ffff:127.0.0.1"), lifted)


@pytest.mark.parametrize(
    "network",
    [
        "0.0.0.0/0",
        "::/0",
        "169.254.169.254",
        "169.254.0.0/16",
        "100.64.0.0/10",
        "168.63.129.16",
        "224.0.0.0/4",
        "255.255.255.255",
        "fe80::/10",
        "fd00::/8",
        "fd00:ec2::/32",
        "fd20:ce::/32",
        "100.100.100.0/24",
        "ff02::1",
        "::/96",
    ],
)
def test_a_network_with_forbidden_addresses_is_rejected(network: str) -> None:
    """Metadata services, link-local and multicast addresses are never allowed."""
    with pytest.raises(ValueError, match="which is never allowed"):
        parse_network(network)


@pytest.mark.parametrize(
    "network",
    [
        "2002::/16",
        "2002:a9fe:a9fe::/48",  # 6to4 of 169.254.169.254
        "2000::/3",
        "2001::/32",
        "2001:0:a9fe:a9fe::/64",
        "64:ff9b::/96",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::/48",
        "::ffff:0:0/96",
        "::ffff:10.0.0.0/104",
        "::ffff:0:169.254.169.254",
        "::169.254.169.254",
    ],
)
def test_a_network_that_embeds_ipv4_addresses_is_rejected(network: str) -> None:
    """6to4, Teredo, NAT64 and mapped networks would include metadata services."""
    with pytest.raises(ValueError, match="embed IPv4 addresses; list the IPv4 network instead"):
        parse_network(network)


@pytest.mark.parametrize("network", ["2001:4860::/32", "fd12::/16", "2600::/12", "::1"])
def test_other_ipv6_networks_can_be_allowed(network: str) -> None:
    """Those next to the forbidden ones."""
    assert parse_network(network).version == 6


@pytest.mark.parametrize("network", ["10.0.0.1/8", "10.0.0.0/33", "example.com", "", "10.0.0/8"])
def test_an_invalid_network_is_rejected(network: str) -> None:
    """Also one with host bits set."""
    with pytest.raises(ValueError, match=r"network|address|host bits"):
        parse_network(network)
