"""Access to the console: tokens, sessions in a signed cookie, and the proof of origin.

A session is a cookie that holds its end, a random number and a signature. The server keeps nothing,
so the session is good at both ports, at every instance and after a restart; another token ends it.
"""

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from viralfx.domain.clock import Clock
from viralfx.web.auth import AccessPolicy, AccessVerdict, Headers, is_cross_origin

SESSION_SECONDS = 8 * 3600
_MAC_BYTES = 32
_MAX_COOKIE_BYTES = 8192
_SESSION_DIGITS = 6
"""Digits of a session's number that the log shows."""


class Role(StrEnum):
    """The rights of a caller."""

    READER = "reader"
    OPERATOR = "operator"


class Reads(StrEnum):
    """The views that a caller may read."""

    NONE = "none"
    STATUS = "status"
    """Status, stop, fleet, changes, circuits, queues and loggers: as HEALTH_DETAILS allows."""
    ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """A request with a valid token or session."""

    role: Role
    actor: str
    """For the log."""
    expires_at: datetime | None = None
    """The end of the session; None for a bearer token."""
    by_cookie: bool = False


class _Signer:
    """Makes and checks the cookies of one role; its key comes from the token of the role."""

    def __init__(self, role: Role, token: bytes) -> None:
        self.role = role
        self.token = token
        # Of each role's own token, or a reader could guess the token of operators by the cookie.
        self._key = hmac.digest(token, b"viralfx console session " + role.encode(), "sha256")
        # Cookies ignore ports, so two services on one host share them; the name tells them apart.
        self.name = b"viralfx_" + hashlib.sha256(self._key).hexdigest()[:6].encode()

    def make(self, ends: int) -> bytes:
        content = b"%d.%s" % (ends, secrets.token_hex(12).encode())
        return content + b"." + self._mac(content)

    def caller(self, value: bytes, now: float) -> Caller | None:
        content, _, mac = value.rpartition(b".")
        if not hmac.compare_digest(mac, self._mac(content)):
            return None
        end, _, number = content.partition(b".")
        if not now < int(end) <= now + SESSION_SECONDS + 60:
            return None
        return Caller(
            role=self.role,
            actor=f"session {number[:_SESSION_DIGITS].decode()}",
            expires_at=datetime.fromtimestamp(int(end), UTC),
            by_cookie=True,
        )

    def _mac(self, content: bytes) -> bytes:
        return hmac.new(self._key, content, "sha256").hexdigest()[: 2 * _MAC_BYTES].encode()


class ConsoleAccess:
    """Decides about the rights of a request to read and to act."""

    def __init__(
        self,
        policy: AccessPolicy,
        *,
        console_token: bytes | None,
        open_to_all: bool,
        path: str,
        clock: Clock,
    ) -> None:
        """``open_to_all``: every view may be read without a token, as in development."""
        self._policy = policy
        self._clock = clock
        self._path = path.encode()
        self._open = open_to_all
        self._signers = [
            _Signer(role, token)
            for role, token in (
                (Role.OPERATOR, policy.token),
                (Role.READER, console_token),
            )
            if token
        ]

    @property
    def has_tokens(self) -> bool:
        """True if there is a token to log in with."""
        return bool(self._signers)

    @property
    def may_operate(self) -> bool:
        """True if there is a token that allows actions."""
        return self._policy.token is not None

    def caller(self, headers: Headers) -> Caller | None:
        """Return the caller of a request with a valid token or session.

        A bearer token that is wrong is not replaced by a cookie.
        """
        cookies: list[bytes] = []
        for name, value in headers:
            if name == b"authorization":
                scheme, _, token = value.partition(b" ")
                role = self._role_of(token.strip()) if scheme.lower() == b"bearer" else None
                return None if role is None else Caller(role=role, actor="token")
            if name == b"cookie":
                cookies.append(value)
        return self._by_cookie(cookies) if cookies and self._signers else None

    def _by_cookie(self, headers: Sequence[bytes]) -> Caller | None:
        if sum(map(len, headers)) > _MAX_COOKIE_BYTES:
            return None
        pairs = [one.strip().partition(b"=") for value in headers for one in value.split(b";")]
        now = self._clock.now().timestamp()
        for signer in self._signers:
            for name, _, value in pairs:
                if name == signer.name and (found := signer.caller(value, now)) is not None:
                    return found
        return None

    def _role_of(self, token: bytes) -> Role | None:
        found = None
        for signer in self._signers:  # all of them, so that the time does not tell which one it is
            if hmac.compare_digest(token, signer.token):
                found = found or signer.role
        return found

    def reads(self, headers: Headers, caller: Caller | None) -> Reads:
        """Return the views that a request may read."""
        if caller is not None or self._open:
            return Reads.ALL
        allowed = self._policy.to_details(headers) is AccessVerdict.ALLOWED
        return Reads.STATUS if allowed else Reads.NONE

    # -- log-in ------------------------------------------------------------------------------

    def log_in(self, token: str, *, secure: bool) -> Sequence[tuple[bytes, bytes]] | None:
        """Return the headers of a new session; None for a wrong token.

        The number of the session is new, and no earlier cookie of the browser stays.
        """
        role = self._role_of(token.strip().encode("utf-8", "surrogatepass"))
        if role is None:
            return None
        ends = int(self._clock.now().timestamp()) + SESSION_SECONDS
        return [
            self._cookie(signer, signer.make(ends), SESSION_SECONDS, secure=secure)
            if signer.role is role
            else self._cookie(signer, b"", 0, secure=secure)
            for signer in self._signers
        ]

    def log_out(self, *, secure: bool) -> Sequence[tuple[bytes, bytes]]:
        """Return the headers that remove the cookies."""
        return [self._cookie(signer, b"", 0, secure=secure) for signer in self._signers]

    def _cookie(
        self, signer: _Signer, value: bytes, seconds: int, *, secure: bool
    ) -> tuple[bytes, bytes]:
        cookie = b"%b=%b; Path=%b; Max-Age=%d; HttpOnly; SameSite=Strict%b" % (
            signer.name,
            value,
            self._path,
            seconds,
            b"; Secure" if secure else b"",
        )
        return b"set-cookie", cookie


def is_own_request(headers: Headers) -> bool:
    """Return True if a browser proves that a page of this origin makes the request.

    That takes an ``Origin`` equal to ``Host``, JSON, which a form cannot send, and where the
    browser sends it, ``Sec-Fetch-Site: same-origin``.
    """
    origins = kinds = 0
    for name, value in headers:
        if name == b"origin":
            origins += 1
        elif name == b"sec-fetch-site" and value != b"same-origin":
            return False
        elif name == b"content-type":
            kinds += value.split(b";")[0].strip().lower() == b"application/json"
    return origins == 1 and kinds == 1 and not is_cross_origin(headers)


def is_secure(headers: Headers) -> bool:
    """Return True if the browser uses https, also where a proxy ends TLS: its ``Origin`` says."""
    return any(name == b"origin" and value.startswith(b"https://") for name, value in headers)
