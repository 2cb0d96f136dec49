"""The common interface of the job queues. Standard library only: peers import it."""

import os
from typing import Protocol

SLOTS = 100
"""Concurrent jobs of a worker, if it supports that."""
REDIS, DATABASE = "BENCH_REDIS_URL", "BENCH_DATABASE_URL"
"""Environment variables with the addresses of the servers."""


class Peer(Protocol):
    """The producer of a job that does nothing.

    Its module has a ``Producer`` that does this; in ``WORKER`` the arguments for Python that run
    its worker; and in ``DISTRIBUTIONS`` what it is installed from.
    """

    gathers: bool
    """Whether several :meth:`enqueue` can be under way at once."""

    async def prepare(self) -> None:
        """Connect, and create the queue's objects in an empty Redis or database."""
        ...

    async def enqueue(self) -> None:
        """Put one job into the queue; return when the queue has it."""
        ...

    async def unfinished(self) -> int:
        """Count the jobs that wait or run, as far as the queue knows them."""
        ...

    async def close(self) -> None:
        """Close the connections of :meth:`prepare`."""
        ...


def redis_url() -> str:
    """Return the address of the Redis to use."""
    return os.environ[REDIS]


def database_url() -> str:
    """Return the address of the database to use."""
    return os.environ[DATABASE]
