"""Responses: the error for each status, and ``Retry-After``."""

import time
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viralfx.domain.webhooks.delivery import failure_of, is_host_failing, parse_retry_after
from viralfx.domain.webhooks.url import WebhookRejectedError, WebhookUnavailableError

NOW = datetime(2026, 1, 6, 12, tzinfo=UTC)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 501, 502, 503, 504, 507, 599])
def test_statuses_that_are_retried(status: int) -> None:
    """The receiver is unavailable or busy."""
    failure = failure_of("example.com", status, None, NOW)
    assert isinstance(failure, WebhookUnavailableError)
    assert failure.retry_after is None
    assert str(failure) == f"example.com answered {status}"


@pytest.mark.parametrize("status", [101, 400, 401, 403, 404, 405, 410, 413, 415, 422, 451])
def test_statuses_that_are_not_retried(status: int) -> None:
    """The receiver rejects the webhook, as with 410."""
    failure = failure_of("example.com", status, "5", NOW)
    assert isinstance(failure, WebhookRejectedError)
    assert failure.status == status
    assert str(failure) == f"example.com answered {status}"


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308])
def test_a_redirect_is_a_rejection(status: int) -> None:
    """The message gives the reason."""
    failure = failure_of("example.com", status, None, NOW)
    assert isinstance(failure, WebhookRejectedError)
    assert str(failure) == f"example.com answered {status}; redirects are not followed"


@pytest.mark.parametrize("status", [200, 302, 404, 410, 425, 429, 499])
def test_a_4xx_host_is_not_failing(status: int) -> None:
    """Its circuit does not count the response as a failure."""
    assert not is_host_failing(status)


def test_a_5xx_host_is_failing() -> None:
    """From 500 on."""
    assert is_host_failing(500)
    assert is_host_failing(503)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("0", 0.0),
        ("7", 7.0),
        (" 120 ", 120.0),
        ("21600", 21600.0),
        ("21601", 21600.0),
        ("9" * 5000, 21600.0),
        ("Tue, 06 Jan 2026 12:01:30 GMT", 90.0),
        ("Tuesday, 06-Jan-26 12:01:30 GMT", 90.0),
        ("Tue Jan  6 12:01:30 2026", 90.0),
        ("Tue, 06 Jan 2026 12:01:30 -0000", 90.0),
        ("Tue, 06 Jan 2026 14:01:30 +0200", 90.0),
        ("Tue, 06 Jan 2026 11:59:00 GMT", 0.0),
        ("Wed, 07 Jan 2026 12:00:00 GMT", 21600.0),
        ("", None),
        ("soon", None),
        ("-1", None),
        ("1.5", None),
        ("+7", None),
        ("1e3", None),
        ("\u0667", None),  # a digit, but not an ASCII one
        ("Tue, 99 Jan 2026 12:01:30 GMT", None),
        ("Tue, 06 Jan 99999 12:01:30 GMT", None),
        ("nan", None),
        ("inf", None),
    ],
)
def test_retry_after(header: str, seconds: float | None) -> None:
    """Seconds or one of the three date formats, at most six hours."""
    assert parse_retry_after(header, NOW) == seconds
    failure = failure_of("example.com", 429, header, NOW)
    assert isinstance(failure, WebhookUnavailableError)
    assert failure.retry_after == seconds


def test_a_date_without_zone_is_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    """In any time zone of the process."""
    try:
        with monkeypatch.context() as elsewhere:
            elsewhere.setenv("TZ", "America/New_York")
            time.tzset()
            assert parse_retry_after("Tue Jan  6 12:01:30 2026", NOW) == 90.0
    finally:
        time.tzset()


@given(st.text(max_size=60) | st.from_regex(r"\A[A-Z][a-z]{2}, ?\d+ [A-Za-z]* \d+ [\d:]* [A-Z]*"))
def test_any_header_is_parsed_or_ignored(header: str) -> None:
    """No header raises an error."""
    seconds = parse_retry_after(header, NOW)
    assert seconds is None or 0 <= seconds <= 21600
