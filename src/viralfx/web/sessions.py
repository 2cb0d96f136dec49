"""Sessions of the console: signed cookies, whose key is stretched from the token.

A holder of a cookie can test guesses of the token offline, so each guess has to be expensive. A
client without a session gets no byte that depends on a token.
"""

import asyncio
import copy
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache, partial

from viralfx.core.clock import Clock
from viralfx.core.threads import in_thread
from viralfx.domain.access import ANONYMOUS, Principal, Right
from viralfx.settings.strength import weakness
from viralfx.settings.tokens import MANAGEMENT, Token
from viralfx.web.auth import AccessPolicy, AccessVerdict, Headers

SESSION_SECONDS = 8 * 3600
_MAX_COOKIE_BYTES = 8192
_SKEW_SECONDS = 60
"""A session of an instance whose clock is ahead may end this much later than one of this one."""
_MAX_ENDED = 1000
"""Ended sessions of one name that are remembered singly."""
_END = re.compile(rb"[0-9]{1,12}").fullmatch
_NUMBER = re.compile(rb"[0-9A-Za-z_-]{1,64}").fullmatch
_SESSION_DIGITS = 6
"""Digits of a session's number that the log shows."""
_NAME = b"viralfx_session"
_HOST_PREFIX = b"__Host-"
"""A browser takes such a cookie over https alone, for every path, and for no other host."""
_FORM = b"2"
_PARTS = 4


class Reads(StrEnum):
    """The views that a caller may read."""

    NONE = "none"
    STATUS = "status"
    """Status, stop and circuits, as HEALTH_DETAILS allows."""
    ALL = "all"
    """Every view but the settings, with the right ``read``."""
    SETTINGS = "settings"
    """The settings, too, with the right ``admin``."""

    def includes(self, other: "Reads") -> bool:
        """Return True if a caller that may read these views may read those, too."""
        order = list(Reads)
        return order.index(self) >= order.index(other)


class ServingPort(StrEnum):
    """The ports that serve the console. A session of one is none at the other."""

    API = "api"
    MANAGEMENT = "management"


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """The valid session of a request."""

    name: str
    """The name of its token."""
    port: ServingPort
    number: str
    expires_at: datetime
    cookie: bytes = field(repr=False)
    """Its cookie, to look at again whether it is valid."""

    @property
    def actor(self) -> str:
        """Its name in the audit trail: the first digits of its number, and the name of its token.

        The token of MANAGEMENT_TOKEN, which has no holder, is left out.
        """
        place = f"console {self.number[:_SESSION_DIGITS]}"
        return place if self.name == MANAGEMENT.name else f"{self.name}, {place}"


@dataclass(frozen=True, slots=True)
class Viewer:
    """The sender of a request to the console."""

    principal: Principal
    """The holder of the token of its session, or the caller that the application names."""
    session: Session | None
    reads: Reads
    unknown: bool = False
    """True: HEALTH_DETAILS asks for a token, and the request has none or a wrong one."""

    @property
    def actor(self) -> str:
        """Its name in the audit trail."""
        return self.principal.name if self.session is None else self.session.actor


# -- keys ----------------------------------------------------------------------------------------

# As strong as OWASP's n=2**17 with p=1, in an eighth of its memory: 16 MiB for about 0.25 s.
_SCRYPT_COST = 2**14
_SCRYPT_BLOCK = 8
_SCRYPT_PARALLEL = 5
_MAX_KEYS = 256


def stretch(secret: bytes) -> bytes:
    """Return the key of a token. Takes about 0.25 s, during which other threads run."""
    return hashlib.scrypt(
        secret,
        salt=b"viralfx console session",
        n=_SCRYPT_COST,
        r=_SCRYPT_BLOCK,
        p=_SCRYPT_PARALLEL,
        maxmem=2 * 128 * _SCRYPT_COST * _SCRYPT_BLOCK,
        dklen=32,
    )


