"""The queues as a health check: their counts, and whether jobs wait for too long."""

from dataclasses import dataclass

from viralfx.domain.health import Observation, Status
from viralfx.domain.jobs.job import LedgerUnavailableError, NotMigratedError
from viralfx.domain.jobs.ledger import Counts, QueueCounts

_UNATTENDED = 5.0
"""Seconds that a due job may wait before it matters that nobody consumes its queue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BacklogCheck:
    """Warns of jobs that have been due for too long, and of those that nobody will run.

    ``counts`` returns how all queues stand. ``warn_after`` is how many seconds a job may be due
    before its queue warns; zero: any number. ``remark`` is added to the message.
    """

    counts: Counts
    warn_after: float = 60.0
    remark: str = ""

    async def check(self) -> Observation:
        """Count once. ``oldestDue`` is in seconds."""
        try:
            counts = await self.counts()
        except LedgerUnavailableError as error:
            code = "not_migrated" if isinstance(error, NotMigratedError) else "unavailable"
            message = "The job ledger does not answer"
            return Observation(status=Status.FAIL, message=message, code=code, error=error)
        wrong = {name: self._what_is_wrong_with(counts[name]) for name in counts}
        details = [_describe(name, counts[name], ok=not wrong[name]) for name in counts]
        problems = [(name, *problem) for name, problem in wrong.items() if problem is not None]
        if not problems:
            message = "All queues are healthy" + self.remark
            return Observation(status=Status.PASS, message=message, details=details)
        texts = [f"{name}: {text}" for name, _, text in problems]
        return Observation(
            status=Status.WARN,
            message="; ".join(texts) + self.remark,
            details=details,
            code=problems[0][1],
        )

    def _what_is_wrong_with(self, queue: QueueCounts) -> tuple[str, str] | None:
        """Return a code and a text; None when nothing is."""
        late = queue.oldest_due
        if queue.waiting and not queue.consumers and late > _UNATTENDED:
            return "no_consumers", f"{queue.waiting} jobs wait and no worker consumes the queue"
        if 0 < self.warn_after < late:
            return "backlog", f"{queue.waiting} jobs wait, one for {late:.0f} s"
        return None


def _describe(name: str, queue: QueueCounts, *, ok: bool) -> dict[str, object]:
    return {
        "name": name,
        "status": "ok" if ok else "warn",
        "metrics": {
            "waiting": queue.waiting,
            "active": queue.active,
            "completed": queue.completed,
            "failed": queue.failed,
            "scheduled": queue.scheduled,
            "cancelled": queue.cancelled,
            "oldestDue": round(queue.oldest_due, 3),
            "consumers": queue.consumers,
        },
    }
