"""Errors of Litestar as problem details (RFC 9457)."""

from collections.abc import Iterable, Mapping
from http import HTTPStatus

from litestar import Request, Response
from litestar.datastructures import State
from litestar.enums import HttpMethod
from litestar.exceptions import HTTPException
from litestar.types import ExceptionHandlersMap

from viralfx.domain.correlation import current_correlation_id
from viralfx.web.responses import PROBLEM_MEDIA_TYPE, Problem, problem


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
