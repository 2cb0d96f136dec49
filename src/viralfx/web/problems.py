"""Errors of Litestar and of the jobs API as problem details (RFC 9457)."""

from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus

from litestar import Request, Response
from litestar.datastructures import State
from litestar.enums import HttpMethod
from litestar.exceptions import HTTPException
from litestar.types import ExceptionHandlersMap

from viralfx.core.correlation import current_correlation_id
from viralfx.core.errors import (
    LedgerFullError,
    LedgerUnavailableError,
    NotMigratedError,
    UnstorableError,
)
from viralfx.jobs.codec import PayloadError
from viralfx.jobs.ledger import KeyHeldError
from viralfx.jobs.model import (
    InvalidFilterError,
    JobNotFoundError,
    JobStateError,
    UnknownQueueError,
)
from viralfx.jobs.schedule import UnknownScheduleError
from viralfx.jobs.tasks import UnknownTaskError
from viralfx.server.problems import PROBLEM_MEDIA_TYPE, Problem, problem


def allow(methods: Iterable[str]) -> str:
    """Return the value of ``Allow`` for a path with handlers for these methods."""
    named = set(methods)
    if HttpMethod.GET.value in named:
        named.add(HttpMethod.HEAD.value)
    return ", ".join(sorted(named))


def problem_handlers() -> ExceptionHandlersMap:
    """Return the exception handlers of an application or a router."""
    return {HTTPException: _http_error, Exception: _unhandled}


def _http_error(request: Request[object, object, State], error: HTTPException) -> Response[Problem]:
    if error.status_code == HTTPStatus.INTERNAL_SERVER_ERROR:
        return _unhandled(request, error)
    return Response(
        problem(
            error.status_code,
            detail=error.detail,
            correlation_id=current_correlation_id(),
            errors=error.extra if isinstance(error.extra, list) else None,
        ),
        status_code=error.status_code,
        headers=_headers(error),
        media_type=PROBLEM_MEDIA_TYPE,
    )


def _headers(error: HTTPException) -> Mapping[str, str] | None:
    if error.status_code != HTTPStatus.METHOD_NOT_ALLOWED or error.headers is None:
        return error.headers
    named = error.headers.get("allow", "").split(", ")
    return {**error.headers, "allow": allow(filter(None, named))}


def _unhandled(_request: Request[object, object, State], _error: Exception) -> Response[Problem]:
    detail = (
        "The server failed to handle the request; its log has the details under the correlation id."
    )
    return Response(
        problem(500, detail=detail, correlation_id=current_correlation_id()),
        status_code=500,
        media_type=PROBLEM_MEDIA_TYPE,
    )


_RETRY_SOON = {"Retry-After": "1"}
_RETRY_WHEN_FREE = {"Retry-After": "5"}

Handler = Callable[[Request[object, object, State], Exception], Response[Problem]]


def respond(
    status: int,
    detail: str,
    *,
    code: str | None = None,
    errors: list[object] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response[Problem]:
    """Return problem details."""
    return Response(
        problem(
            status,
            detail=detail,
            correlation_id=current_correlation_id(),
            code=code,
            errors=errors,
        ),
        status_code=status,
        headers=headers,
        media_type=PROBLEM_MEDIA_TYPE,
    )


def _message_as_detail(status: int) -> Handler:
    def handle(_: Request[object, object, State], error: Exception) -> Response[Problem]:
        return respond(status, sentence(str(error)))

    return handle


def _invalid_payload(_: Request[object, object, State], error: Exception) -> Response[Problem]:
    index = getattr(error, "index", None)
    key = "payload" if index is None else f"jobs[{index}].payload"
    what = {"key": key, "message": str(error)}
    return respond(422, "The payload does not fit the task.", errors=[what])


def ledger_unavailable(advice: str) -> Handler:
    """Return the handler of an unavailable ledger; ``advice`` follows the sentence about that."""
    detail = f"The job ledger is unavailable.{advice}"

    def handle(_: Request[object, object, State], error: Exception) -> Response[Problem]:
        code = error.code if isinstance(error, LedgerUnavailableError) else None
        return respond(503, detail, code=code, headers=_RETRY_SOON)

    return handle


def _key_held(_: Request[object, object, State], error: Exception) -> Response[Problem]:
    detail = f"{sentence(str(error))} Nothing was accepted."
    return respond(503, detail, code="key_held", headers=_RETRY_SOON)


def _not_migrated(_: Request[object, object, State], __: Exception) -> Response[Problem]:
    detail = "The job ledger has no tables yet: run `viralfx migrate`."
    return respond(503, detail, headers=_RETRY_SOON)


def _refused(_: Request[object, object, State], __: Exception) -> Response[Problem]:
    detail = "The job ledger refuses the job because of an error of its own: see the log."
    return respond(503, detail, headers=_RETRY_SOON)


def _full(_: Request[object, object, State], error: Exception) -> Response[Problem]:
    detail = f"{sentence(str(error))} Nothing was accepted: send the job again later."
    return respond(503, detail, headers=_RETRY_WHEN_FREE)


def sentence(text: str) -> str:
    """Return the message of an error as a sentence."""
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith("?") else ".")


JOB_HANDLERS: ExceptionHandlersMap = {
    JobNotFoundError: _message_as_detail(404),
    JobStateError: _message_as_detail(409),
    UnknownTaskError: _message_as_detail(422),
    UnknownQueueError: _message_as_detail(422),
    UnknownScheduleError: _message_as_detail(404),
    InvalidFilterError: _message_as_detail(400),
    PayloadError: _invalid_payload,
    LedgerUnavailableError: ledger_unavailable(""),
    KeyHeldError: _key_held,
    NotMigratedError: _not_migrated,
    LedgerFullError: _full,
    UnstorableError: _refused,
}
"""The handlers of the errors of jobs."""

ON_ACCEPT: ExceptionHandlersMap = {
    LedgerUnavailableError: ledger_unavailable(
        " The job may have been accepted nevertheless: send it again with the same Idempotency-Key."
    ),
}
"""The handlers that differ when a job is accepted."""

ON_BATCH: ExceptionHandlersMap = {
    LedgerUnavailableError: ledger_unavailable(
        " The jobs may have been accepted nevertheless: send them again, each with the same key."
    ),
}
"""The handlers that differ when a batch is accepted."""

ON_CHANGE: ExceptionHandlersMap = {
    LedgerUnavailableError: ledger_unavailable(
        " The change may have been made nevertheless: read the job before you try again."
    ),
}
"""The handlers that differ when an existing job is changed."""


ON_QUEUE: ExceptionHandlersMap = {
    UnknownQueueError: _message_as_detail(404),
    LedgerUnavailableError: ledger_unavailable(
        " The queue may have been changed nevertheless: send the request again."
    ),
}
"""The handlers that differ for queues."""
