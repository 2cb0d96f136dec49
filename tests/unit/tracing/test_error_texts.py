"""Tests of error texts: no trace contains rows of Postgres or arguments of commands."""

import pytest
from asyncpg import exceptions as pg
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.trace import StatusCode
from redis.exceptions import ResponseError
from tests.unit.tracing.conftest import Finished

_ROW = "Key (email)=(planted@example.com\n\nand more, planted) already exists."


def twice() -> pg.PostgresError:
    """Return the driver's error for a duplicate key."""
    error: pg.PostgresError = pg.PostgresError.new(
        {
            "S": "ERROR",
            "C": "23505",
            "M": 'duplicate key value violates unique constraint "users_email_key"',
            "D": _ROW,
        }
    )
    return error


def fail(provider: TracerProvider, error: BaseException) -> None:
    """Record an error on a span."""
    with (
        pytest.raises(type(error)),
        provider.get_tracer("test").start_as_current_span("work"),
    ):
        raise error


class DataError(Exception):
    """An application's own, by the name of one of the driver's."""


def texts(span: ReadableSpan) -> tuple[str, str, str]:
    """Return message, stack trace and status description of a span's error."""
    [event] = span.events
    attributes = event.attributes or {}
    return (
        str(attributes["exception.message"]),
        str(attributes["exception.stacktrace"]),
        str(span.status.description),
    )


def test_a_postgres_error_is_reduced_to_its_class(
    provider: TracerProvider, finished: Finished
) -> None:
    """The text quotes rows; the log has it under the same trace id."""
    for error in (
        twice(),
        pg.DataError("invalid input for query argument $1: planted (...)"),
        pg.RaiseError("planted\nplanted"),
    ):
        fail(provider, error)
        *_, span = finished()
        message, stacktrace, status = texts(span)
        assert message == ""
        assert stacktrace.splitlines()[-1] == f"asyncpg.exceptions.{type(error).__name__}"
        assert status == type(error).__name__
        assert "planted" not in span.to_json()


def test_errors_that_quote_a_postgres_error_contain_no_row(
    provider: TracerProvider, finished: Finished
) -> None:
    """This holds for chained errors and error groups; the rest of the text stays."""
    first = twice()
    second = ValueError(f"not stored: {first}")
    second.__cause__ = first
    group = ExceptionGroup("both", [second, twice(), KeyError("other")])
    for error in (second, group):
        fail(provider, error)
    one, several = map(texts, finished())

    assert one[0].startswith("not stored: duplicate key value")
    assert one[2].startswith("ValueError: not stored: duplicate key value")
    assert one[1].startswith("asyncpg.exceptions.UniqueViolationError\n\nThe above exception was")
    assert "ValueError: not stored: duplicate key value" in one[1]
    assert "| asyncpg.exceptions.UniqueViolationError\n    +-" in several[1]
    assert "KeyError: 'other'" in several[1]
    assert "planted" not in repr((one, several))


def test_an_unrelated_error_with_the_same_name_is_kept(
    provider: TracerProvider, finished: Finished
) -> None:
    """It is not an error of Postgres."""
    fail(provider, DataError("column 3 is missing"))
    message, _, status = texts(*finished())

    assert (message, status) == ("column 3 is missing", "DataError: column 3 is missing")


def test_a_status_without_exception_is_matched_by_name(
    provider: TracerProvider, finished: Finished
) -> None:
    """If the span did not record the exception, its module is unknown."""
    tracer = provider.get_tracer("test")
    with (
        pytest.raises(pg.RaiseError),
        tracer.start_as_current_span("work", record_exception=False),
    ):
        raise pg.RaiseError("planted")

    assert finished()[0].status.description == "RaiseError"


