"""Request authorization: bearer tokens, and the ``Origin`` check for browsers.

Tokens are compared in constant time. ``Origin`` is judged by RFC 6454 and RFC 9110.
"""

import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from urllib.parse import urlsplit

from viralfx.settings import Settings

Headers = Iterable[tuple[bytes, bytes]]
"""Request headers as ASGI gives them: names in lower case."""


class AccessVerdict(Enum):
    """The result of an authorization check."""

    ALLOWED = auto()
    UNAUTHORIZED = auto()
    """401: the token is missing or wrong."""
    FORBIDDEN = auto()
    """403: no token is configured, so no request is allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessPolicy:
    """Decides which requests may use the operations endpoints."""

    token: bytes | None
    details_need_token: bool

    @classmethod
    def from_settings(cls, settings: Settings) -> "AccessPolicy":
        """Return the policy that MANAGEMENT_TOKEN and HEALTH_DETAILS define."""
        secret = settings.management_token
        return cls(
            token=secret.value.strip().encode() if secret else None,
            details_need_token=settings.health_details == "authorized",
        )

    def to_details(self, headers: Headers) -> AccessVerdict:
        """Authorize a request for check details, logger levels or metrics."""
        return self.to_shutdown(headers) if self.details_need_token else AccessVerdict.ALLOWED

    def to_shutdown(self, headers: Headers) -> AccessVerdict:
        """Authorize a request to see or begin the shutdown."""
        return check_bearer_token(headers, self.token)

    def to_stacks(self, headers: Headers) -> AccessVerdict:
        """Authorize a request to see the stacks of the running process."""
        return check_bearer_token(headers, self.token)

    def to_change(self, headers: Headers) -> AccessVerdict:
        """Authorize a request to change the running process, such as the level of a logger."""
        return check_bearer_token(headers, self.token)


def check_bearer_token(headers: Headers, expected: bytes | None) -> AccessVerdict:
    """Compare the bearer token of a request with the configured one; None: not configured."""
    if expected is None:
        return AccessVerdict.FORBIDDEN
    given = next((value for name, value in headers if name == b"authorization"), b"")
    scheme, _, token = given.partition(b" ")
    matches = scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), expected)
    return AccessVerdict.ALLOWED if matches else AccessVerdict.UNAUTHORIZED


CHANGING = frozenset({"POST", "PUT", "PATCH", "DELETE"})
"""The methods that may change state."""

_DEFAULT_PORTS = {"http": 80, "https": 443}


def is_cross_origin(headers: Headers) -> bool:
    """Return True if the ``Origin`` of a request names another host or port than its ``Host``.

    A request without ``Origin`` is not cross-origin, because browsers send the header with every
    request that may change state. Host names are compared case-insensitively. A missing port is
    the default port of the origin's scheme. Schemes are not compared: behind a proxy that
    terminates TLS the service does not know its own scheme. ``null``, an invalid ``Origin`` or
    ``Host``, and more than one of either count as cross-origin.
    """
    origins = [value for name, value in headers if name == b"origin"]
    if not origins:
        return False
    hosts = [value for name, value in headers if name == b"host"]
    if len(origins) > 1 or len(hosts) != 1:
        return True
    scheme, separator, authority = origins[0].decode("latin-1").partition("://")
    default = _DEFAULT_PORTS.get(scheme.lower())
    if not separator or default is None:
        return True
    origin = _authority(authority, default)
    return origin is None or origin != _authority(hosts[0].decode("latin-1"), default)


def _authority(text: str, default_port: int) -> tuple[str, int] | None:
    """Return host and port; None for an invalid authority or one with a user."""
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:  # an incomplete IPv6 address or an invalid port
        return None
    if not host or parts.netloc != text or "@" in text or text.endswith(":"):
        return None
    return host, default_port if port is None else port
