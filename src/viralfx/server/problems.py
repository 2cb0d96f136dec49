"""Problems as clients see them (RFC 9457)."""

from http import HTTPStatus
from typing import Any

import msgspec

from viralfx.core.errors import printable

PROBLEM_MEDIA_TYPE = "application/problem+json"


class Problem(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """An error as a client sees it. It never contains the text of an exception."""

    status: int
    title: str
    detail: str | None = None
    correlation_id: str | None = None
    code: str | None = None
    """For programs: the problem of a dependency, as its health check names it."""
    errors: list[Any] | None = None
    """The problems of the fields of the request."""


def problem(
    status: int,
    *,
    detail: str | None = None,
    correlation_id: str | None = None,
    code: str | None = None,
    errors: list[Any] | None = None,
) -> Problem:
    """Return the problem for an HTTP status, with the status's standard phrase as title.

    Control characters of ``detail`` are escaped: people read it in a terminal.
    """
    return Problem(
        status=status,
        title=HTTPStatus(status).phrase,
        detail=None if detail is None else printable(detail),
        correlation_id=correlation_id,
        code=code,
        errors=errors,
    )
