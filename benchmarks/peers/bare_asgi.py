"""A minimal ASGI application with constant responses of the same size."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]

DETAILED_SIZE = 2152
"""Bytes of `/health/detailed` with the built-in checks."""

_PROBE = b'{"alive":true,"uptime":12.345,"timestamp":"2026-01-06T12:00:00.000Z"}'
_DETAILED = json.dumps({"padding": ""}, separators=(",", ":")).encode()
_DETAILED = _DETAILED[:-2] + b"x" * (DETAILED_SIZE - len(_DETAILED)) + _DETAILED[-2:]


def _headers(body: bytes) -> list[tuple[bytes, bytes]]:
    return [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]


_ANSWERS = {
    "/health/live": (_headers(_PROBE), _PROBE),
    "/health/detailed": (_headers(_DETAILED), _DETAILED),
}


async def app(
    scope: Message,
    receive: Callable[[], Awaitable[Message]],
    send: Callable[[Message], Awaitable[None]],
) -> None:
    """Send the response from the table; any other path is an error."""
    if scope["type"] == "lifespan":
        while True:
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return
    headers, body = _ANSWERS[scope["path"]]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
