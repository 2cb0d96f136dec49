"""What a receiver's answer means, and when it wants to be asked again."""

import math
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus

from viralfx.domain.webhooks.errors import (
    WebhookError,
    WebhookRejectedError,
    WebhookUnavailableError,
)

LONGEST_RETRY_AFTER = 6 * 3600.0
"""Seconds; a receiver that asks for more is asked again then."""

_COMES_AGAIN = frozenset(
    {
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.TOO_EARLY,
        HTTPStatus.TOO_MANY_REQUESTS,
    }
)
_DIGITS = re.compile(r"[0-9]+").fullmatch


def is_host_failing(status: int) -> bool:
    """Tell whether an answer says that the host is in trouble, and not just this request."""
    return status >= HTTPStatus.INTERNAL_SERVER_ERROR


def failure_of(host: str, status: int, retry_after: str | None, now: datetime) -> WebhookError:
    """Return what an answer other than 2xx amounts to.

    408, 425, 429 and 5xx are worth another try. A redirect is a refusal like 4xx: following it
    would go where nobody allowed it to.
    """
    if status in _COMES_AGAIN or is_host_failing(status):
        asked = None if retry_after is None else parse_retry_after(retry_after, now)
        return WebhookUnavailableError(f"{host} answered {status}", asked)
    if HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
        message = f"{host} answered {status}; redirects are not followed"
        return WebhookRejectedError(message, status)
    return WebhookRejectedError(f"{host} answered {status}", status)


def parse_retry_after(text: str, now: datetime) -> float | None:
    """Read ``Retry-After``, seconds or a date, as seconds; None where it is neither.

    Never more than :data:`LONGEST_RETRY_AFTER`, and never negative.
    """
    text = text.strip()
    if _DIGITS(text):
        # Not int() of whatever length: that is refused beyond 4300 digits.
        seconds = float(text)
    else:
        try:
            date = parsedate_to_datetime(text)
            # A date without a zone, or with -0000, is UTC by RFC 9110.
            aware = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
            seconds = (aware - now).total_seconds()
        except (ValueError, OverflowError, IndexError):
            return None
    return max(0.0, min(seconds, LONGEST_RETRY_AFTER)) if not math.isnan(seconds) else None