class SessionKeys:
    """The stretched keys of the tokens, each made once in a process, in a thread."""

    def __init__(self) -> None:
        self._keys: dict[bytes, bytes] = {}
        self._making: tuple[asyncio.AbstractEventLoop, asyncio.Task[None]] | None = None

    def get(self, secret: bytes, port: ServingPort) -> bytes | None:
        """Return the key of a token for the sessions of a port; None if it was not made yet."""
        key = self._keys.get(_digest(secret))
        return None if key is None else hmac.digest(key, f"sessions of {port}".encode(), "sha256")

    def has(self, wanted: Token) -> bool:
        """Return True if the keys of a token were made."""
        return all(_digest(secret) in self._keys for secret in wanted.secrets)

    async def make(self, wanted: Token) -> None:
        """Make the keys of a token. Callers at the same time share the work."""
        loop = asyncio.get_running_loop()
        while not self.has(wanted):
            if self._making is None or self._making[0] is not loop or self._making[1].done():
                self._making = (loop, asyncio.create_task(self._make(wanted), name="session keys"))
            await asyncio.shield(self._making[1])

    async def _make(self, wanted: Token) -> None:
        for secret in wanted.secrets:
            if _digest(secret) not in self._keys:
                key = await in_thread(partial(stretch, secret), "session keys")
                if len(self._keys) >= _MAX_KEYS:
                    self._keys.pop(next(iter(self._keys)))
                self._keys[_digest(secret)] = key


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


KEYS = SessionKeys()
"""The keys of this process."""


# -- ended sessions ------------------------------------------------------------------------------


class EndedSessions:
    """The sessions that were logged out at this process; each stays ended until it expires.

    Each name has a bound of its own: the holder of a token can sign any number of sessions of its
    name, and none of another. At the bound all sessions of the name end that expire no later than
    the last of them, so that none becomes valid again.
    """

    def __init__(self) -> None:
        self._expiry: dict[str, dict[str, int]] = {}
        """The Unix time in seconds at which each expires, by name and number."""
        self._until: dict[str, int] = {}
        """Sessions of a name that expire no later than this have ended."""

    def add(self, session: Session, now: datetime) -> None:
        """End a session whose signature was verified."""
        expiry = int(session.expires_at.timestamp())
        alive = {
            number: ends
            for number, ends in self._expiry.get(session.name, {}).items()
            if ends > now.timestamp()
        }
        alive[session.number] = expiry
        if len(alive) > _MAX_ENDED:
            self._until[session.name] = max(self.until(session.name), *alive.values())
            alive = {}
        self._expiry[session.name] = alive

    def until(self, name: str) -> int:
        """Return a Unix time in seconds: sessions of a name that expire no later have ended."""
        return self._until.get(name, 0)

    def __contains__(self, session: Session) -> bool:
        """Return True if a session has ended."""
        if session.expires_at.timestamp() <= self.until(session.name):
            return True
        return session.number in self._expiry.get(session.name, ())


# -- access --------------------------------------------------------------------------------------


