"""The driver's connection: how it is made, and one silence of Postgres broken."""

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

import asyncpg

from viralfx.adapters.postgres.config import PostgresConfig
from viralfx.adapters.postgres.errors import refuses_tls


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


async def connect(
    config: PostgresConfig, arguments: Mapping[str, Any]
) -> "asyncpg.Connection[Any]":
    """Connect with ``arguments``, which are the configuration's, changed where there is need.

    Where TLS is only preferred, and the server says that it speaks none, in plain text. Raises
    what the driver does.
    """
    try:
        connection: asyncpg.Connection[Any] = await asyncpg.connect(**arguments)
    except ConnectionError as error:
        if config.tls_mode != "prefer" or not refuses_tls(error):
            raise
        connection = await asyncpg.connect(**{**arguments, "ssl": False})
    return connection


async def answer(connection: "asyncpg.Connection[Any]", question: Any) -> Any:
    """Await the answer; when cancelled, cut the connection at once.

    Cancelling the driver instead would make it open another connection to ask for the query's
    cancellation, and wait for a server that does not answer.
    """
    asking = asyncio.ensure_future(question)
    try:
        return await asyncio.shield(asking)
    except asyncio.CancelledError:
        connection.terminate()
        with contextlib.suppress(Exception):
            await asking
        raise