def test_a_separator_in_a_row_does_not_end_the_row(
    provider: TracerProvider, finished: Finished
) -> None:
    """It looks like the separator between the errors of a group."""
    table = "a row (1, | a | b |\n+---+---+\n| x | y |, planted)"
    fail(provider, pg.PostgresError.new({"S": "ERROR", "C": "23514", "M": "no", "D": table}))
    fail(provider, ExceptionGroup("both", [pg.RaiseError(table), KeyError("other")]))
    one, several = finished()

    assert "planted" not in one.to_json() + several.to_json()
    assert "KeyError: 'other'" in texts(several)[1]


def test_sqlalchemy_errors_contain_no_row(provider: TracerProvider, finished: Finished) -> None:
    """SQLAlchemy quotes the driver's error, the statement and its parameters."""

    class DBAPIError(Exception):
        pass

    text = (
        "(sqlalchemy.dialects.postgresql.asyncpg.Error) <class 'asyncpg.exceptions.RaiseError'>: "
        "planted\n[SQL: INSERT INTO users VALUES ('planted', $1)]\n[parameters: ('planted',)]\n"
        "(Background on this error at: https://sqlalche.me/e/20/dbapi)"
    )
    fail(provider, DBAPIError(text))
    fail(provider, DBAPIError("[SQL: SELECT 'planted']\n[parameters: ('planted\nplanted',)]"))
    fail(provider, DBAPIError(f"shown: {pg.RaiseError('planted')!r}, {pg.RaiseError('planted')}"))
    first, second, third = finished()

    assert all("planted" not in span.to_json() for span in (first, second, third))
    assert texts(first)[0].endswith("Error) <class 'asyncpg.exceptions.RaiseError'>: ...")
    assert texts(second)[0] == "[SQL: ..."
    assert texts(third)[0] == "shown: RaiseError(..."


def test_the_drivers_own_messages_are_kept(provider: TracerProvider, finished: Finished) -> None:
    """They are about connections and contain no values."""
    fail(provider, pg.InterfaceError("pool is closing"))
    message, stacktrace, status = texts(*finished())

    assert message == "pool is closing"
    assert stacktrace.splitlines()[-1] == "asyncpg.exceptions._base.InterfaceError: pool is closing"
    assert status == "InterfaceError: pool is closing"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (
            "Command # 1 (SET session:planted planted\nplanted) of pipeline caused error: no",
            "Command # 1 (SET ...) of pipeline caused error: no",
        ),
        (
            "unknown command 'GTE', with args beginning with: 'planted' 'planted'",
            "unknown command 'GTE', with args beginning with: ...",
        ),
    ],
)
def test_redis_errors_contain_no_arguments(
    provider: TracerProvider, finished: Finished, text: str, kept: str
) -> None:
    """The client adds them to errors of a pipeline, the server to unknown commands."""
    fail(provider, ResponseError(text))
    message, stacktrace, status = texts(*finished())

    assert message == kept
    assert stacktrace.splitlines()[-1] == f"redis.exceptions.ResponseError: {kept}"
    assert status == f"ResponseError: {kept}"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (
            str(twice()),
            'duplicate key value violates unique constraint "users_email_key"\nDETAIL: ...',
        ),
        (
            f"not stored: {str(twice())!r}",
            (
                r"not stored: 'duplicate key value violates unique constraint "
                r'"users_email_key"\nDETAIL: ...'
            ),
        ),
        (repr([repr(str(twice()))]), None),
        (
            "invalid input for query argument $1: 'planted",
            "invalid input for query argument $1: ...",
        ),
        (
            'at: invalid input syntax for type x: "a\nplanted"',
            "at: invalid input syntax for type x: ...",
        ),
    ],
)
def test_a_reraised_message_contains_no_row(
    provider: TracerProvider, finished: Finished, text: str, kept: str | None
) -> None:
    """The class of the original error is unknown."""
    with provider.get_tracer("test").start_as_current_span("process") as span:
        span.add_event("went wrong", {"exception.message": text})
        span.set_status(StatusCode.ERROR, text)
    [work] = finished()
    message = str((work.events[0].attributes or {})["exception.message"])

    assert "planted" not in work.to_json()
    assert kept is None or (message, work.status.description) == (kept, kept)
