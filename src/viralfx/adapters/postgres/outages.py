"""What an error of the database means to whoever asks the job ledger."""

import contextlib
from collections.abc import Iterator

import asyncpg

from viralfx.adapters.postgres.errors import DATABASE_ERRORS, explain
from viralfx.domain.jobs.job import LedgerUnavailableError, NotMigratedError

_NOT_MIGRATED = (
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedColumnError,
    asyncpg.InvalidSchemaNameError,
)
BAD_CONTENT = (asyncpg.DataError, UnicodeError)
"""What the server, or the driver already, says of a value that cannot be stored."""
BAD_VALUE = (*BAD_CONTENT, ValueError)
"""That, and what is said here before either is asked."""


@contextlib.contextmanager
def outages() -> Iterator[None]:
    """Raise every error of the database as :class:`LedgerUnavailableError`; not ``BAD_VALUE``."""
    try:
        yield
    except BAD_VALUE:
        raise
    except DATABASE_ERRORS as error:
        raise unavailable(error) from error


def unavailable(error: Exception) -> LedgerUnavailableError:
    """Say in the ledger's words what an error means."""
    if isinstance(error, _NOT_MIGRATED):
        return NotMigratedError("the tables of jobs are missing: run `viralfx migrate`")
    return LedgerUnavailableError(f"the database {explain(error).problem}")
