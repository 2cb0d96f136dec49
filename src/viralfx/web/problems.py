"""Problem details (RFC 9457): the one shape of every error answer."""

from http import HTTPStatus
from typing import Any

import msgspec

PROBLEM_MEDIA_TYPE = "application/problem+json"


class Problem(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """An error as a client sees it; never an exception's text."""

    status: int
    title: str
    detail: str | None = None
    correlation_id: str | None = None
    errors: list[Any] | None = None
    """What is wrong with each field of the request."""


def problem(
    status: int,
    *,
    detail: str | None = None,
    correlation_id: str | None = None,
    errors: list[Any] | None = None,
) -> Problem:
    """Make the problem of an HTTP status, titled with its standard phrase."""
    return Problem(
        status=status,
        title=HTTPStatus(status).phrase,
        detail=detail,
        correlation_id=correlation_id,
        errors=errors,
    )
