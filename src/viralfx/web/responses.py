"""The responses that are made without Litestar.

Every error response is a problem (RFC 9457). The headers that let pages of other origins read the
responses (CORS) are here, too.
"""

import asyncio
import logging
import math
import re
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from functools import partial
from typing import Any, TypeAlias

import msgspec

from viralfx.core.clock import Clock
from viralfx.core.correlation import (
    current_correlation_id,
)
from viralfx.core.errors import ConfigurationError
from viralfx.domain.audit import Action
from viralfx.server.interface import RawResponse, Receive, Scope, Send
from viralfx.server.problems import PROBLEM_MEDIA_TYPE, problem
from viralfx.web.auth import AccessVerdict, Headers
from viralfx.web.throttle import GuessBrake

# An application may put any value into details; values that JSON lacks become text.
_encode = msgspec.json.Encoder(enc_hook=str).encode


def encode(value: object) -> bytes:
    """Return JSON; half a surrogate pair, as in the name of a file, becomes an escape."""
    try:
        return _encode(value)
    except UnicodeEncodeError:
        return _encode(
            _encodable(msgspec.to_builtins(value, builtin_types=(msgspec.Raw,), enc_hook=str))
        )


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_encodable(key): _encodable(each) for key, each in value.items()}
    return [_encodable(each) for each in value] if isinstance(value, list | tuple) else value


_JSON = b"application/json"
_PROBLEM = PROBLEM_MEDIA_TYPE.encode()
CLOSE = (b"connection", b"close")
"""Makes client and server close the connection, so the rest of a body is not read."""


def raw_response(
    media_type: bytes, status: int, body: bytes, *more: tuple[bytes, bytes]
) -> RawResponse:
    """Return a response with a body of any type that no cache stores; ``more`` are headers."""
    head = b"content-type: %b\r\ncontent-length: %d\r\ncache-control: no-store\r\n"
    head %= media_type, len(body)
    for header in more:
        head += b"%b: %b\r\n" % header
    return RawResponse(status, head, body)


class ResponseFromBody(msgspec.Struct, frozen=True):
    """A response that depends on the body of the request, which the caller has to read."""

    max_bytes: int
    """Maximum size of the body."""
    respond: "Callable[[bytes, Scope], RawResponse | Recorded | Awaitable[RawResponse]]"
    """Returns it, from the body and the scope of the request."""


class EventStream(msgspec.Struct, frozen=True):
    """A response that goes on; no part of the stop waits for its end."""

    serve: Callable[[Scope, Receive, Send, tuple[bytes, bytes]], Awaitable[None]]
    """Sends it. The last argument is the header with the correlation id."""


class Recorded(msgspec.Struct, frozen=True):
    """A response whose request is recorded.

    The sender must call :attr:`log`, and await :attr:`hold`.
    """

    response: RawResponse
    log: Callable[[Scope, int], None]
    """Records it. Arguments: the scope of the request, the status of the response."""
    hold: Callable[[Scope], Awaitable[bool]] | None = None
    """Waits, if the request was a guess; returns False if the connection should end."""


class Denied(Recorded, frozen=True):
    """A 401 or 403 response, whose :attr:`log` logs the denial."""


AnyResponse: TypeAlias = (
    RawResponse | Awaitable[RawResponse] | ResponseFromBody | Recorded | EventStream
)


class Deferred(msgspec.Struct, frozen=True):
    """A response whose kind is known later; the sender awaits :attr:`respond` first."""

    respond: Callable[[], Awaitable[AnyResponse]]


Endpoint = Callable[[str, bytes, Headers], AnyResponse | Deferred]
"""Responds to a method, a query string and headers."""


def json_response(status: int, body: bytes, *more: tuple[bytes, bytes]) -> RawResponse:
    """Return a JSON response."""
    return raw_response(_JSON, status, body, *more)


def problem_response(status: int, detail: str, *more: tuple[bytes, bytes]) -> RawResponse:
    """Return problem details with the correlation id of the current context."""
    body = encode(problem(status, detail=detail, correlation_id=current_correlation_id()))
    return raw_response(_PROBLEM, status, body, *more)


def retry_after(seconds: float) -> tuple[bytes, bytes]:
    """Return the header ``Retry-After`` in whole seconds, from 1 to 86400."""
    return (b"retry-after", b"%d" % max(1, math.ceil(min(seconds, 86400.0))))


_BODY_TIMEOUT_SECONDS = 5.0