class ConsoleAccess:
    """Decides about the rights of a request to read and to act, at one port.

    A session is a cookie that holds its end, a random number, the name of its token and a
    signature. It is good at every instance and after a restart. A removed token ends it, and so
    does a log-out, at the process that gets it (:class:`EndedSessions`). The name of the cookie has
    the port of ``Host``, since cookies ignore ports, and two services on one host share them.
    """

    def __init__(
        self,
        policy: AccessPolicy,
        *,
        clock: Clock,
        port: ServingPort = ServingPort.API,
        keys: SessionKeys = KEYS,
    ) -> None:
        self._policy = policy
        self._clock = clock
        self._port = port
        self._keys = keys
        self._ended = EndedSessions()

    def at(self, port: ServingPort, policy: AccessPolicy | None = None) -> "ConsoleAccess":
        """Return the access at another port of this process; both know each log-out.

        ``policy`` is that of the port, with the same tokens; None: the present one.
        """
        other = copy.copy(self)
        other._port = port  # noqa: SLF001 - of its own class
        other._policy = policy or self._policy  # noqa: SLF001 - of its own class
        return other

    @property
    def has_token(self) -> bool:
        """True if there is a token to log in with."""
        return self._policy.has_tokens

    def is_ready(self, headers: Headers) -> bool:
        """Return False if :meth:`session` needs a key that :meth:`prepare` has to make."""
        return all(
            token is None or self._keys.has(token)
            for token in (self._token_of(value) for value in self._values(headers))
        )

    async def prepare(self, headers: Headers) -> None:
        """Make the keys that :meth:`session` needs for a request."""
        for value in self._values(headers):
            if (token := self._token_of(value)) is not None:
                await self._keys.make(token)

    def session(self, headers: Headers) -> Session | None:
        """Return the session of a request; None without a valid cookie."""
        for value in self._values(headers):
            if (found := self._session(value)) is not None:
                return found
        return None

    def is_valid(self, session: Session) -> bool:
        """Return True if a session has neither ended nor lost its token or the right to read."""
        valid = self.at(session.port)._session(session.cookie) is not None  # noqa: SLF001 - own class
        return valid and self._holder(session).may(Right.READ)

    def viewer(self, headers: Headers, *, with_token: bool = True) -> Viewer:
        """Return the sender of a request, which may be anonymous.

        ``with_token``: a bearer token counts as HEALTH_DETAILS says. A response that does not slow
        down guesses must not depend on one.
        """
        headers = list(headers)
        session = self.session(headers)
        if session is not None:
            principal = self._holder(session)
        else:
            principal = self._policy.named(headers) or ANONYMOUS
        if principal.may(Right.ADMIN):
            return Viewer(principal, session, Reads.SETTINGS)
        if principal.may(Right.READ):
            return Viewer(principal, session, Reads.ALL)
        if not with_token:
            allowed = not self._policy.details_need_token
            return Viewer(principal, session, Reads.STATUS if allowed else Reads.NONE)
        verdict = self._policy.to_details(headers)
        reads = Reads.STATUS if verdict is AccessVerdict.ALLOWED else Reads.NONE
        return Viewer(principal, session, reads, verdict is AccessVerdict.UNAUTHORIZED)

    def _holder(self, session: Session) -> Principal:
        token = self._policy.tokens.find(session.name)
        return ANONYMOUS if token is None else token.principal

    def _values(self, headers: Headers) -> list[bytes]:
        """Return the values of the cookies that may be a session."""
        headers = list(headers)
        cookies = [value for name, value in headers if name == b"cookie"]
        if not cookies or not self.has_token or sum(map(len, cookies)) > _MAX_COOKIE_BYTES:
            return []
        own = cookie_name(headers)
        names = {own, _HOST_PREFIX + own, *self._former_names()}
        pairs = (pair.strip().partition(b"=") for each in cookies for pair in each.split(b";"))
        return [value for name, _, value in pairs if name in names]

    def _token_of(self, value: bytes) -> Token | None:
        """Return the token that a cookie names; None for a former cookie, or an invalid one."""
        content, _, _ = value.rpartition(b".")
        parts = content.split(b".", _PARTS - 1)
        if len(parts) != _PARTS or parts[0] != _FORM:
            return None
        return self._policy.tokens.find(parts[3].decode("latin-1"))

    def _session(self, value: bytes) -> Session | None:
        content, _, mac = value.rpartition(b".")
        if (token := self._token_of(value)) is None:
            return self._former_session(value)
        for secret in token.secrets:
            key = self._keys.get(secret, self._port)
            if key is not None and hmac.compare_digest(mac, _mac(key, content)):
                _, end, number, name = content.split(b".", _PARTS - 1)
                return self._unless_ended(end, number, name.decode("latin-1"), value)
        return None

    def _unless_ended(self, end: bytes, number: bytes, name: str, value: bytes) -> Session | None:
        """Return a session whose signature is right, unless it has ended."""
        # The holder of a token can sign any bytes.
        if not (_END(end) and _NUMBER(number)):
            return None
        now = self._clock.now().timestamp()
        if not now < int(end) <= now + SESSION_SECONDS + _SKEW_SECONDS:
            return None
        session = Session(
            name=name,
            port=self._port,
            number=number.decode("ascii"),
            expires_at=datetime.fromtimestamp(int(end), UTC),
            cookie=value,
        )
        return None if session in self._ended else session

    # -- cookies of version 0.2 --------------------------------------------------------------

    # They are valid for one release, so that a roll-out ends no session. Their key is a plain HMAC
    # of the token, so only one that cannot be guessed has them. This class makes none.

    def _former_keys(self) -> list[bytes]:
        token = self._policy.tokens.find(MANAGEMENT.name)
        found = map(_former_key, () if token is None else token.secrets)
        return [key for key in found if key is not None]

    def _former_names(self) -> list[bytes]:
        return [
            b"viralfx_" + hashlib.sha256(key).hexdigest()[:6].encode()
            for key in self._former_keys()
        ]

    def _former_session(self, value: bytes) -> Session | None:
        content, _, mac = value.rpartition(b".")
        for key in self._former_keys():
            if hmac.compare_digest(mac, _mac(key, content)):
                end, _, number = content.partition(b".")
                return self._unless_ended(end, number, MANAGEMENT.name, value)
        return None

    # -- log-in and log-out ------------------------------------------------------------------

    def identify(self, token: str) -> Token | None:
        """Return the holder of a value, with this value alone; None for a wrong one."""
        given = token.strip().encode("utf-8", "surrogatepass")
        holder = self._policy.tokens.identify(given)
        return None if holder is None else Token(holder, (given,))

    async def log_in(self, token: Token, headers: Headers, *, secure: bool) -> tuple[bytes, bytes]:
        """Return the header of a new session, for the result of :meth:`identify`.

        The number of the session is new, and replaces a cookie that the client has.
        """
        await self._keys.make(token)
        ends = int(self._clock.now().timestamp()) + SESSION_SECONDS
        ends = max(ends, self._ended.until(token.principal.name) + 1)
        name = (_HOST_PREFIX if secure else b"") + cookie_name(headers)
        return _set_cookie(name, self.make(token, ends), SESSION_SECONDS, secure=secure)

    def make(self, token: Token, ends: int) -> bytes:
        """Return the cookie of a new session that ends at a Unix time in seconds.

        The keys of the token must have been made.
        """
        number, name = secrets.token_hex(12), token.principal.name
        content = b"%b.%d.%b.%b" % (_FORM, ends, number.encode(), name.encode())
        key = self._keys.get(token.secrets[0], self._port)
        assert key is not None  # noqa: S101 - log_in() has made it
        return content + b"." + _mac(key, content)

    def log_out(self, headers: Headers, *, secure: bool) -> list[tuple[bytes, bytes]]:
        """End the session of a request, and return the headers that remove its cookies."""
        headers = list(headers)
        names = [cookie_name(headers)]
        if (session := self.session(headers)) is not None:
            self._ended.add(session, self._clock.now())
            if not session.cookie.startswith(_FORM + b"."):
                names += self._former_names()
        removed = [_set_cookie(name, b"", 0, secure=secure) for name in names]
        if secure:
            removed.append(_set_cookie(_HOST_PREFIX + names[0], b"", 0, secure=True))
        return removed


def cookie_name(headers: Headers) -> bytes:
    """Return the name of the cookie for the port that the browser uses: nothing else is in it."""
    host = next((value for name, value in headers if name == b"host"), b"")
    _, _, port = host.rpartition(b":")
    return _NAME + (b"_" + port if port.isdigit() and len(port) <= len("65535") else b"")


@lru_cache(maxsize=16)
def _former_key(secret: bytes) -> bytes | None:
    if weakness(secret.decode("utf-8", "replace")) is not None:
        return None
    return hmac.digest(secret, b"viralfx console session", "sha256")


def _mac(key: bytes, content: bytes) -> bytes:
    return hmac.new(key, content, "sha256").hexdigest().encode()


def _set_cookie(name: bytes, value: bytes, seconds: int, *, secure: bool) -> tuple[bytes, bytes]:
    # For every path: behind a proxy or below a mount the browser may see another one.
    cookie = b"%b=%b; Path=/; Max-Age=%d; HttpOnly; SameSite=Strict%b" % (
        name,
        value,
        seconds,
        b"; Secure" if secure else b"",
    )
    return b"set-cookie", cookie
