"""Reading the URL of a webhook so strictly that no two programs can read it differently."""

import re
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address

from viralfx.domain.webhooks.addresses import Address
from viralfx.domain.webhooks.errors import WebhookRefusedError

LONGEST_URL = 2048
DEFAULT_PORTS = {"https": 443, "http": 80}

_VISIBLE = re.compile(r"[!-\[\]-~]+").fullmatch  # ASCII without spaces and backslashes
_URL = re.compile(r"(https?)://([^/?#]+)(/[^?#]*)?(\?[^#]*)?", re.IGNORECASE).fullmatch
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::([0-9]{1,5}))?", re.IGNORECASE).fullmatch
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)").fullmatch
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*").fullmatch
_LONGEST_NAME = 253


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where a webhook goes: the parts of its URL, in one spelling."""

    scheme: str
    host: str
    """In small letters; an IPv6 address without brackets."""
    port: int
    target: str = field(repr=False)
    """Path and query: they may hold a secret."""
    address: Address | None = None
    """The host, where it is written as an address."""

    @property
    def authority(self) -> str:
        """Host and port as the ``Host`` header says them: a default port stays unsaid."""
        host = f"[{self.host}]" if isinstance(self.address, IPv6Address) else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def parse_destination(url: str) -> Destination:
    """Read a URL. Raises :class:`WebhookRefusedError` for all that is unusual.

    Names in other scripts have to come as ``xn--...`` and addresses in their one canonical
    spelling; there may be no user, password or fragment.
    """
    if len(url) > LONGEST_URL:
        raise WebhookRefusedError(f"the URL is longer than {LONGEST_URL} characters")
    if not _VISIBLE(url):
        raise WebhookRefusedError(
            "the URL holds a character that must be written in ASCII: xn--... in the host,"
            " %.. elsewhere"
        )
    parts = _URL(url)
    if parts is None:
        raise WebhookRefusedError("the URL is not https://host/path, without a fragment")
    scheme, authority = parts[1].lower(), parts[2].lower()
    if "@" in authority:
        raise WebhookRefusedError("the URL holds a user or a password")
    host, port, address = parse_authority(authority)
    return Destination(
        scheme=scheme,
        host=host,
        port=DEFAULT_PORTS[scheme] if port is None else port,
        target=(parts[3] or "/") + (parts[4] or ""),
        address=address,
    )


def parse_authority(authority: str) -> tuple[str, int | None, Address | None]:
    """Read ``host[:port]`` in small letters; return also the address that the host may be.

    Raises :class:`WebhookRefusedError`.
    """
    parts = _AUTHORITY(authority)
    if parts is None:
        raise WebhookRefusedError("the URL's host and port are not host or host:port")
    port = None if parts[2] is None else int(parts[2])
    if port is not None and not 0 < port < 1 << 16:
        raise WebhookRefusedError(f"there is no port {port}")
    host, address = _host(parts[1])
    return host, port, address


def _host(written: str) -> tuple[str, Address | None]:
    try:
        if written.startswith("["):
            six = IPv6Address(written[1:-1])
            return six.compressed, six
        labels = written.split(".")
        # A browser and a resolver take 127.1, 0x7f.1 and 2130706433 for addresses as well.
        if _NUMBER(labels[-1]):
            four = IPv4Address(written)
            return str(four), four
    except ValueError:
        raise WebhookRefusedError("the URL's host is an address in no canonical form") from None
    if len(written) > _LONGEST_NAME or not all(map(_LABEL, labels)):
        raise WebhookRefusedError("the URL's host is no name that could be looked up")
    return written, None