async def complete(
    pending: Awaitable[RawResponse] | ResponseFromBody | Recorded, scope: Scope, receive: Receive
) -> RawResponse:
    """Return the response itself: await it, read the body for it, or record the request."""
    if isinstance(pending, ResponseFromBody):
        response = await _read_body(pending, scope, receive)
        if isinstance(response, RawResponse):
            return response
        pending = response
    if isinstance(pending, Recorded):
        pending.log(scope, pending.response.status)
        if pending.hold is None or await pending.hold(scope):
            return pending.response
        return _extended(pending.response, b"connection: close\r\n")
    return await pending


async def _read_body(
    pending: ResponseFromBody, scope: Scope, receive: Receive
) -> RawResponse | Recorded | Awaitable[RawResponse]:
    """Read the body, and return the response to it.

    The response is 413 for a body that is too long, 408 for one that is too slow, and 400 if the
    client disconnects before the end of the body. In these cases the request has no effect.
    """
    body, more = b"", True
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_SECONDS):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return problem_response(400, "The body ended early.", CLOSE)
                body += message.get("body", b"")
                if len(body) > pending.max_bytes:
                    return problem_response(
                        413, f"The body is limited to {pending.max_bytes} bytes.", CLOSE
                    )
                more = message.get("more_body", False)
    except TimeoutError:
        return problem_response(
            408, f"The body did not arrive within {_BODY_TIMEOUT_SECONDS:g} s.", CLOSE
        )
    return pending.respond(body, scope)


def peer_of(scope: Scope) -> str | None:
    """Return the address of the client of a request; None for a Unix socket."""
    client = scope.get("client")
    return client[0] if client else None


READ = ("GET", "HEAD")
"""The methods that change nothing."""


def not_allowed(allow: str, *more: tuple[bytes, bytes]) -> RawResponse:
    """Return the 405 response of a path; ``allow`` lists its methods."""
    detail = f"This path answers {allow} only."
    return problem_response(405, detail, (b"allow", allow.encode()), *more)


_logger = logging.getLogger("viralfx.management")

_LACKING = {
    AccessVerdict.LACKS_READ: "read",
    AccessVerdict.LACKS_OPERATE: "operate",
    AccessVerdict.LACKS_ADMIN: "admin",
}
_MAX_PATH_CHARACTERS = 200
"""Characters of a path that are logged; clients choose its length."""


def has_credentials(scope: Scope) -> bool:
    """Return True if a request has an ``Authorization`` header; one without is no guess."""
    return any(name == b"authorization" and value for name, value in scope["headers"])


