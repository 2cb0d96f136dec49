"""The state of the memory ledger beside its jobs: order, limits, unique jobs and schedules.

A list of jobs that each call scans would be simpler. But the ledger runs on the event loop that
answers requests, and keeps up to 10,000 waiting and as many finished jobs: a scan for each claim
and page would delay every request by milliseconds. Hence the sorted lists, and only these.
"""

import math
from bisect import bisect_left, bisect_right, insort
from collections import Counter, defaultdict, deque
from collections.abc import (
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import replace
from datetime import datetime
from heapq import heapify, heappop, heappush, merge
from itertools import takewhile
from operator import itemgetter
from typing import Any, NamedTuple

from viralfx.core.clock import Clock
from viralfx.core.ids import canonical_job_id
from viralfx.jobs.ledger import Accepted, QueueCounts
from viralfx.jobs.limits import Limit
from viralfx.jobs.model import Job, JobDraft, JobState, Unique, correlation_id_of_job
from viralfx.jobs.schedule import Schedule, ScheduledAcceptance, ScheduleState


class JobIndex:
    """Sorted lists of job ids: due times by queue, ids by queue and state, ids by correlation id.

    A change costs a binary search and moves a few KiB of pointers.
    """

    def __init__(self) -> None:
        self._waiting: defaultdict[str, defaultdict[_Group, list[tuple[datetime, str]]]] = (
            defaultdict(lambda: defaultdict(list))
        )
        """Due times and ids of the waiting jobs, for each queue that ever had a job."""
        self.active: Counter[tuple[str, str | None]] = Counter()
        """How many jobs are active, by task and concurrency key."""
        self.counted: Counter[tuple[str, JobState]] = Counter()
        """How many jobs reached a state and did not leave it; pruned jobs still count."""
        self._by_state: defaultdict[tuple[str, JobState], list[str]] = defaultdict(list)
        self._by_correlation: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, job: Job) -> None:
        """Add a job in its state."""
        insort(self._by_state[job.queue, job.state], job.id)
        if job.state is JobState.WAITING:
            insort(self._waiting[job.queue][_group_of(job)], (job.run_at, job.id))
        elif job.state is JobState.ACTIVE:
            self.active[job.task, job.concurrency_key or None] += 1

    def discard(self, job: Job) -> None:
        """Remove a job from its state; it is added again in the next one."""
        _delete(self._by_state[job.queue, job.state], job.id)
        if job.state is JobState.WAITING:
            groups, group = self._waiting[job.queue], _group_of(job)
            _delete(groups[group], (job.run_at, job.id))
            if not groups[group]:
                del groups[group]
        elif job.state is JobState.ACTIVE:
            key = job.task, job.concurrency_key or None
            self.active[key] -= 1
            if not self.active[key]:
                del self.active[key]

    def correlate(self, job: Job) -> None:
        """Add a new job under its correlation id."""
        insort(self._by_correlation[correlation_id_of_job(job)], job.id)

    def remove(self, job: Job) -> None:
        """Remove a job that is deleted."""
        self.discard(job)
        correlation_id = correlation_id_of_job(job)
        _delete(self._by_correlation[correlation_id], job.id)
        if not self._by_correlation[correlation_id]:
            del self._by_correlation[correlation_id]

    @property
    def queues(self) -> Iterable[str]:
        """Each queue that ever had a job."""
        return self._waiting.keys()

    def tasks(self, queue: str) -> Collection[str]:
        """Return the tasks of the waiting jobs of a queue."""
        return dict.fromkeys(group.task for group in self._waiting.get(queue, ()))

    def due(self, queue: str, now: datetime, tasks: Collection[str] | None = None) -> Iterator[str]:
        """Yield the ids of due jobs in the order in which they run; ``tasks`` None selects all."""
        groups = self.groups(queue, tasks)
        for level in sorted({group.level for group in groups}):
            yield from _due([each for group, each in groups.items() if group.level == level], now)

    def groups(
        self, queue: str, tasks: Collection[str] | None = None
    ) -> "Mapping[_Group, list[tuple[datetime, str]]]":
        """Return the due times and ids of the waiting jobs; ``tasks`` None selects all."""
        waiting: Mapping[_Group, list[tuple[datetime, str]]] = self._waiting.get(queue, {})
        return {
            group: each for group, each in waiting.items() if tasks is None or group.task in tasks
        }

    def first_due(self, queue: str, tasks: Collection[str] | None = None) -> datetime | None:
        """Return the time at which the first waiting job is due; None without one."""
        return min((each[0][0] for each in self.groups(queue, tasks).values()), default=None)

    def counts(
        self, queue: str, now: datetime, *, consumers: int, blocked: int, paused: bool
    ) -> QueueCounts:
        """Return the counts of a queue."""
        lists = self._waiting.get(queue, {}).values()
        due = sum(bisect_right(each, now, key=itemgetter(0)) for each in lists)
        oldest = min((each[0][0] for each in lists), default=now)
        return QueueCounts(
            waiting=due,
            scheduled=sum(map(len, lists)) - due,
            active=self.counted[queue, JobState.ACTIVE],
            completed=self.counted[queue, JobState.COMPLETED],
            failed=self.counted[queue, JobState.FAILED],
            cancelled=self.counted[queue, JobState.CANCELLED],
            oldest_due=(now - oldest).total_seconds() if due else 0.0,
            consumers=consumers,
            blocked=blocked,
            paused=paused,
        )

    def newest(
        self, queue: str | None, state: JobState | None, before: str | None
    ) -> Iterator[str]:
        """Yield ids, newest first; None selects all queues or states."""
        lists = [
            _descending(ids, before)
            for (of_queue, in_state), ids in self._by_state.items()
            if queue in {None, of_queue} and state in {None, in_state}
        ]
        return merge(*lists, reverse=True)

    def correlated(self, correlation_id: str, before: str | None) -> Iterator[str]:
        """Yield the ids of a correlation id, newest first."""
        return _descending(self._by_correlation.get(correlation_id, []), before)


