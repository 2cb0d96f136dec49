"""What others see of jobs: each acceptance and each execution, surrounded by who watches."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from viralfx.domain.jobs.job import Claim, JobDraft, Settlement

Ended = Callable[[Settlement | None], object]
"""Is told what becomes of the job; None: the ledger has it already, with the task's effect."""


class JobObserver(Protocol):
    """Port: surrounds what is done with jobs, in the task that does it, to measure and trace it.

    It must neither block nor raise.
    """

    def accepting(self, draft: JobDraft) -> AbstractContextManager[JobDraft]:
        """Surround an acceptance; gives the draft to accept, which may belong to another trace."""
        ...

    def executing(self, claim: Claim) -> AbstractContextManager[Ended]:
        """Surround an execution, from before its payload is decoded until its outcome is known."""
        ...


class Unobserved:
    """Nobody watches."""

    def accepting(self, draft: JobDraft) -> AbstractContextManager[JobDraft]:
        """Surround nothing."""
        return nullcontext(draft)

    def executing(self, claim: Claim) -> AbstractContextManager[Ended]:  # noqa: ARG002 - the port's
        """Surround nothing."""
        return _NOTHING


def _ignore(settlement: Settlement | None) -> None:
    """Do nothing about it."""


_NOTHING = nullcontext(_ignore)
