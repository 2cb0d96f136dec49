"""What goes wrong with jobs, as problem details."""

from collections.abc import Callable, Mapping

from litestar import Request, Response
from litestar.datastructures import State
from litestar.types import ExceptionHandlersMap

from viralfx.domain.correlation import current_correlation_id
from viralfx.domain.jobs.codec import PayloadError
from viralfx.domain.jobs.job import (
    JobNotFoundError,
    JobStateError,
    KeyConflictError,
    LedgerUnavailableError,
    NotMigratedError,
)
from viralfx.domain.jobs.service import UnknownQueueError
from viralfx.domain.jobs.tasks import UnknownTaskError
from viralfx.web.problems import PROBLEM_MEDIA_TYPE, Problem, problem

_SOON = {"Retry-After": "1"}

Handler = Callable[[Request[object, object, State], Exception], Response[Problem]]


def respond(
    status: int,
    detail: str,
    *,
    errors: list[object] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response[Problem]:
    """Answer with a problem."""
    return Response(
        problem(status, detail=detail, correlation_id=current_correlation_id(), errors=errors),
        status_code=status,
        headers=headers,
        media_type=PROBLEM_MEDIA_TYPE,
    )


def _said(status: int) -> Handler:
    def handle(_: Request[object, object, State], error: Exception) -> Response[Problem]:
        return respond(status, _sentence(str(error)))

    return handle


def _misfit(_: Request[object, object, State], error: Exception) -> Response[Problem]:
    what = {"key": "payload", "message": str(error)}
    return respond(422, "The payload does not fit the task.", errors=[what])


def _unavailable(advice: str) -> Handler:
    detail = f"The ledger of the jobs cannot be reached.{advice}"

    def handle(_: Request[object, object, State], __: Exception) -> Response[Problem]:
        return respond(503, detail, headers=_SOON)

    return handle


def _not_migrated(_: Request[object, object, State], __: Exception) -> Response[Problem]:
    detail = "The ledger of the jobs has no tables yet: `viralfx migrate` is to be run."
    return respond(503, detail, headers=_SOON)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith("?") else ".")


HANDLERS: ExceptionHandlersMap = {
    JobNotFoundError: _said(404),
    JobStateError: _said(409),
    KeyConflictError: _said(409),
    UnknownTaskError: _said(422),
    UnknownQueueError: _said(422),
    PayloadError: _misfit,
    LedgerUnavailableError: _unavailable(""),
    NotMigratedError: _not_migrated,
}

ON_ACCEPT: ExceptionHandlersMap = {
    LedgerUnavailableError: _unavailable(
        " The job may have been accepted all the same: send it again with the same Idempotency-Key."
    ),
}
"""What is said otherwise where a job is accepted."""

ON_CHANGE: ExceptionHandlersMap = {
    LedgerUnavailableError: _unavailable(
        " The change may have been made all the same: look at the job before asking again."
    ),
}
"""And where one is changed that there is."""