_BLOCKED_SECONDS = 1.0
"""Time after which a worker looks again for a place that another worker has freed."""


class TaskLimits:
    """Chooses due jobs within the limits of their tasks."""

    def __init__(self, index: JobIndex, clock: Clock) -> None:
        self._index = index
        self._clock = clock
        self._starts: defaultdict[str, dict[str | None, deque[float]]] = defaultdict(dict)
        """Times of the starts within the period of a rate, by task and key."""
        self._tidy_at: dict[str, float] = {}
        """When the starts of keys that are not used any more are dropped, by task."""
        self._last_keys: dict[str, str] = {}
        """The key of each task that was served last."""

    def choose(
        self,
        queue: str,
        most: int,
        tasks: Collection[str] | None,
        limits: Mapping[str, Limit],
        is_mine: Callable[[str], bool],
    ) -> tuple[list[str], float]:
        """Return the ids of up to ``most`` due jobs, and the seconds until there may be more.

        Records that they start. ``is_mine`` returns True for the id of a job that may be chosen.
        """
        groups, now = self._index.groups(queue, tasks), self._clock.now()
        chosen: list[str] = []
        taken: Counter[tuple[str, str | None]] = Counter()
        again_in = math.inf
        for level in sorted({group.level for group in groups}):
            turns = self._turns(
                {group: each for group, each in groups.items() if group.level == level},
                limits,
                now,
            )
            while turns:
                if len(chosen) >= most:
                    return chosen, again_in
                turn = heappop(turns)
                group, job_id = turn.group, turn.job_id
                blocked = False
                if is_mine(job_id):
                    limit = limits.get(group.task)
                    wait = 0.0 if limit is None else self._start(group, limit, taken)
                    if blocked := wait > 0:
                        again_in = min(again_in, wait)
                    else:
                        chosen.append(job_id)
                # A limit that keeps one job back keeps back the others of its key.
                if turn.advance(drop=blocked):
                    heappush(turns, turn)
        return chosen, again_in

    def _start(
        self, group: "_Group", limit: Limit, taken: Counter[tuple[str, str | None]]
    ) -> float:
        """Record that a job starts; return zero, or the seconds until it may."""
        key = group.key if limit.keyed else None
        if (wait := self._wait(group.task, key, limit, taken[group.task, key])) > 0:
            return wait
        taken[group.task, key] += 1
        if limit.keyed:
            self._last_keys[group.task] = group.key or ""
        if limit.rate is not None:
            starts, now = self._starts[group.task], self._clock.monotonic()
            if now >= self._tidy_at.get(group.task, -math.inf):
                self._tidy_at[group.task] = now + limit.rate.period
                for of_key, times in tuple(starts.items()):
                    if times[-1] <= now - limit.rate.period:
                        del starts[of_key]
            starts.setdefault(key, deque()).append(now)
        return 0.0

    def _wait(self, task: str, key: str | None, limit: Limit, taken: int) -> float:
        """Return the seconds until one more job may start; zero if it may now."""
        if limit.concurrency is not None:
            active = self._index.active
            running = (
                active[task, key]
                if limit.keyed
                else sum(count for (name, _), count in active.items() if name == task)
            )
            if running + taken >= limit.concurrency:
                return _BLOCKED_SECONDS
        if limit.rate is not None and (starts := self._starts[task].get(key)) is not None:
            ended = self._clock.monotonic() - limit.rate.period
            while starts and starts[0] <= ended:
                starts.popleft()
            if len(starts) >= limit.rate.count:
                return starts[0] - ended
            if not starts:
                del self._starts[task][key]
        return 0.0

    def _turns(
        self,
        groups: "Mapping[_Group, list[tuple[datetime, str]]]",
        limits: Mapping[str, Limit],
        now: datetime,
    ) -> "list[_Turn]":
        """Return a heap of the due jobs of one priority: one turn for each task with keys."""
        keyed: defaultdict[str, list[_Group]] = defaultdict(list)
        turns = []
        for group in groups:
            if group.task in limits and limits[group.task].keyed:
                keyed[group.task].append(group)
            else:
                turns.append(_Turn([(group, groups[group])], now))
        for task, of_task in keyed.items():
            last = self._last_keys.get(task, "")
            of_task.sort(key=lambda group: ((group.key or "") <= last, group.key or ""))
            turns.append(_Turn([(group, groups[group]) for group in of_task], now))
        turns = [turn for turn in turns if turn.lines]
        heapify(turns)
        return turns


