"""Answers as status, headers and bytes, for who serves them ahead of any framework."""

import asyncio
import math
from collections.abc import Awaitable, Callable

import msgspec

from viralfx.domain.correlation import current_correlation_id
from viralfx.web.access import Headers
from viralfx.web.asgi import Receive, Scope
from viralfx.web.problems import PROBLEM_MEDIA_TYPE, problem

# Details are an application's own; one that is no JSON is shown as text, and breaks nothing.
encode = msgspec.json.Encoder(enc_hook=str).encode

_JSON = (b"content-type", b"application/json")
NO_STORE = (b"cache-control", b"no-store")


class Answer(msgspec.Struct, frozen=True):
    """A complete response, but for the correlation id that whoever sends it adds."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class WithBody(msgspec.Struct, frozen=True):
    """An answer that the body of the request is needed for, which whoever asked then reads."""

    most: int
    """Bytes that the body may have."""
    answer: Callable[[bytes], Answer]


class Refused(msgspec.Struct, frozen=True):
    """An answer to who may not do what was asked, which whoever sends it tells of."""

    answer: Answer
    tell: Callable[[Scope, int], None]
    """Takes the request's scope and the answer's status."""


Endpoint = Callable[[str, bytes, Headers], Answer | Awaitable[Answer] | WithBody | Refused]
"""Answers a method, query string and headers."""


def answer_with(status: int, body: bytes, *more: tuple[bytes, bytes]) -> Answer:
    """Answer with JSON."""
    length = (b"content-length", b"%d" % len(body))
    return Answer(status, [_JSON, length, NO_STORE, *more], body)


def problem_answer(status: int, detail: str, *more: tuple[bytes, bytes]) -> Answer:
    """Answer with problem details that carry the correlation id bound at the moment."""
    body = encode(problem(status, detail=detail, correlation_id=current_correlation_id()))
    media_type = (b"content-type", PROBLEM_MEDIA_TYPE.encode())
    length = (b"content-length", b"%d" % len(body))
    return Answer(status, [media_type, length, NO_STORE, *more], body)


def retry_after(seconds: float) -> tuple[bytes, bytes]:
    """Return the header: whole seconds, from 1 to a day."""
    return (b"retry-after", b"%d" % max(1, math.ceil(min(seconds, 86400.0))))


_BODY_SECONDS = 5.0
"""A client that is still sending its few bytes then is given up."""


async def complete(
    promised: Awaitable[Answer] | WithBody | Refused, scope: Scope, receive: Receive
) -> Answer:
    """Wait for an answer that is not there at once, or do what one asks for beside it."""
    if isinstance(promised, Refused):
        promised.tell(scope, promised.answer.status)
        return promised.answer
    if isinstance(promised, WithBody):
        return await _with_body(promised, receive)
    return await promised


async def _with_body(asked: WithBody, receive: Receive) -> Answer:
    """Read the body, and give the answer; 413 for one that is too long, 408 for one too slow."""
    body, more = b"", True
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            while more:
                message = await receive()
                body += message.get("body", b"")
                if len(body) > asked.most:
                    return problem_answer(413, f"The body may have {asked.most} bytes.")
                more = message.get("more_body", False)
    except TimeoutError:
        return problem_answer(408, f"The body did not come within {_BODY_SECONDS:g} s.")
    return asked.answer(body)


READ = ("GET", "HEAD")
"""The methods that only look."""


def not_allowed(allow: str) -> Answer:
    """Answer a method that a path does not have."""
    detail = f"This path answers {allow} only."
    return problem_answer(405, detail, (b"allow", allow.encode()))
