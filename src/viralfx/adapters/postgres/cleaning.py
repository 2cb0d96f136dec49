"""Cleaning a connection that somebody has used, without waiting for a server that hangs."""

import asyncio
import contextlib
import logging
from typing import Any, TypeAlias

import asyncpg
from asyncpg.pool import Pool, PoolConnectionProxy
from asyncpg.transaction import Transaction

from viralfx.adapters.postgres.errors import DATABASE_ERRORS

_logger = logging.getLogger("viralfx.database")

Lease: TypeAlias = "PoolConnectionProxy[Any]"
"""A connection of the pool, for as long as the block that took it."""

PATIENTLY = 5.0
"""Seconds to clean a connection that is given back; it is closed when that does not suffice."""
IN_A_HURRY = 1.0
"""The same for a caller that was cancelled, and has no time for it."""


async def roll_back(connection: Lease, transaction: Transaction, patience: float) -> None:
    """Roll a transaction back within ``patience`` seconds, or close the connection."""
    try:
        async with asyncio.timeout(patience):
            await transaction.rollback()
    except DATABASE_ERRORS:
        # A server that does not answer must not hold whoever was cancelled; without its
        # connection it rolls back by itself.
        with contextlib.suppress(asyncpg.InterfaceError):  # it is gone already
            connection.terminate()


async def give_back(pool: "Pool[Any]", connection: Lease, patience: float) -> None:
    """Clean a connection for the next within ``patience`` seconds, or close it; never raises."""
    try:
        await pool.release(connection, timeout=patience)
    except DATABASE_ERRORS as error:
        # It could not be cleaned and is closed already; what was done with it is done.
        _logger.debug("Database connection dropped", exc_info=error)
