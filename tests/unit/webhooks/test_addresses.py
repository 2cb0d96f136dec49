"""Addresses: which are public, which may be lifted from that rule, and which never."""

import pytest

from viralfx.domain.webhooks.addresses import is_public, parse_address, parse_network, reaches


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
def test_public(address: str) -> None:
    """Ordinary hosts, up to the very edge of each network that is not."""
    assert is_public(parse_address(address))


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",  # noqa: S104 - nobody binds to it
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
def test_not_public(address: str) -> None:
    """Private, loopback, link-local, multicast, reserved, shared, and any of these inside."""
    assert not is_public(parse_address(address))


def test_the_list_agrees_with_pythons_own() -> None:
    """All that Python calls private, multicast or reserved is not public here, by one in each /12.

    The other way round there is less agreement, and there this list is the stricter one.
    """
    for number in range(0, 1 << 32, (1 << 20) - 1):
        address = parse_address(
            f"{number >> 24}.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
        )
        if not address.is_global or address.is_multicast:
            assert not is_public(address), address


@pytest.mark.parametrize("network", ["10.0.0.0/8", "127.0.0.1", "fd12::/16", "::1/128"])
def test_a_network_may_be_lifted(network: str) -> None:
    """Its addresses may be reached, and no other private ones."""
    lifted = [parse_network(network)]
    inside = parse_address(str(lifted[0].network_address + 0))
    assert not reaches(inside, [])
    assert reaches(inside, lifted)
    assert not reaches(parse_address("192.168.0.1"), lifted)
    assert reaches(parse_address("8.8.8.8"), lifted)


def test_an_address_in_other_clothes_is_lifted_as_what_it_is() -> None:
    """A mapped address is the IPv4 one."""
    lifted = [parse_network("127.0.0.0/8")]
    assert reaches(parse_address("::ffff:127.0.0.1"), lifted)
    assert not reaches(parse_address("127.0.0.1"), [parse_network("::ffff:0:0/96")])


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
def test_a_network_with_what_must_never_be_called_is_refused(network: str) -> None:
    """Metadata services, link-local, multicast: nobody lists these on purpose."""
    with pytest.raises(ValueError, match="which must never be called"):
        parse_network(network)


@pytest.mark.parametrize("network", ["10.0.0.1/8", "10.0.0.0/33", "example.com", "", "10.0.0/8"])
def test_what_is_no_network(network: str) -> None:
    """Also one that has bits set which its length leaves out."""
    with pytest.raises(ValueError, match=r"network|address|host bits"):
        parse_network(network)
