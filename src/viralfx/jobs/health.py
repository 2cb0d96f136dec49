"""The health check of the queues: their counts, and warnings about overdue jobs."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from viralfx.core.errors import LedgerUnavailableError, NotMigratedError
from viralfx.domain.health.model import Observation, Status
from viralfx.jobs.ledger import MAX_UNRUNNABLE, Counts, QueueCounts, UnrunnableJobs
from viralfx.jobs.model import PAYLOAD

_NO_CONSUMERS_SECONDS = 5.0
"""Seconds that a job must be overdue before a queue warns because no worker can run it."""

Unrunnable = Callable[[], Awaitable[Sequence[UnrunnableJobs]]]
"""Counts the due jobs that no worker can run, as :meth:`JobLedger.unrunnable` does."""


async def _none() -> Sequence[UnrunnableJobs]:
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BacklogCheck:
    """Warns about overdue jobs, also if no worker can run them, and about outcomes not recorded.

    ``counts`` returns the counts of all queues. A queue warns if a job has been due for longer than
    ``warn_after`` seconds; zero turns that warning off. ``remark`` is added to the message.
    It names the workers that are missing or blocked, and the tasks that no worker can run.
    ``unrunnable`` is called only while jobs are overdue: it costs a query of its own.
    ``unrecorded`` returns how many outcomes this process has had for longer than a lease, by queue.
    A paused queue does not warn about jobs that wait.
    """

    counts: Counts
    warn_after: float = 60.0
    remark: str = ""
    unrunnable: Unrunnable = _none
    unrecorded: Callable[[], Mapping[str, int]] = dict

    async def check(self) -> Observation:
        """Count the jobs of all queues. ``oldestDue`` in the details is in seconds."""
        unrecorded = self.unrecorded()
        try:
            counts = await self.counts()
            running = (each for each in counts.values() if not each.paused)
            late = any(each.oldest_due > _NO_CONSUMERS_SECONDS for each in running)
            unrunnable = await self.unrunnable() if late else ()
        except LedgerUnavailableError as error:
            code = "not_migrated" if isinstance(error, NotMigratedError) else "unavailable"
            message = "The job ledger does not answer"
            return Observation(status=Status.FAIL, message=message, code=code, error=error)
        found = {
            name: _unrecorded(unrecorded.get(name, 0))
            or self._problem_of(counts[name], [each for each in unrunnable if each.queue == name])
            for name in counts
        }
        details = [_describe(name, counts[name], ok=not found[name]) for name in counts]
        problems = [(name, *problem) for name, problem in found.items() if problem is not None]
        paused = [name for name, queue in counts.items() if queue.paused]
        remark = f"; paused: {', '.join(paused)}{self.remark}" if paused else self.remark
        if not problems:
            message = "All queues are healthy" + remark
            return Observation(status=Status.PASS, message=message, details=details)
        texts = [f"{name}: {text}" for name, _, text in problems]
        return Observation(
            status=Status.WARN,
            message="; ".join(texts) + remark,
            details=details,
            code=problems[0][1],
        )

    def _problem_of(
        self, queue: QueueCounts, unrunnable: Sequence[UnrunnableJobs]
    ) -> tuple[str, str] | None:
        """Return the code and text of a queue's problem; None if it has none."""
        # The jobs of a paused queue wait because an operator wants it.
        late = 0.0 if queue.paused else queue.oldest_due
        if queue.waiting and not queue.consumers and late > _NO_CONSUMERS_SECONDS:
            return "no_consumers", f"{queue.waiting} jobs wait and no worker consumes the queue"
        if unrunnable and late > _NO_CONSUMERS_SECONDS:
            return unrunnable[0].code, "; ".join(map(_text_of, unrunnable))
        if queue.blocked:
            workers = "worker" if queue.consumers == 1 else "workers"
            text = f"the event loop of {queue.blocked} of {queue.consumers} {workers} is blocked"
            return "blocked", f"{text}: the log names the job"
        if 0 < self.warn_after < late:
            return "backlog", f"{queue.waiting} jobs wait, one for {late:.0f} s"
        return None


def _text_of(jobs: UnrunnableJobs) -> str:
    count, undecodable = jobs.number, jobs.code == PAYLOAD
    if count == 1:
        why = "can decode its payload" if undecodable else "knows it"
        return f"1 job of task {jobs.task} waits and no worker {why}"
    number = f"at least {count}" if count >= MAX_UNRUNNABLE else str(count)
    why = "can decode their payloads" if undecodable else "knows it"
    return f"{number} jobs of task {jobs.task} wait and no worker {why}"


def _unrecorded(count: int) -> tuple[str, str] | None:
    if not count:
        return None
    text = "1 outcome is" if count == 1 else f"{count} outcomes are"
    return "unrecorded", f"{text} not recorded for longer than a lease: the log has the jobs"


def _describe(name: str, queue: QueueCounts, *, ok: bool) -> dict[str, object]:
    return {
        "name": name,
        "status": "ok" if ok else "warn",
        **({"paused": True} if queue.paused else {}),
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
