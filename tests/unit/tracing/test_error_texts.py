"""What errors quote: rows of Postgres and arguments of commands are in no trace."""

import pytest
from asyncpg import exceptions as pg
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.trace import StatusCode
from redis.exceptions import ResponseError
from tests.unit.tracing.conftest import Finished

_ROW = "Key (email)=(planted@example.com\n\nand more, planted) already exists."


def twice() -> pg.PostgresError:
    """Return what the driver makes of an answer of the server."""
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
    """Have a span see an error."""
    with (
        pytest.raises(type(error)),
        provider.get_tracer("test").start_as_current_span("work"),
    ):
        raise error


class DataError(Exception):
    """An application's own, by the name of one of the driver's."""


def texts(span: ReadableSpan) -> tuple[str, str, str]:
    """Return the message of the error that a span saw, its traceback, and the span's status."""
    [event] = span.events
    attributes = event.attributes or {}
    return (
        str(attributes["exception.message"]),
        str(attributes["exception.stacktrace"]),
        str(span.status.description),
    )


def test_an_error_of_postgres_is_its_kind_alone(
    provider: TracerProvider, finished: Finished
) -> None:
    """Its text quotes rows; the log has it, under the ids of the trace."""
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


def test_what_another_error_tells_of_it_is_without_the_row(
    provider: TracerProvider, finished: Finished
) -> None:
    """It was raised in its place, or is one of several; and all that is no row is there."""
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


def test_an_error_of_another_s_with_such_a_name_is_told(
    provider: TracerProvider, finished: Finished
) -> None:
    """It is no error of Postgres."""
    fail(provider, DataError("column 3 is missing"))
    message, _, status = texts(*finished())

    assert (message, status) == ("column 3 is missing", "DataError: column 3 is missing")


def test_a_status_without_an_error_is_told_by_its_name(
    provider: TracerProvider, finished: Finished
) -> None:
    """Where a span was not to record it, nothing says which class it was of."""
    tracer = provider.get_tracer("test")
    with (
        pytest.raises(pg.RaiseError),
        tracer.start_as_current_span("work", record_exception=False),
    ):
        raise pg.RaiseError("planted")

    assert finished()[0].status.description == "RaiseError"


def test_a_table_in_a_row_does_not_end_it(provider: TracerProvider, finished: Finished) -> None:
    """It looks like what stands between the errors of a group."""
    table = "a row (1, | a | b |\n+---+---+\n| x | y |, planted)"
    fail(provider, pg.PostgresError.new({"S": "ERROR", "C": "23514", "M": "no", "D": table}))
    fail(provider, ExceptionGroup("both", [pg.RaiseError(table), KeyError("other")]))
    one, several = finished()

    assert "planted" not in one.to_json() + several.to_json()
    assert "KeyError: 'other'" in texts(several)[1]


def test_a_mapper_tells_no_row_either(provider: TracerProvider, finished: Finished) -> None:
    """As SQLAlchemy does: the driver's error, the statement, what was bound to it."""

    class DBAPIError(Exception):
        pass

    said = (
        "(sqlalchemy.dialects.postgresql.asyncpg.Error) <class 'asyncpg.exceptions.RaiseError'>: "
        "planted\n[SQL: INSERT INTO users VALUES ('planted', $1)]\n[parameters: ('planted',)]\n"
        "(Background on this error at: https://sqlalche.me/e/20/dbapi)"
    )
    fail(provider, DBAPIError(said))
    fail(provider, DBAPIError("[SQL: SELECT 'planted']\n[parameters: ('planted\nplanted',)]"))
    fail(provider, DBAPIError(f"shown: {pg.RaiseError('planted')!r}, {pg.RaiseError('planted')}"))
    first, second, third = finished()

    assert all("planted" not in span.to_json() for span in (first, second, third))
    assert texts(first)[0].endswith("Error) <class 'asyncpg.exceptions.RaiseError'>: ...")
    assert texts(second)[0] == "[SQL: ..."
    assert texts(third)[0] == "shown: RaiseError(..."


def test_what_the_driver_says_itself_is_kept(provider: TracerProvider, finished: Finished) -> None:
    """It is about connections, and helps."""
    fail(provider, pg.InterfaceError("pool is closing"))
    message, stacktrace, status = texts(*finished())

    assert message == "pool is closing"
    assert stacktrace.splitlines()[-1] == "asyncpg.exceptions._base.InterfaceError: pool is closing"
    assert status == "InterfaceError: pool is closing"


@pytest.mark.parametrize(
    ("said", "kept"),
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
def test_an_error_of_redis_shows_no_arguments(
    provider: TracerProvider, finished: Finished, said: str, kept: str
) -> None:
    """Which its client adds to the errors of a pipeline, and the server to a typing error."""
    fail(provider, ResponseError(said))
    message, stacktrace, status = texts(*finished())

    assert message == kept
    assert stacktrace.splitlines()[-1] == f"redis.exceptions.ResponseError: {kept}"
    assert status == f"ResponseError: {kept}"


@pytest.mark.parametrize(
    ("said", "kept"),
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
def test_an_error_in_somebody_s_words_shows_no_row(
    provider: TracerProvider, finished: Finished, said: str, kept: str | None
) -> None:
    """Of which class it was is not known of it."""
    with provider.get_tracer("test").start_as_current_span("process") as span:
        span.add_event("went wrong", {"exception.message": said})
        span.set_status(StatusCode.ERROR, said)
    [work] = finished()
    message = str((work.events[0].attributes or {})["exception.message"])

    assert "planted" not in work.to_json()
    assert kept is None or (message, work.status.description) == (kept, kept)
