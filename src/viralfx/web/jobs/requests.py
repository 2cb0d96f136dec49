"""What comes in: the body of a new job, its key, and the place in a list."""

import re
from uuid import UUID

import msgspec
from litestar import Request
from litestar.datastructures import State
from litestar.exceptions import ClientException, HTTPException
from litestar.exceptions.http_exceptions import RequestEntityTooLarge

from viralfx.domain.correlation import is_correlation_id, is_traceparent
from viralfx.domain.jobs.job import JobState
from viralfx.domain.jobs.nesting import MOST, is_too_deep
from viralfx.web.jobs.views import JobRequest

MOST_BYTES = 64 * 1024
"""Size of a body that is read at all."""

AnyRequest = Request[object, object, State]

_LONGEST_KEY = 255
_KEY = re.compile(rf"[!-~]{{1,{_LONGEST_KEY}}}").fullmatch
_decode = msgspec.json.Decoder(JobRequest).decode


async def read_request(request: AnyRequest) -> JobRequest:
    """Read what is asked for. Raises the HTTP error of whatever is wrong with it."""
    media_type, _ = request.content_type
    if media_type and media_type != "application/json" and not media_type.endswith("+json"):
        raise HTTPException("Send the job as application/json.", status_code=415)
    try:
        body = await request.body()
    except RequestEntityTooLarge:
        raise RequestEntityTooLarge(f"The body is over {MOST_BYTES // 1024} KiB.") from None
    if is_too_deep(body):
        raise ClientException(f"The body is nested more than {MOST} levels deep.")
    try:
        if not body.isascii():
            body.decode()
        wanted = _decode(body)
        _ = wanted.due
    except msgspec.ValidationError as error:
        raise ClientException(f"The body does not fit: {error}") from None
    except msgspec.DecodeError as error:
        raise ClientException(f"The body is not JSON: {error}") from None
    except UnicodeDecodeError:
        raise ClientException("The body is not UTF-8 text.") from None
    except OverflowError:
        raise ClientException("The body does not fit: `$.runAt` is out of range.") from None
    return wanted


def idempotency_key(request: AnyRequest) -> str | None:
    """Return the key of a request, if it has one. Raises 400 for one that cannot be."""
    keys = request.headers.getall("idempotency-key", [])
    if not keys:
        return None
    if len(keys) > 1 or not _KEY(keys[0]):
        raise ClientException(
            f"Idempotency-Key must be one key of 1 to {_LONGEST_KEY} visible ASCII characters."
        )
    return keys[0]


def traceparent(request: AnyRequest) -> str | None:
    """Return the trace that a request belongs to, if it says so rightly."""
    given = request.headers.getall("traceparent", [])
    return given[0] if len(given) == 1 and is_traceparent(given[0]) else None


def cursor_of(text: str | None) -> str | None:
    """Return the id that a list goes on from. Raises 400 for a text that was no cursor."""
    if text is None:
        return None
    try:
        return str(UUID(text))
    except ValueError:
        raise ClientException("cursor must be the nextCursor of another page.") from None


def state_of(text: str | None) -> JobState | None:
    """Return the state that a list is of. Raises 400 for a text that is none."""
    if text is None:
        return None
    try:
        return JobState(text)
    except ValueError:
        raise ClientException(f"state must be one of {', '.join(JobState)}.") from None


def correlation_id_of(text: str | None) -> str | None:
    """Return the correlation id that a list is of. Raises 400 for a text that no job can have."""
    if text is not None and not is_correlation_id(text):
        raise ClientException("correlationId must be 1 to 128 of A-Z, a-z, 0-9, '.', '_' and '-'.")
    return text


def refuse_unknown_parameters(request: AnyRequest, *known: str) -> None:
    """Raise 400 for a query parameter that nobody reads: a misspelt filter would show all."""
    for name in request.query_params:
        if name not in known:
            raise ClientException(f"There is no parameter {name!r}; there are {', '.join(known)}.")