class DenialLog:
    """Makes the responses to unauthorized management requests, and logs them.

    The first denial is logged immediately. After that there is at most one line in ``period``
    seconds, so that guessing tokens does not flood the log. The line describes the latest denial,
    and its field ``others`` counts the suppressed ones.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        period: float = 60.0,
        audit: Callable[[Scope, int, Action, str | None], None] | None = None,
        brake: GuessBrake | None = None,
    ) -> None:
        """``audit`` is called for each refused request, with its status, action and actor.

        Without an actor it is the holder of the token of the request. ``brake`` delays the
        responses to wrong tokens.
        """
        self._clock = clock
        self._audit = audit
        self._brake = brake
        self._period = period
        self._next = clock.monotonic()
        self._unlogged = 0
        self._last: dict[str, object] = {}
        self._timer: asyncio.TimerHandle | None = None

    def of(self, verdict: AccessVerdict) -> Denied | None:
        """Return the response for a verdict; None if the request is allowed."""
        if verdict is AccessVerdict.ALLOWED:
            return None
        if verdict is AccessVerdict.FORBIDDEN:
            response = problem_response(
                403, "MANAGEMENT_TOKEN is not set, so this request is not allowed."
            )
        elif verdict in _LACKING:
            response = problem_response(403, f"This token has not the right {_LACKING[verdict]}.")
        else:
            challenge = (b"www-authenticate", b"Bearer")
            detail = "Send the management token as a bearer token."
            response = problem_response(401, detail, challenge)
            return Denied(response, partial(self._record, Action.ACCESS, None), self._hold_token)
        return self.refuse(response)

    def refuse(
        self,
        response: RawResponse,
        action: Action = Action.ACCESS,
        *,
        actor: str | None = None,
        wrong_token: bool = False,
        unknown: bool = False,
    ) -> Denied:
        """Return a response that refuses a request, to be logged as such.

        ``actor``: its sender in the audit trail; None: the holder of its token. ``wrong_token``:
        the request was a log-in with one, so the response waits. ``unknown``: its sender is, so the
        response waits if the request has an ``Authorization`` header.
        """
        hold = self._hold_log_in if wrong_token else self._hold_token if unknown else None
        return Denied(response, partial(self._record, action, actor), hold)

    async def _hold_token(self, scope: Scope) -> bool:
        return not has_credentials(scope) or await self._hold(scope, "operations")

    async def _hold_log_in(self, scope: Scope) -> bool:
        return await self._hold(scope, "console")

    async def _hold(self, scope: Scope, place: str) -> bool:
        return self._brake is None or await self._brake.hold(peer_of(scope), place)

    def _record(self, action: Action, actor: str | None, scope: Scope, status: int) -> None:
        if self._audit is not None:
            self._audit(scope, status, action, actor)
        self._unlogged += 1
        self._last = {
            "method": scope["method"],
            "path": scope["path"][:_MAX_PATH_CHARACTERS],
            "client": peer_of(scope),
            "status": status,
        }
        wait = self._next - self._clock.monotonic()
        if wait <= 0:
            self._log()
        elif self._timer is None:
            # In an empty context: the line covers several requests, so it has no correlation id.
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(wait, self._log, context=Context())

    def _log(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._next = self._clock.monotonic() + self._period
        others, self._unlogged = self._unlogged - 1, 0
        _logger.warning("Management access refused", extra={**self._last, "others": others})


# -- reads of pages of other origins --------------------------------------------------------------

_ORIGIN = re.compile(r"https?://[a-z0-9.-]+(?::\d{1,5})?|https?://\[[0-9a-f:.]+\](?::\d{1,5})?")
_EXPOSED = b"x-correlation-id, retry-after"
_PREFLIGHT = (
    b"access-control-allow-methods: GET, HEAD\r\n"
    b"access-control-allow-headers: authorization, x-correlation-id\r\n"
    b"access-control-max-age: 600\r\ncontent-length: 0\r\n"
)


class CorsPolicy:
    """Lets pages of other origins read, and never change; cookies are not sent.

    A preflight request for a changing method gets no permission, so a browser does not send it.
    """

    def __init__(self, origins: Sequence[str]) -> None:
        """``origins`` are as browsers send them, such as ``https://status.example``; ``*``: all.

        Raises :class:`ConfigurationError` for another form, such as one with a path.
        """
        wrong = [each for each in origins if each != "*" and not _is_origin(each)]
        if isinstance(origins, str) or wrong:
            given = origins if isinstance(origins, str) else wrong[0]
            form = (
                "a list of origins in small letters, such as ['https://status.example'], or ['*']"
            )
            raise ConfigurationError([f"OperationsConfig.cors_origins is {form}: {given!r}"])
        self._origins = {each.encode() for each in origins}
        self._all = b"*" in self._origins

    def apply(self, endpoint: Endpoint) -> Endpoint:
        """Return ``endpoint`` with the headers that let a browser read its responses."""

        def allowed(method: str, query: bytes, headers: Headers) -> AnyResponse | Deferred:
            given = list(headers)
            permission = self._permission(given)
            if method == "OPTIONS" and b"allow-origin" in permission and _asks_to_read(given):
                return RawResponse(204, permission + _PREFLIGHT, b"")
            response = endpoint(method, query, given)
            if method not in READ or isinstance(
                response, ResponseFromBody | EventStream | Deferred
            ):
                return response
            if isinstance(response, RawResponse):
                return _extended(response, permission)
            if isinstance(response, Recorded):
                extended = _extended(response.response, permission)
                return msgspec.structs.replace(response, response=extended)
            return _later(response, permission)

        return allowed

    def _permission(self, headers: Headers) -> bytes:
        if self._all:
            return b"access-control-allow-origin: *\r\n" + _exposed()
        origins = [value for name, value in headers if name == b"origin"]
        if len(origins) != 1 or origins[0] not in self._origins:
            return b"vary: origin\r\n"
        return b"access-control-allow-origin: %b\r\nvary: origin\r\n" % origins[0] + _exposed()


def _exposed() -> bytes:
    return b"access-control-expose-headers: %b\r\n" % _EXPOSED


def _is_origin(text: object) -> bool:
    return isinstance(text, str) and _ORIGIN.fullmatch(text) is not None


def _asks_to_read(headers: Headers) -> bool:
    asked = [value for name, value in headers if name == b"access-control-request-method"]
    return len(asked) == 1 and asked[0].decode("latin-1") in READ


def _extended(response: RawResponse, head: bytes) -> RawResponse:
    return RawResponse(response.status, response.head + head, response.body)


async def _later(response: Awaitable[RawResponse], head: bytes) -> RawResponse:
    return _extended(await response, head)
