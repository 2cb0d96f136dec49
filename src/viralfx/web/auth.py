"""Request authorization: bearer tokens, and the origin of browsers.

Tokens are compared in constant time. ``Origin`` is judged by RFC 6454 and RFC 9110.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from urllib.parse import urlsplit

from viralfx.settings import Settings
from viralfx.settings.live_tokens import LiveTokens
from viralfx.settings.tokens import MANAGEMENT

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

    tokens: LiveTokens
    details_need_token: bool

    @classmethod
    def from_settings(cls, settings: Settings) -> "AccessPolicy":
        """Return the policy that MANAGEMENT_TOKEN and HEALTH_DETAILS define."""
        return cls(
            tokens=LiveTokens(settings),
            details_need_token=settings.health_details == "authorized",
        )

    @property
    def has_token(self) -> bool:
        """True if there is a management token."""
        return self.tokens.find(MANAGEMENT.name) is not None

    def to_details(self, headers: Headers) -> AccessVerdict:
        """Authorize a request for check details, logger levels or metrics."""
        return self.to_shutdown(headers) if self.details_need_token else AccessVerdict.ALLOWED

    def to_shutdown(self, headers: Headers) -> AccessVerdict:
        """Authorize a request to see or begin the shutdown."""
        return check_bearer_token(headers, self.tokens, MANAGEMENT.name)

    def to_stacks(self, headers: Headers) -> AccessVerdict:
        """Authorize a request to see the stacks of the running process."""
        return check_bearer_token(headers, self.tokens, MANAGEMENT.name)

    def to_change(self, headers: Headers) -> AccessVerdict:
        """Authorize a request to change the running process, such as the level of a logger."""
        return check_bearer_token(headers, self.tokens, MANAGEMENT.name)


def check_bearer_token(headers: Headers, tokens: LiveTokens, name: str) -> AccessVerdict:
    """Compare the bearer token of a request with those of a name."""
    if tokens.find(name) is None:
        return AccessVerdict.FORBIDDEN
    given = next((value for name, value in headers if name == b"authorization"), b"")
    scheme, _, token = given.partition(b" ")
    holder = tokens.identify(token.strip()) if scheme.lower() == b"bearer" else None
    matches = holder is not None and holder.name == name
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


_MAX_AUTHORITY = 300
"""Length of a name of 255 characters with a port and brackets, and some more."""


def _authority(text: str, default_port: int) -> tuple[str, int] | None:
    """Return host and port; None for an invalid authority or one with a user."""
    if len(text) > _MAX_AUTHORITY:  # the parser caches what it has parsed
        return None
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:  # an incomplete IPv6 address or an invalid port
        return None
    if not host or parts.netloc != text or "@" in text or text.endswith(":"):
        return None
    return host, default_port if port is None else port


# -- the console ---------------------------------------------------------------------------------


def is_own_request(headers: Headers, *, origin_needed: bool = True) -> bool:
    """Return True if a browser proves that a page of this origin makes the request.

    That takes an ``Origin`` equal to ``Host``, and where the browser sends it, ``Sec-Fetch-Site:
    same-origin``. Without ``origin_needed`` a client that sends no ``Origin``, which is no browser,
    makes an own request, too.
    """
    origins = 0
    for name, value in headers:
        if name == b"origin":
            origins += 1
        elif name == b"sec-fetch-site" and value != b"same-origin":
            return False
    return (origins == 1 or not (origins or origin_needed)) and not is_cross_origin(headers)


def is_json(headers: Headers) -> bool:
    """Return True if the body is declared as JSON, which a form of another page cannot send."""
    kinds = [value for name, value in headers if name == b"content-type"]
    return [kind.split(b";")[0].strip().lower() for kind in kinds] == [b"application/json"]


def is_secure(headers: Headers) -> bool:
    """Return True if the browser uses https, also where a proxy ends TLS: its ``Origin`` says."""
    return any(name == b"origin" and value.startswith(b"https://") for name, value in headers)


SECURITY_HEADERS = (
    (
        b"content-security-policy",
        (
            b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
            b" connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none';"
            b" require-trusted-types-for 'script'"
        ),
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
"""The headers of every response of the console: no other page may frame, embed or script it."""
