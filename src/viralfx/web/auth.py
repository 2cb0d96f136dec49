"""Request authorization: bearer tokens, and the origin of browsers.

Tokens are compared in constant time. ``Origin`` is judged by RFC 6454 and RFC 9110.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum, auto
from urllib.parse import urlsplit

from viralfx.domain.access import ANONYMOUS, Principal, Right
from viralfx.settings import Settings
from viralfx.settings.live_tokens import LiveTokens
from viralfx.settings.tokens import TokenBook

Headers = Iterable[tuple[bytes, bytes]]
"""Request headers as ASGI gives them: names in lower case."""


class AccessVerdict(Enum):
    """The result of an authorization check."""

    ALLOWED = auto()
    UNAUTHORIZED = auto()
    """401: the token is missing or wrong."""
    FORBIDDEN = auto()
    """403: no token is configured, so no request is allowed."""
    LACKS_READ = auto()
    """403: the token is known, and has not the right ``read``; the same below."""
    LACKS_OPERATE = auto()
    LACKS_ADMIN = auto()


_LACKS = {
    Right.READ: AccessVerdict.LACKS_READ,
    Right.OPERATE: AccessVerdict.LACKS_OPERATE,
    Right.ADMIN: AccessVerdict.LACKS_ADMIN,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessPolicy:
    """Decides which requests may use the operations endpoints."""

    tokens: LiveTokens
    details_need_token: bool

    @classmethod
    def from_settings(cls, settings: Settings) -> "AccessPolicy":
        """Return the policy that the tokens and HEALTH_DETAILS define for the API port."""
        return cls(
            tokens=LiveTokens(settings),
            details_need_token=not settings.shows_details(on_management_port=False),
        )

    def at_management_port(self, settings: Settings) -> "AccessPolicy":
        """Return the policy of the management port, with the same tokens."""
        return replace(self, details_need_token=not settings.shows_details(on_management_port=True))

    def to_details(self, headers: Headers) -> AccessVerdict:
        """Authorize a request for check details, logger levels or metrics."""
        if not self.details_need_token:
            return AccessVerdict.ALLOWED
        return self._require(headers, Right.READ)

    def to_shutdown(self, headers: Headers) -> AccessVerdict:
        """Authorize a request to begin the shutdown."""
        return self._require(headers, Right.ADMIN)

    def to_process(self, headers: Headers) -> AccessVerdict:
        """Authorize a request to see the stacks of the running process, or its shutdown."""
        return self._require(headers, Right.READ)

    def to_change(self, headers: Headers) -> AccessVerdict:
        """Authorize a request to change the running process, such as the level of a logger."""
        return self._require(headers, Right.OPERATE)

    def has_tokens(self, right: Right = Right.READ) -> bool:
        """Return True if some token has a right at these endpoints."""
        return any(token.principal.may(right) for token in self.tokens.book.tokens)

    def caller(self, headers: Headers) -> Principal:
        """Return the holder of the token of a request, or the anonymous caller."""
        return holder_of(headers, self.tokens.book) or ANONYMOUS

    def _require(self, headers: Headers, right: Right) -> AccessVerdict:
        if not self.has_tokens():
            return AccessVerdict.FORBIDDEN
        caller = holder_of(headers, self.tokens.book)
        if caller is None:
            return AccessVerdict.UNAUTHORIZED
        return AccessVerdict.ALLOWED if caller.may(right) else _LACKS[right]


def holder_of(headers: Headers, book: TokenBook) -> Principal | None:
    """Return the holder of the bearer token of a request; None without a known one."""
    given = next((value for name, value in headers if name == b"authorization"), b"")
    scheme, _, token = given.partition(b" ")
    return book.identify(token.strip()) if scheme.lower() == b"bearer" else None


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
