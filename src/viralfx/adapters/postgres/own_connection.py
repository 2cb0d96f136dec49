"""A connection beside the pool, for what must be heard while the pool is exhausted."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from asyncpg.connection import Connection

from viralfx.adapters.postgres.connection import answer
from viralfx.adapters.postgres.database import PostgresDatabase


class OwnConnection:
    """Made when it is first needed, anew when it failed, and cut when the database is closed."""

    def __init__(self, database: PostgresDatabase, purpose: str) -> None:
        """``purpose`` is the end of the name by which the server shows the connection."""
        self._database = database
        self._name = f"{database.config.application_name}-{purpose}"
        self._connection: Connection[Any] | None = None
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator["Questions"]:
        """Take it for the block, one caller at a time; raises what the driver does.

        What fails in the block, or is cancelled there, costs the connection.
        """
        async with self._turn:
            if self._connection is None or self._connection.is_closed():
                named = {"application_name": self._name}
                self._connection = await self._database.connect(cut=True, **named)
            try:
                yield Questions(self._connection)
            except BaseException:
                self._connection.terminate()
                raise


class Questions:
    """What can be asked over it; who is cancelled meanwhile does not wait for the server."""

    def __init__(self, connection: "Connection[Any]") -> None:
        self._connection = connection

    async def execute(self, statement: str, *arguments: object) -> Any:
        """Run a statement and return its status."""
        return await answer(self._connection, self._connection.execute(statement, *arguments))

    async def fetch(self, statement: str, *arguments: object) -> Any:
        """Run a statement and return its rows."""
        return await answer(self._connection, self._connection.fetch(statement, *arguments))
