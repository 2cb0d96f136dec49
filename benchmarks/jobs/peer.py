"""The form to which every job queue is brought. Standard library only: peers import it."""

import os
from typing import Protocol

SLOTS = 100
"""Jobs that a worker may run at once, where it can."""
REDIS, DATABASE = "BENCH_REDIS_URL", "BENCH_DATABASE_URL"
"""Environment variables that say where the servers are."""


class Peer(Protocol):
    """The producer of a job that does nothing.

    Its module has a ``Producer`` that does this; in ``WORKER`` the arguments for Python that run
    its worker; and in ``DISTRIBUTIONS`` what it is installed from.
    """

    gathers: bool
    """Whether several :meth:`enqueue` can be under way at once."""

    async def prepare(self) -> None:
        """Connect, and make in an empty Redis or a fresh database what the queue needs."""
        ...

    async def enqueue(self) -> None:
        """Put one job into the queue; return when the queue has it."""
        ...

    async def unfinished(self) -> int:
        """Count the jobs that wait or run, as far as the queue keeps account of them."""
        ...

    async def close(self) -> None:
        """Let go of what :meth:`prepare` opened."""
        ...


def redis_url() -> str:
    """Return the address of the Redis to use."""
    return os.environ[REDIS]


def database_url() -> str:
    """Return the address of the database to use."""
    return os.environ[DATABASE]
