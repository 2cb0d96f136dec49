"""The allow list: the only hosts that webhooks may go to, and how they may be reached."""

from collections.abc import Iterable
from dataclasses import dataclass

from viralfx.domain.webhooks.addresses import (
    Network,
    is_public,
    parse_address,
    parse_network,
    reaches,
)
from viralfx.domain.webhooks.destinations import (
    DEFAULT_PORTS,
    Destination,
    parse_authority,
    parse_destination,
)
from viralfx.domain.webhooks.errors import WebhookRefusedError


@dataclass(frozen=True, slots=True, kw_only=True)
class AllowedHost:
    """One host, or all below a domain, with the scheme and the port that go with it."""

    scheme: str
    host: str
    port: int
    below: bool = False
    """Whether the hosts below ``host`` are meant, and not itself."""

    def covers(self, destination: Destination) -> bool:
        """Tell whether webhooks may go there."""
        if (destination.scheme, destination.port) != (self.scheme, self.port):
            return False
        if self.below:
            return destination.host.endswith(f".{self.host}")
        return destination.host == self.host


def parse_allowed(entry: str) -> AllowedHost | Network:
    """Read one entry of the allow list; raises ``ValueError`` that says what is wrong with it.

    - ``hooks.example.com``: this host, by https on port 443;
    - ``*.example.com``: every host below it, and not itself;
    - ``hooks.example.com:8443``: this port instead;
    - ``http://hooks.example.com``: in plain text, on port 80 or the one given;
    - ``192.0.2.7`` and ``[2001:db8::7]``: an address, where the URL has just that for a host; it
      need not be public;
    - ``10.20.0.0/16``: no host, but a network that the listed hosts may be in although it is not
      public.
    """
    scheme, separator, rest = entry.lower().rpartition("://")
    if not separator:
        scheme = "https"
        if "/" in rest:
            return _network(rest)
    if scheme not in DEFAULT_PORTS:
        raise ValueError(f"{entry!r} must be https or http, or say no scheme")
    below = rest.startswith("*.")
    try:
        host, port, address = parse_authority(rest.removeprefix("*."))
    except WebhookRefusedError:
        raise ValueError(
            f"{entry!r} is none of host, host:port, *.domain, http://host, an address and a network"
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
    # Written out it may be reached though it is not public; some must not be even then.
    address = parse_address(host)
    if not is_public(address):
        _network(str(address))


class AllowList:
    """Says where webhooks may go. An empty one allows nothing."""

    def __init__(self, entries: Iterable[str] = (), *, also: str | None = None) -> None:
        """``entries`` are as :func:`parse_allowed` has them.

        ``also`` is a URL whose host is listed by being configured, as that of the alerts is; its
        addresses follow the rule all the same. Raises ``ValueError`` for what cannot be listed,
        and :class:`WebhookRefusedError` for a URL that is none.
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
        """Whether no webhook can be sent at all."""
        return not self._hosts

    def admit(self, url: str) -> Destination:
        """Read a URL and return where it leads. Raises :class:`WebhookRefusedError`."""
        destination = parse_destination(url)
        if not any(host.covers(destination) for host in self._hosts):
            where = f"{destination.scheme}://{destination.authority}"
            raise WebhookRefusedError(f"WEBHOOK_ALLOWED_HOSTS does not list {where}")
        return destination

    def check_addresses(self, destination: Destination, addresses: Iterable[str]) -> None:
        """Refuse a host that has any address which is not public, unless that is listed.

        Call it with the very addresses that will be connected to. Raises
        :class:`WebhookRefusedError`.
        """
        if destination.address is not None:
            return
        for written in addresses:
            address = parse_address(written)
            if not reaches(address, self._networks):
                raise WebhookRefusedError(
                    f"{destination.host} has the address {address}, which is not public and in no"
                    " network that WEBHOOK_ALLOWED_HOSTS lists"
                )
