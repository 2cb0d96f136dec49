"""How each step of the job ledger meets the database: bounded, tried again, its errors told."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

from viralfx.adapters.postgres.cleaning import Lease
from viralfx.adapters.postgres.errors import retry_policy
from viralfx.adapters.postgres.outages import outages
from viralfx.domain.clock import Clock
from viralfx.domain.events import Listener
from viralfx.domain.resilience.retry import Retrier
from viralfx.domain.resilience.retry_decision import RetryEvent

T = TypeVar("T")

_ATTEMPTS = 6
"""In all at most some three seconds of waiting: about what a server needs to restart."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One attempt at a step."""

    connection: Lease
    again: bool
    """Whether the step may have happened already, its answer lost."""


class Steps:
    """Runs steps that may be done again."""

    def __init__(
        self,
        acquire: Callable[[], AbstractAsyncContextManager[Any]],
        *,
        patience: float,
        clock: Clock,
        listener: Listener[RetryEvent],
    ) -> None:
        """``acquire`` takes a connection for a block, of the pool's or another.

        ``patience`` is how long a step may take with all its attempts, in seconds; ``listener`` is
        told of those that failed.
        """
        self._acquire = acquire
        self._patience = patience
        self._retrier = Retrier(
            retry_policy(_ATTEMPTS),
            name="ledger",
            idempotent=True,
            listeners=(listener,),
            clock=clock,
        )

    async def run(self, step: Callable[[Turn], Awaitable[T]]) -> T:
        """Run a step on a connection, again after a transient error.

        Raises :class:`LedgerUnavailableError`, what ``step`` raises itself, and ``BAD_VALUE``.
        """
        begun = False

        async def attempt() -> T:
            nonlocal begun
            async with self._acquire() as connection:
                turn = Turn(connection, again=begun)
                begun = True
                return await step(turn)

        with outages():
            async with asyncio.timeout(self._patience):
                return await self._retrier.execute(attempt)
