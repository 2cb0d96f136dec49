"""Shared context of the parts of a worker: tasks, executions, and the state of the ledger."""

import asyncio
import heapq
import logging
import math
import random
import threading
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from viralfx.core.clock import Clock, default_rng, supervised
from viralfx.core.errors import LedgerUnavailableError, is_a
from viralfx.jobs.codec import Progress
from viralfx.jobs.ledger import JobLedger, PartlyDoneError
from viralfx.jobs.model import Claim
from viralfx.jobs.tasks import HandBackError, Snooze, TaskRegistry
from viralfx.jobs.worker.calls import JobTask
from viralfx.resilience.deadline import Cancellation, Deadline
from viralfx.resilience.policy import Backoff, Jitter

_logger = logging.getLogger("viralfx.jobs")

T = TypeVar("T")

MAX_RETRY_SECONDS = 2.0
"""The longest pause before a failed step is tried again."""

_MAX_DUE_TIMES = 1000
_SAME_MOMENT_SECONDS = 0.1
"""Polls that are no further apart find the same jobs."""

RETRY_BACKOFF = Backoff(base=0.1, factor=2.0, cap=MAX_RETRY_SECONDS, jitter=Jitter.EQUAL)
"""The pauses after consecutive failures of a step."""


class Role(ABC):
    """A part of a worker that runs in an asyncio task of its own."""

    name: str
    """The name of the task."""
    task: asyncio.Task[None] | None = None
    """None before the start."""
    stopping: bool = False
    """True after :meth:`cancel`: the work must end even if a call suppressed its cancellation."""

    def start(self) -> None:
        """Start on the running loop; call it once."""
        self.task = supervised(self.run(), self.name)

    def cancel(self) -> None:
        """Cancel the task, if it was started; it ends in a later turn of the loop."""
        self.stopping = True
        if self.task is not None:
            self.task.cancel()

    @abstractmethod
    async def run(self) -> None:
        """Do the work until cancelled."""


class LedgerAvailability:
    """The availability of the ledger, as all steps of one worker see it."""

    def __init__(
        self, clock: Clock, *, min_outage: float = math.inf, rng: random.Random | None = None
    ) -> None:
        """``min_outage``: shorter outages, in seconds, do not reset :attr:`steady_for`."""
        self._clock = clock
        self._min_outage = min_outage
        self._rng = rng or default_rng()
        self._failing: dict[str, int] = {}
        """Consecutive failures of each step."""
        self._lost_at: float | None = None
        """Start of the outage that was logged last, while it lasts."""
        self._answered_at: float | None = None
        self._steady_since = -math.inf

    @property
    def steady_for(self) -> float:
        """Seconds since the last outage ended; infinite without one, zero during one."""
        now = self._clock.monotonic()
        if self._answered_at is None or now - self._answered_at >= self._min_outage:
            return 0.0
        return now - self._steady_since

    def answered_since(self, moment: float) -> bool:
        """Return True if any step has succeeded since a monotonic time."""
        return self._answered_at is not None and self._answered_at > moment

    def failed(self, step: str, error: Exception) -> float:
        """Record a failed step; return the seconds after which to try it again."""
        times = self._failing.get(step, 0) + 1
        if not isinstance(error, LedgerUnavailableError):
            if times == 1:
                _logger.error("Job ledger refused a step", exc_info=error, extra={"step": step})
        elif self._lost_at is None:
            self._lost_at = self._clock.monotonic()
            reason = str(error)
            _logger.error("Job ledger unavailable", extra={"step": step, "reason": reason})
        self._failing[step] = times
        return RETRY_BACKOFF.delay(times, self._rng)

    def succeeded(self, step: str) -> None:
        """Record a successful step; the outage ends when no step fails any more."""
        now = self._clock.monotonic()
        if self._answered_at is not None and now - self._answered_at >= self._min_outage:
            self._steady_since = now
        self._answered_at = now
        self.skip(step)

    def skip(self, step: str) -> None:
        """Record that a step is not tried for now, so that it does not count as failing."""
        if self._failing.pop(step, 0) and not self._failing and self._lost_at is not None:
            seconds = round(self._clock.monotonic() - self._lost_at, 3)
            self._lost_at = None
            _logger.info("Job ledger available again", extra={"seconds": seconds})

    def remove(self, step: str) -> None:
        """Record that a step is not tried any more."""
        if self._failing.pop(step, 0) and not self._failing:
            # No step is left that could see the end of the outage; the next failure is logged.
            self._lost_at = None

    async def retry_until_done(self, step: str, call: Callable[[], Awaitable[T]]) -> T:
        """Call ``call`` until it is done; errors other than an outage are raised.

        It is not done while the ledger leaves a part of it: that is an answer, and no outage.
        """
        partly_done = 0
        try:
            while True:
                try:
                    result = await call()
                except PartlyDoneError as error:
                    self.succeeded(step)
                    partly_done += 1
                    if partly_done == 1:
                        _logger.warning(
                            "Job ledger did a part of a step: %s", error, extra={"step": step}
                        )
                    await self._clock.sleep(RETRY_BACKOFF.delay(partly_done, self._rng))
                except LedgerUnavailableError as error:
                    await self._clock.sleep(self.failed(step, error))
                else:
                    self.succeeded(step)
                    return result
        finally:
            self.remove(step)


class DueTimes:
    """Monotonic times at which jobs become due, so that a poll is made then; a limited number."""

    def __init__(self) -> None:
        self._times: list[float] = []

    @property
    def first(self) -> float:
        """The first time; infinite without one."""
        return self._times[0] if self._times else math.inf

    def add(self, moment: float) -> bool:
        """Add a time; return False if there are too many already."""
        if len(self._times) >= _MAX_DUE_TIMES:
            return False
        heapq.heappush(self._times, moment)
        return True

    def has(self, moment: float) -> bool:
        """Return True if a poll at one of the times finds a job that is due at ``moment``."""
        return any(0 <= each - moment <= _SAME_MOMENT_SECONDS for each in self._times)

    def drop_until(self, moment: float) -> None:
        """Drop the times that are over at ``moment``."""
        while self.first <= moment:
            heapq.heappop(self._times)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerContext:
    """Shared dependencies of all parts of one worker."""

    worker: str
    """The worker's name in the ledger."""
    tasks: TaskRegistry
    """The tasks that the worker knows; it claims jobs of no others."""
    ledger: JobLedger
    availability: LedgerAvailability
    clock: Clock
    notify: Callable[[str, Sequence[str]], None]
    """Announces due jobs, by queue and ids, to all workers; neither waits nor raises."""
    begun: BegunJobs = field(default_factory=BegunJobs)

    def has_limits(self, queue: str | None) -> bool:
        """Return True if tasks that declare a queue have limits; None: any queue.

        A submission may set another queue for its job.
        """
        return any(queue in (None, self.tasks.find(name).queue) for name in self.tasks.limits)