class _Turn:
    """The due jobs of a task without keys, or those of all keys of a task, one of each in turn.

    Turns are compared by their next jobs, of which the one that has been due for longest is first:
    so a task gets its share of the places beside others.
    """

    __slots__ = ("_now", "lines")

    def __init__(
        self, groups: "Iterable[tuple[_Group, list[tuple[datetime, str]]]]", now: datetime
    ) -> None:
        self._now = now
        self.lines = deque((group, each, 0) for group, each in groups if each[0][0] <= now)
        """Group, due times and ids, and the position of the next one."""

    @property
    def group(self) -> "_Group":
        """The group of the next job."""
        return self.lines[0][0]

    @property
    def job_id(self) -> str:
        """The id of the next job."""
        return self._next[1]

    @property
    def _next(self) -> tuple[datetime, str]:
        _, each, at = self.lines[0]
        return each[at]

    def advance(self, *, drop: bool) -> bool:
        """Go on to the next job, with ``drop`` without this group; return False at the end."""
        group, each, at = self.lines.popleft()
        if not drop and at + 1 < len(each) and each[at + 1][0] <= self._now:
            self.lines.append((group, each, at + 1))
        return bool(self.lines)

    def __lt__(self, other: "_Turn") -> bool:
        return self._next < other._next


class UniqueJobs:
    """The unfinished jobs that keep others with the same task and payload from being accepted."""

    def __init__(self) -> None:
        self._holders: dict[str, str] = {}
        """Ids by unique key."""
        self._keys: dict[str, tuple[str, Unique]] = {}
        """The unique keys by id, and how long they hold."""

    def holder(self, unique_key: str | None) -> str:
        """Return the id of the job that has the key; an empty text without one."""
        return "" if unique_key is None else self._holders.get(unique_key, "")

    def add(self, draft: JobDraft) -> None:
        """Add a job that is accepted now."""
        if draft.unique is not None and draft.unique_key is not None:
            self._holders[draft.unique_key] = draft.id
            self._keys[draft.id] = draft.unique_key, draft.unique

    def claimed(self, job_id: str) -> None:
        """Free the key of a job that is unique while it waits."""
        if (found := self._keys.get(job_id)) is not None and found[1] is Unique.WAITING:
            self.finished(job_id)

    def finished(self, job_id: str) -> None:
        """Free the key of a job."""
        if (found := self._keys.pop(job_id, None)) is not None:
            del self._holders[found[0]]


