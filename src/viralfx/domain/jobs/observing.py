"""What others see of jobs: each acceptance and each execution, surrounded by who watches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Protocol

from viralfx.domain.jobs.job import Claim, JobDraft, Settlement
from viralfx.domain.jobs.ledger import Accepted

Ended = Callable[[Settlement | None], object]
"""Is told what becomes of the job; None: the ledger has it already, with the task's effect."""


class JobObserver(Protocol):
    """Port: surrounds what is done with jobs, in the task that does it, to measure and trace it.

    It must neither block nor raise.
    """

    def accepting(self, draft: JobDraft) -> AbstractContextManager[JobDraft]:
        """Surround an acceptance; gives the draft to accept, which may belong to another trace."""
        ...

    def storing(self, drafts: Sequence[JobDraft]) -> AbstractContextManager[None]:
        """Surround the ledger's step that accepts several jobs at once, in a task of its own."""
        ...

    def accepted(self, accepted: Accepted) -> None:
        """Learn, after an acceptance, which job it gave: under its key there may be another."""
        ...

    def executing(self, claim: Claim) -> AbstractContextManager[Ended]:
        """Surround an execution, from before its payload is decoded until its outcome is known."""
        ...


class Unobserved:
    """Nobody watches."""

    def accepting(self, draft: JobDraft) -> AbstractContextManager[JobDraft]:
        """Surround nothing."""
        return nullcontext(draft)

    def storing(self, drafts: Sequence[JobDraft]) -> AbstractContextManager[None]:  # noqa: ARG002 - the port's
        """Surround nothing."""
        return nullcontext()

    def accepted(self, accepted: Accepted) -> None:
        """Do nothing about it."""

    def executing(self, claim: Claim) -> AbstractContextManager[Ended]:  # noqa: ARG002 - the port's
        """Surround nothing."""
        return _NOTHING


class Observers:
    """Several who watch: the first one around all others."""

    def __init__(self, *observers: JobObserver) -> None:
        self._observers = observers

    @contextmanager
    def accepting(self, draft: JobDraft) -> Iterator[JobDraft]:
        """Give each the draft of the one around it."""
        with ExitStack() as stack:
            for observer in self._observers:
                draft = stack.enter_context(observer.accepting(draft))
            yield draft

    @contextmanager
    def storing(self, drafts: Sequence[JobDraft]) -> Iterator[None]:
        """Surround a step by each."""
        with ExitStack() as stack:
            for observer in self._observers:
                stack.enter_context(observer.storing(drafts))
            yield

    def accepted(self, accepted: Accepted) -> None:
        """Tell each."""
        for observer in self._observers:
            observer.accepted(accepted)

    @contextmanager
    def executing(self, claim: Claim) -> Iterator[Ended]:
        """Surround an execution by each, and tell each of its outcome."""
        with ExitStack() as stack:
            told = [stack.enter_context(each.executing(claim)) for each in self._observers]

            def tell(settlement: Settlement | None) -> None:
                for ended in told:
                    ended(settlement)

            yield tell


def _ignore(settlement: Settlement | None) -> None:
    """Do nothing about it."""


_NOTHING = nullcontext(_ignore)
