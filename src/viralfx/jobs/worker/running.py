"""The claimed jobs of a worker: their executions, and those that have begun."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

from viralfx.core.errors import is_a
from viralfx.jobs.codec import Progress
from viralfx.jobs.model import Claim
from viralfx.jobs.tasks import HandBackError, Snooze
from viralfx.jobs.worker.calls import JobTask
from viralfx.resilience.deadline import Cancellation, Deadline


class Execution:
    """The execution of a claim; the worker can have it handed back or abandon it."""

    __slots__ = (
        "abandoned",
        "after_commit",
        "begun",
        "cancelled",
        "cancelling",
        "claim",
        "deadline",
        "handing_back",
        "late",
        "progress",
        "raised",
        "recording",
        "releases",
        "stored_progress",
        "task",
    )

    def __init__(self, claim: Claim, releases: int = 0) -> None:
        self.claim = claim
        self.releases = releases
        """How often the worker had released jobs before it requested the claim."""
        self.deadline: Deadline | None = None
        """The deadline of the task; None before it starts."""
        self.cancelled: Cancellation | None = None
        """Tells the task to end, if it is one that asks; None before it starts."""
        self.task: JobTask[Any] | None = None
        """The asyncio task."""
        self.raised: BaseException | None = None
        """The exception of the task, or of encoding its result."""
        self.recording = False
        """The task has returned, and the outcome is being recorded."""
        self.late = False
        """The task was still running after its deadline at the last check."""
        self.begun = False
        """The asyncio task has taken its first step, so that a cancellation reaches it."""
        self.handing_back = False
        self.cancelling = False
        """The cancellation of the job was requested, and the task was cancelled."""
        self.progress: Progress | None = None
        """The last report of the task; a thread may set it."""
        self.stored_progress: Progress | None = None
        """The last report that the worker sent to the ledger while the task ran."""
        self.after_commit: list[Callable[[], None]] = []
        """Called once the transaction of a transactional task is committed."""
        self.abandoned = False
        """The worker no longer waits for it and drops its outcome."""

    def is_late(self) -> bool:
        """Return True if the task still runs although its timeout has cancelled it."""
        if self.deadline is None or self.recording:
            return False
        return not self.deadline.remaining()

    def hand_back(self) -> None:
        """Cancel the task, if it is still running, so that the job is handed back."""
        if not self.recording:
            self.handing_back = True
            self.cancel()

    def request_cancel(self) -> None:
        """Cancel the task because that was requested, unless its outcome is being recorded."""
        if self.begun and not self.recording and not self.cancelling:
            self.cancelling = True
            self.cancel()

    def report(self, progress: Progress) -> None:
        """Receive a report of the task, in any thread."""
        self.progress = progress

    def last_progress(self) -> bytes | None:
        """Return the last report as JSON; None without one."""
        return None if self.progress is None else self.progress.encode()

    def begin_own_code(self) -> None:
        """Mark what follows in this context as code of the task."""
        if self.task is not None:
            self.task.begin_own_code()

    def end_own_code(self) -> None:
        """Mark the end of that code: from here on its outcome is recorded."""
        self.recording = True
        if self.task is not None:
            self.task.end_own_code()

    @property
    def cancelled_itself(self) -> bool:
        """True if code of the task has cancelled the asyncio task, and nothing else has."""
        by_worker = self.handing_back or self.cancelling or self.abandoned
        return self.task is not None and self.task.cancelled_itself and not by_worker

    @property
    def delayed_itself(self) -> bool:
        """True if the task has asked that its job is due again, or handed back."""
        return is_a(self.raised, Snooze) or is_a(self.raised, HandBackError)

    def cancel(self) -> None:
        """Cancel the asyncio task."""
        if self.cancelled is not None:
            self.cancelled.set()
        if self.task is not None:
            self.task.cancel_by_worker()


class BegunJobs:
    """The jobs of a worker whose tasks have begun, shared by its event loop and its lease thread.

    While the loop is blocked, the thread releases all other jobs of the worker in the ledger. A job
    whose claim was requested before a release does not begin after it. So a job is in the list of
    a release, or its task does not run here.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids: dict[Execution, str] = {}
        self.releases = 0
        """How many releases there were. A claim keeps the number from before its request."""

    def begin(self, execution: Execution) -> bool:
        """Record that the task of an execution begins; return False if its job was released."""
        with self._lock:
            if self.is_released(execution):
                return False
            self._ids[execution] = execution.claim.id
            return True

    def is_released(self, execution: Execution) -> bool:
        """Return True if its task had not begun at a release; call it on the event loop."""
        return execution.releases != self.releases and execution not in self._ids

    def replace(self, execution: Execution, by: Execution) -> None:
        """Let another execution of the same job stand for one whose task has begun."""
        with self._lock:
            if (job_id := self._ids.pop(execution, None)) is not None:
                self._ids[by] = job_id

    def end(self, execution: Execution) -> None:
        """Record that nothing of an execution is left to do."""
        with self._lock:
            self._ids.pop(execution, None)

    def release(self) -> Sequence[str]:
        """Return the ids of the jobs to keep; none of the others begins from now on."""
        with self._lock:
            self.releases += 1
            return tuple(self._ids.values())
