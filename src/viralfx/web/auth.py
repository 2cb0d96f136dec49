"""Request authorization: bearer tokens, sessions of the console, and the origin of browsers.

Tokens are compared in constant time. ``Origin`` is judged by RFC 6454 and RFC 9110.
"""

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum, StrEnum, auto
from urllib.parse import urlsplit

from viralfx.domain.access import ANONYMOUS, Principal, Right
from viralfx.domain.clock import Clock
from viralfx.settings import Settings
from viralfx.settings.tokens import MANAGEMENT, TokenBook

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

    token: bytes | None
    """MANAGEMENT_TOKEN, which begins sessions of the console."""
    details_need_token: bool
    book: TokenBook = field(default_factory=TokenBook)

    @classmethod
    def from_settings(
        cls, settings: Settings, *, on_management_port: bool = False
    ) -> "AccessPolicy":
        """Return the policy that MANAGEMENT_TOKEN and HEALTH_DETAILS define for a port."""
        book = settings.token_book
        management = book.find(MANAGEMENT.name)
        return cls(
            token=management.secrets[0] if management else None,
            book=book,
            details_need_token=not settings.shows_details(on_management_port=on_management_port),
        )

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

    @property
    def has_tokens(self) -> bool:
        """True if a token has a right at these endpoints."""
        return any(token.principal.may(Right.READ) for token in self.book.tokens)

    def caller(self, headers: Headers) -> Principal:
        """Return the holder of the token of a request, or the anonymous caller."""
        return holder_of(headers, self.book) or ANONYMOUS

    def _require(self, headers: Headers, right: Right) -> AccessVerdict:
        if not self.has_tokens:
            return AccessVerdict.FORBIDDEN
        caller = holder_of(headers, self.book)
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


SESSION_SECONDS = 8 * 3600
_MAC_BYTES = 32
_MAX_COOKIE_BYTES = 8192
_SESSION_DIGITS = 6
"""Digits of a session's number that the log shows."""


class Reads(StrEnum):
    """The views that a caller may read."""

    NONE = "none"
    STATUS = "status"
    """Status, stop and circuits: as HEALTH_DETAILS allows."""
    ALL = "all"
    """Every view, with a session."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """The valid session of a request; it reads every view, and acts."""

    digits: str
    """The first digits of its number, for the log."""
    expires_at: datetime


class ConsoleAccess:
    """Decides about the rights of a request to read and to act.

    A session is a cookie that holds its end, a random number and a signature. The server keeps
    nothing, so the session is good at both ports, at every instance and after a restart; another
    token ends it.
    """

    def __init__(self, policy: AccessPolicy, *, clock: Clock) -> None:
        self._policy = policy
        self._clock = clock
        # Without a token there is no session, and the key is never used.
        token = policy.token or secrets.token_bytes(32)
        self._key = hmac.digest(token, b"viralfx console session", "sha256")
        # Cookies ignore ports, so two services on one host share them; the name tells them apart.
        self.name = b"viralfx_" + hashlib.sha256(self._key).hexdigest()[:6].encode()
        """The name of the cookie."""

    @property
    def has_token(self) -> bool:
        """True if there is a token to log in with."""
        return self._policy.token is not None

    def session(self, headers: Headers) -> Session | None:
        """Return the session of a request; None without a valid cookie."""
        cookies = [value for name, value in headers if name == b"cookie"]
        if not cookies or not self.has_token or sum(map(len, cookies)) > _MAX_COOKIE_BYTES:
            return None
        now = self._clock.now().timestamp()
        for pair in (one for value in cookies for one in value.split(b";")):
            name, _, value = pair.strip().partition(b"=")
            if name == self.name and (found := self._session(value, now)) is not None:
                return found
        return None

    def _session(self, value: bytes, now: float) -> Session | None:
        content, _, mac = value.rpartition(b".")
        if not hmac.compare_digest(mac, self._mac(content)):
            return None
        end, _, number = content.partition(b".")
        if not now < int(end) <= now + SESSION_SECONDS + 60:
            return None
        return Session(
            digits=number[:_SESSION_DIGITS].decode(),
            expires_at=datetime.fromtimestamp(int(end), UTC),
        )

    def _mac(self, content: bytes) -> bytes:
        return hmac.new(self._key, content, "sha256").hexdigest()[: 2 * _MAC_BYTES].encode()

    def reads(self, headers: Headers, session: Session | None) -> Reads:
        """Return the views that a request may read."""
        if session is not None:
            return Reads.ALL
        allowed = self._policy.to_details(headers) is AccessVerdict.ALLOWED
        return Reads.STATUS if allowed else Reads.NONE

    # -- log-in ------------------------------------------------------------------------------

    def log_in(self, token: str, *, secure: bool) -> tuple[bytes, bytes] | None:
        """Return the header of a new session; None for a wrong token.

        The number of the session is new, and replaces a cookie that the client has.
        """
        expected = self._policy.token
        given = token.strip().encode("utf-8", "surrogatepass")
        if expected is None or not hmac.compare_digest(given, expected):
            return None
        ends = int(self._clock.now().timestamp()) + SESSION_SECONDS
        return self._cookie(self.make(ends), SESSION_SECONDS, secure=secure)

    def log_out(self, *, secure: bool) -> tuple[bytes, bytes]:
        """Return the header that removes the cookie."""
        return self._cookie(b"", 0, secure=secure)

    def make(self, ends: int) -> bytes:
        """Return the cookie of a new session that ends at a Unix time in seconds."""
        content = b"%d.%s" % (ends, secrets.token_hex(12).encode())
        return content + b"." + self._mac(content)

    def _cookie(self, value: bytes, seconds: int, *, secure: bool) -> tuple[bytes, bytes]:
        # For every path: behind a proxy or below a mount the browser may see another one.
        cookie = b"%b=%b; Path=/; Max-Age=%d; HttpOnly; SameSite=Strict%b" % (
            self.name,
            value,
            seconds,
            b"; Secure" if secure else b"",
        )
        return b"set-cookie", cookie


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