class Schedules:
    """The methods of :class:`JobLedger` for schedules."""

    def __init__(
        self, clock: Clock, accept: Callable[[Sequence[JobDraft]], Awaitable[Sequence[Accepted]]]
    ) -> None:
        self._clock = clock
        self._accept = accept
        self._states: dict[str, ScheduleState] = {}
        self._seen: dict[str, float] = {}
        """Monotonic times of the last declarations."""
        self.job_ids: set[str] = set()
        """The jobs of schedules that the ledger has."""

    async def declare(
        self, schedules: Sequence[Schedule], forget_after: float
    ) -> Sequence[ScheduleState]:
        """Store the schedules that a worker knows; forget others that are old."""
        now = self._clock.monotonic()
        self._seen |= dict.fromkeys((each.task for each in schedules), now)
        for task in [task for task, seen in self._seen.items() if seen < now - forget_after]:
            if self._states[task].paused_at is None:
                del self._states[task], self._seen[task]
        for each in schedules:
            known, moment = self._states.get(each.task), self._clock.now()
            if known is None:
                self._states[each.task] = ScheduleState(
                    task=each.task,
                    cron=each.cron,
                    timezone=each.timezone,
                    since=moment,
                    last_run_at=None,
                    seen_at=moment,
                )
                continue
            same = (known.cron, known.timezone) == (each.cron, each.timezone)
            self._states[each.task] = replace(
                known,
                cron=each.cron,
                timezone=each.timezone,
                since=known.since if same else moment,
                seen_at=moment,
            )
        return [self._states[each.task] for each in schedules]

    async def accept(self, draft: JobDraft) -> ScheduledAcceptance | None:
        """Accept the job of a schedule, if it is the first one for its time."""
        state, time = self._states.get(draft.task), draft.run_at
        if state is None or time is None:
            return None
        settled = state.settled_until
        if state.paused_at is not None:
            settled = time if settled is None else max(settled, time)
        if settled is not None and settled >= time:
            return ScheduledAcceptance(created=False, handled_until=settled)
        (accepted,) = await self._accept([draft])
        if accepted.created:
            self.job_ids.add(accepted.job.id)
        self._states[draft.task] = replace(state, last_run_at=time)
        return ScheduledAcceptance(created=True, handled_until=time)

    async def pause(self, task: str) -> bool:
        """Skip the times of a schedule."""
        if (state := self._states.get(task)) is not None and state.paused_at is None:
            self._states[task] = replace(state, paused_at=self._clock.now())
        return state is not None

    async def resume(self, task: str) -> bool:
        """End the pause of a schedule."""
        if (state := self._states.get(task)) is not None and state.paused_at is not None:
            self._states[task] = replace(state, paused_at=None, resumed_at=self._clock.now())
        return state is not None

    async def states(self) -> Sequence[ScheduleState]:
        """Return all schedules in the order of their tasks."""
        return [self._states[task] for task in sorted(self._states)]


class _Group(NamedTuple):
    """Waiting jobs that are ordered by due time."""

    level: int
    """The negative priority."""
    task: str
    key: str | None


def _group_of(job: Job) -> _Group:
    return _Group(-job.priority, job.task, job.concurrency_key or None)


def _due(lists: Iterable[list[tuple[datetime, str]]], now: datetime) -> Iterator[str]:
    return (job_id for _, job_id in takewhile(lambda one: one[0] <= now, merge(*lists)))


def _delete(entries: list[Any], entry: object) -> None:
    del entries[bisect_left(entries, entry)]


def _descending(ids: list[str], before: str | None) -> Iterator[str]:
    return (ids[at] for at in range(_position_of(ids, before) - 1, -1, -1))


def _position_of(ids: list[str], job_id: str | None) -> int:
    if job_id is None:
        return len(ids)
    before = canonical_job_id(job_id)
    return 0 if before is None else bisect_left(ids, before)
