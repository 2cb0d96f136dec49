"""Cross-origin reads (CORS) of the operations endpoints, for pages of the listed origins."""

import re
from collections.abc import Awaitable, Sequence

from viralfx.domain.errors import ConfigurationError
from viralfx.web.auth import Headers
from viralfx.web.responses import (
    READ,
    Denied,
    Endpoint,
    EventStream,
    RawResponse,
    ResponseFromBody,
)

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

        def allowed(
            method: str, query: bytes, headers: Headers
        ) -> RawResponse | Awaitable[RawResponse] | ResponseFromBody | Denied | EventStream:
            given = list(headers)
            permission = self._permission(given)
            if method == "OPTIONS" and b"allow-origin" in permission and _asks_to_read(given):
                return RawResponse(204, permission + _PREFLIGHT, b"")
            response = endpoint(method, query, given)
            if method not in READ or isinstance(response, ResponseFromBody | EventStream):
                return response
            if isinstance(response, RawResponse):
                return _extended(response, permission)
            if isinstance(response, Denied):
                return Denied(_extended(response.response, permission), response.log)
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
