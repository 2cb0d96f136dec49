"""Lines at debug of each job that goes well: from a correlation id to the job, and back."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from time import perf_counter
from types import TracebackType

from viralfx.domain.jobs.job import (
    Claim,
    JobDraft,
    JobState,
    Settlement,
    conversation_of,
)
from viralfx.domain.jobs.ledger import Accepted
from viralfx.domain.jobs.observing import Ended, JobObserver
from viralfx.domain.jobs.reporting import names_of

_logger = logging.getLogger("viralfx.jobs")
_wanted = partial(_logger.isEnabledFor, logging.DEBUG)


class JobLog:
    """Logs what another observer surrounds, inside of it; a :class:`JobObserver`.

    While the level is off it is not there: a job is surrounded by the other one alone. What goes
    wrong with a job is told elsewhere, whatever this level is.
    """

    def __init__(self, observer: JobObserver) -> None:
        self._observer = observer

    def accepting(self, draft: JobDraft) -> AbstractContextManager[JobDraft]:
        """Surround an acceptance by the other one."""
        return self._observer.accepting(draft)

    def storing(self, drafts: Sequence[JobDraft]) -> AbstractContextManager[None]:
        """Surround a step by the other one."""
        return self._observer.storing(drafts)

    def accepted(self, accepted: Accepted) -> None:
        """Log an acceptance; one that gave an earlier job has the id of who asks again."""
        self._observer.accepted(accepted)
        if not _wanted():
            return
        job = accepted.job
        names = {"job": job.id, "task": job.task, "queue": job.queue}
        if accepted.created:
            conversation = {"correlationId": conversation_of(job)}
            _logger.debug("Job accepted", extra={**names, **conversation})
        else:
            _logger.debug("Job accepted before", extra=names)

    def executing(self, claim: Claim) -> AbstractContextManager[Ended]:
        """Log when an execution begins, and how it ends."""
        within = self._observer.executing(claim)
        return _Execution(within, claim) if _wanted() else within


class _Execution:
    __slots__ = ("_began", "_claim", "_tell", "_within")

    def __init__(self, within: AbstractContextManager[Ended], claim: Claim) -> None:
        self._within = within
        self._claim = claim

    def __enter__(self) -> Ended:
        self._tell = self._within.__enter__()
        _logger.debug("Job started", extra=names_of(self._claim))
        self._began = perf_counter()
        return self._ended

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return self._within.__exit__(kind, error, traceback)

    def _ended(self, settlement: Settlement | None) -> None:
        milliseconds = round((perf_counter() - self._began) * 1000, 3)
        self._tell(settlement)
        if message := _message(settlement):
            _logger.debug(message, extra={**names_of(self._claim), "duration": milliseconds})


def _message(settlement: Settlement | None) -> str | None:
    """Return what is said of an outcome; None for the failures, which have lines of their own."""
    if settlement is None or settlement.state is JobState.COMPLETED:
        return "Job completed"
    if settlement.state is JobState.FAILED or settlement.spends_attempt:
        return None
    return "Job handed back" if settlement.error is None else "Job postponed"
