"""Request authorization: bearer tokens, and the origin of browsers.

Tokens are compared in constant time. ``Origin`` is judged by RFC 6454 and RFC 9110.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import TypeAlias
from urllib.parse import urlsplit

from viralfx.domain.access import Principal, Right
from viralfx.settings import Exposure, Settings, prefixed
from viralfx.settings.live_tokens import LiveTokens
from viralfx.settings.tokens import RESERVED, TokenBook

_logger = logging.getLogger("viralfx.access")

Headers = Iterable[tuple[bytes, bytes]]
"""Request headers as ASGI gives them: names in lower case."""
Authorize: TypeAlias = Callable[[Mapping[str, str]], Principal | None]
"""Names the caller of a request, and its rights, from the headers."""


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
    details: Exposure
    """The callers that need no token for details and metrics."""
    application: "ApplicationCallers | None" = None
    """Names callers without a token; None: the application names none."""

    @classmethod
    def from_settings(
        cls, settings: Settings, authorize: Authorize | None = None
    ) -> "AccessPolicy":
        """Return the policy that the tokens and HEALTH_DETAILS define for the API port."""
        return cls(
            tokens=LiveTokens(settings),
            details=settings.details_exposure(on_management_port=False),
            application=None if authorize is None else ApplicationCallers(authorize),
        )

    def at_management_port(self, settings: Settings) -> "AccessPolicy":
        """Return the policy of the management port, with the same tokens."""
        return replace(self, details=settings.details_exposure(on_management_port=True))

    def on_this_machine(self) -> "AccessPolicy":
        """Return the policy for callers on this machine, with the same tokens."""
        opened = self.details is Exposure.MACHINE
        return replace(self, details=Exposure.OPEN) if opened else self

    @property
    def details_need_token(self) -> bool:
        """True if details and metrics need a token.

        The policy for callers on this machine is another one: :meth:`on_this_machine`.
        """
        return self.details is not Exposure.OPEN

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
    def has_callers(self) -> bool:
        """True if some caller can have a right at these endpoints."""
        return self.application is not None or self.has_tokens

    @property
    def has_tokens(self) -> bool:
        """True if some token has a right at these endpoints."""
        return any(token.principal.may(Right.READ) for token in self.tokens.book.tokens)

    def caller(self, headers: Headers) -> Principal | None:
        """Return the holder of the token of a request, else the caller that the application names.

        None is an anonymous caller.
        """
        headers = list(headers)
        return holder_of(headers, self.tokens.book) or self.named(headers)

    def named(self, headers: Headers) -> Principal | None:
        """Return the caller that the application names; the token of the request has no effect.

        A page of another origin has none: a browser adds the cookies of a gateway to its requests,
        and the gateway adds the name.
        """
        if self.application is None:
            return None
        headers = list(headers)
        return None if is_cross_origin(headers) else self.application.find(headers)

    def _require(self, headers: Headers, right: Right) -> AccessVerdict:
        if not self.has_callers:
            return AccessVerdict.FORBIDDEN
        caller = self.caller(headers)
        if caller is None:
            return AccessVerdict.UNAUTHORIZED
        return AccessVerdict.ALLOWED if caller.may(right) else _LACKS[right]


_ELSEWHERE = (
    "Caller beyond this machine refused: ENVIRONMENT={} opens details, metrics and jobs to this"
    " machine alone. Others need MANAGEMENT_TOKEN, for jobs API_TOKEN; HEALTH_DETAILS=always opens"
    " details and metrics to all, ALLOW_OPEN_API=true jobs as well"
)


class AddressWarning:
    """Warns once that a caller needs a token only because it is not on this machine."""

    def __init__(self, environment: str, env_prefix: str = "") -> None:
        """``env_prefix`` is that of the variables, of which ENVIRONMENT has ``environment``."""
        self._text = prefixed(_ELSEWHERE.format(environment), env_prefix)
        self.is_due = True
        """False once the warning is logged."""

    def log(self, client: str | None, path: str) -> None:
        """Log the warning, with the address of the caller, unless it has been logged."""
        if self.is_due:
            self.is_due = False
            _logger.warning(self._text, extra={"client": client, "path": path})


_MAX_NAME_CHARACTERS = 128
_LOG_SECONDS = 60.0


class ApplicationCallers:
    """The callers that a function of the application names. Its failures are logged."""

    def __init__(
        self, authorize: Authorize, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._authorize = authorize
        self._monotonic = monotonic
        self._next_line = monotonic()

    def find(self, headers: Headers) -> Principal | None:
        """Return the caller of a request; None if the function names none, or fails.

        A reserved name, and one that cannot be shown, are failures. A name that TOKENS has, too,
        is the same caller for the audit trail and for idempotency keys.
        """
        given: dict[str, str] = {}
        for name, value in headers:
            key, text = name.decode("latin-1"), value.decode("latin-1")
            # As one value, so that a header that the client adds cannot take the proxy's place.
            given[key] = f"{given[key]}, {text}" if key in given else text
        try:
            found: object = self._authorize(given)
            return None if found is None else _checked(found)
        except Exception:
            if (now := self._monotonic()) >= self._next_line:
                self._next_line = now + _LOG_SECONDS
                _logger.exception("OperationsConfig.authorize has failed; the caller is anonymous")
            return None


def _checked(found: object) -> Principal:
    if not isinstance(found, Principal):
        raise TypeError(f"authorize returns a Principal or None, not {type(found).__name__}")
    name = found.name
    if not (name.strip() == name and name.isprintable() and 0 < len(name) <= _MAX_NAME_CHARACTERS):
        raise ValueError(
            f"the name of a caller has 1 to {_MAX_NAME_CHARACTERS} printable characters"
        )
    if name.lower() in RESERVED:
        raise ValueError(f"the name {name.lower()} of a caller is reserved")
    return found


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
