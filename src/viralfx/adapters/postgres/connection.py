"""The driver's connection, with one silence of Postgres broken."""

from typing import Any

import asyncpg


class CheckedConnection(asyncpg.Connection):
    """Raises where COMMIT of a transaction that had failed already is answered by ROLLBACK.

    To Postgres that is no error, and to the driver none either: whoever caught the error of a
    statement and went on would take for saved what is not.
    """

    __slots__ = ()

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:  # noqa: ASYNC109 - as its base
        """Run a statement and return its status."""
        status = await super().execute(query, *args, timeout=timeout)
        if status == "ROLLBACK" and query == "COMMIT;":
            raise asyncpg.InFailedSQLTransactionError(
                "the transaction was rolled back: a statement in it had failed"
            )
        return status
