"""The audit trail: which caller did what, from where, on what, and with which result.

Each event goes to the listeners at once, such as the log stream ``viralfx.audit``. A task writes it
to the store a moment later. A store that fails costs stored events, which are counted, and neither
an action nor the stop.
"""

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Protocol

from viralfx.core.clock import (
    Clock,
    SystemClock,
    finished_within,
    ignore_error,
    supervised,
    timestamp,
    wait_for,
)
from viralfx.core.correlation import current_correlation_id
from viralfx.core.errors import LedgerUnavailableError, ViralFXError
from viralfx.core.events import Listener, notify
from viralfx.core.ids import new_job_id

_logger = logging.getLogger("viralfx.audit")

MAX_TEXT_CHARACTERS = 500
"""Characters of each text of an event; clients choose some of them."""
MAX_PAGE = 1000
"""Events on a page of a store."""
MAX_WAITING = 1000
"""Events that wait for the store; then further ones are not stored."""
_BATCH = 200
_GATHER_SECONDS = 0.05
"""How long the first event of a batch waits for others."""
_WRITE_SECONDS = 4.0
_RETRY_SECONDS = 5.0
"""The time between two attempts while the store fails."""
_LAST_WRITE_SECONDS = 2.0
"""Time limit of the last write: a database that does not answer must not delay the stop."""
_CANCEL_SECONDS = 0.2
_PRUNE_SECONDS = 3600.0
PRUNED_AT_ONCE = 10_000


class AuditUnavailableError(ViralFXError):
    """The store of the audit trail did not answer in time, or its table is missing or full."""


class Action(StrEnum):
    """The actions of the audit trail."""

    LOG_IN = "session.begin"
    LOG_OUT = "session.end"
    ACCESS = "access"
    """A request with a wrong token, or a change without a token; its outcome is ``refused``."""
    STOP = "process.stop"
    CHECK = "checks.run"
    LEVEL = "logger.level"
    DOCTOR = "doctor.run"
    SUBMIT = "job.submit"
    """A job of ``viralfx jobs submit``; clients of the API leave none."""
    RETRY = "job.retry"
    CANCEL = "job.cancel"
    RUN = "job.run"
    RETRY_ALL = "jobs.retry"
    CANCEL_ALL = "jobs.cancel"
    PAUSE_QUEUE = "queue.pause"
    RESUME_QUEUE = "queue.resume"
    PAUSE_SCHEDULE = "schedule.pause"
    RESUME_SCHEDULE = "schedule.resume"
    RUN_SCHEDULE = "schedule.run"
    OPEN_CIRCUIT = "circuit.open"
    CLOSE_CIRCUIT = "circuit.close"


class AuditOutcome(StrEnum):
    """The result of an action."""

    DONE = "done"
    REFUSED = "refused"
    """The caller may not do it, or the state does not allow it; it had no effect."""
    FAILED = "failed"
    """An error ended it; it may have had an effect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEvent:
    """One action of a caller, or its refusal."""

    id: str
    """Unique; events of one process sort by it."""
    at: datetime
    actor: str
    """The name of the token, the session or the user of the system."""
    address: str | None
    """The address of the client; None for a Unix socket and for a command."""
    action: str
    """An :class:`Action`."""
    target: str
    outcome: str
    """An :class:`AuditOutcome`."""
    before: str | None = None
    after: str | None = None
    detail: str | None = None
    correlation_id: str | None = None
    instance: str = ""
    """The process that recorded it."""


@dataclass(slots=True, kw_only=True)
class AuditEntry:
    """An event in the making: the action may add to it until it ends."""

    action: Action
    actor: str
    address: str | None = None
    target: str = ""
    before: str | None = None
    after: str | None = None
    detail: str | None = None
    outcome: AuditOutcome = AuditOutcome.DONE


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditFilter:
    """The events to read; a field that is None matches all."""

    since: datetime | None = None
    until: datetime | None = None
    actor: str | None = None
    action: str | None = None
    outcome: str | None = None


ANY_EVENT = AuditFilter()


class AuditStore(Protocol):
    """Port: keeps the events.

    Each method raises :class:`AuditUnavailableError` if the store does not answer in time.
    Cancelling a call leaves the store consistent.
    """

    kept: str
    """Where: ``postgres``, or ``memory`` for a store that knows this process only."""

    async def write(self, events: Sequence[AuditEvent]) -> None:
        """Add events, all or none. One that is stored already is skipped."""
        ...

    async def read(
        self, wanted: AuditFilter = ANY_EVENT, *, before: str | None = None, limit: int = 100
    ) -> Sequence[AuditEvent]:
        """Return at most ``limit`` events, the latest first.

        ``before`` is the :attr:`AuditEvent.id` of the last event of the page before.
        """
        ...

    async def prune(self, older_than: float, limit: int = PRUNED_AT_ONCE) -> int:
        """Delete up to ``limit`` events that are older than some seconds; return how many."""
        ...


class AuditTrail:
    """Records events: for listeners at once, and for the store in batches.

    :meth:`record` never raises and never waits.
    """

    def __init__(
        self,
        store: AuditStore | None = None,
        *,
        clock: Clock | None = None,
        instance: str = "",
        retention: float = 0.0,
    ) -> None:
        """``retention`` is in seconds, 0: events stay. Without a store they are not stored."""
        self._store = store
        self._clock = clock or SystemClock()
        self._instance = instance
        self._retention = retention
        self._listeners: tuple[Listener[AuditEvent], ...] = ()
        self._waiting: deque[AuditEvent] = deque()
        self._wake = asyncio.Event()
        self._writing = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._failing = False
        self._next_prune = self._clock.monotonic()
        self.lost = 0
        """How many events were not stored."""

    @property
    def store(self) -> AuditStore | None:
        """The store, for readers; None if nothing is stored."""
        return self._store

    @property
    def waiting(self) -> int:
        """How many events wait for the store."""
        return len(self._waiting)

    def subscribe(self, listener: Listener[AuditEvent]) -> None:
        """Call ``listener`` with every further event."""
        self._listeners = (*self._listeners, listener)

    def record(self, entry: AuditEntry) -> None:
        """Record an action of now, from any thread."""
        event = AuditEvent(
            id=new_job_id(),
            at=self._clock.now(),
            actor=_cut(entry.actor) or "",
            address=_cut(entry.address),
            action=str(entry.action),
            target=_cut(entry.target) or "",
            outcome=str(entry.outcome),
            before=_cut(entry.before),
            after=_cut(entry.after),
            detail=_cut(entry.detail),
            correlation_id=current_correlation_id(),
            instance=self._instance,
        )
        notify(self._listeners, event)
        if self._store is None:
            return
        if self._closed or len(self._waiting) >= MAX_WAITING:
            self.lost += 1
            return
        self._waiting.append(event)
        if (loop := self._loop) is not None:
            try:
                loop.call_soon_threadsafe(self._wake.set)
            except RuntimeError:  # the loop is closed, so no task writes the events
                self.lost += len(self._waiting)
                self._waiting.clear()

    @contextmanager
    def recorded(
        self, action: Action, *, actor: str, address: str | None = None, target: str = ""
    ) -> Iterator[AuditEntry]:
        """Record an action when its block ends, whose error decides the outcome.

        The block may add to the entry. An error of this package means that the action was refused,
        unless a store does not answer.
        """
        entry = AuditEntry(action=action, actor=actor, address=address, target=target)
        try:
            yield entry
        except BaseException as error:
            refused = isinstance(error, ViralFXError) and not isinstance(
                error, LedgerUnavailableError
            )
            entry.outcome = AuditOutcome.REFUSED if refused else AuditOutcome.FAILED
            # Errors of this package have texts for people; those of others may hold values.
            text = f": {error}" if isinstance(error, ViralFXError) else ""
            entry.detail = f"{type(error).__name__}{text}"
            raise
        finally:
            self.record(entry)

    # -- the writer --------------------------------------------------------------------------

    async def open(self) -> None:
        """Begin to write, on the running loop. A second call does nothing."""
        if self._store is not None and self._task is None and not self._closed:
            self._loop = asyncio.get_running_loop()
            self._task = supervised(self._run(self._store), "audit")

    def stop(self) -> None:
        """Write no more; later events reach the listeners alone."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()

    async def close(self, budget: float) -> None:
        """Write the events that wait, within ``budget``; never raises. Later ones are lost."""
        self.stop()
        if self._store is not None and self._task is not None and self._waiting:
            last = asyncio.ensure_future(self._write_all(self._store))
            last.add_done_callback(ignore_error)
            if not await finished_within(last, min(budget, _LAST_WRITE_SECONDS), self._clock):
                last.cancel()
                await finished_within(last, _CANCEL_SECONDS, self._clock)
        self.lost += len(self._waiting)
        self._waiting.clear()
        if self.lost:
            # The metric of this process ends with it, mostly before it is scraped again.
            _logger.warning("Audit trail ends without some events", extra={"lost": self.lost})

    async def _write_all(self, store: AuditStore) -> None:
        while self._waiting and await self._write(store):
            pass

    async def _run(self, store: AuditStore) -> None:
        while not self._closed:
            self._wake.clear()
            if not self._waiting:
                await wait_for(self._wake, _PRUNE_SECONDS, self._clock)
            await self._clock.sleep(_GATHER_SECONDS)
            if not await self._write(store):
                await self._clock.sleep(_RETRY_SECONDS)
            elif self._retention and self._clock.monotonic() >= self._next_prune:
                await self._prune(store)

    async def _write(self, store: AuditStore) -> bool:
        """Write a batch; return False if the store fails."""
        async with self._writing:
            batch = tuple(self._waiting)[:_BATCH]
            if not batch:
                return True
            if not await self._succeeds(store.write(batch)):
                return False
            for _ in batch:
                self._waiting.popleft()
            if self._failing:
                self._failing = False
                _logger.warning("Audit trail is stored again", extra={"lost": self.lost})
            return True

    async def _succeeds(self, call: Coroutine[Any, Any, object]) -> bool:
        """Return True if a call of the store ends in time and without an error."""
        task = asyncio.ensure_future(call)
        try:
            if await finished_within(task, _WRITE_SECONDS, self._clock):
                task.result()
                return True
            problem = "the store does not answer in time"
        except AuditUnavailableError as error:
            problem = str(error)
        except Exception as error:  # noqa: BLE001 - a store must not end the writer
            problem = type(error).__name__
        finally:
            task.cancel()
            task.add_done_callback(ignore_error)
        if not self._failing:
            self._failing = True
            _logger.warning("Audit trail is not stored", extra={"detail": problem})
        return False

    async def _prune(self, store: AuditStore) -> None:
        self._next_prune = self._clock.monotonic() + _PRUNE_SECONDS
        deleted: list[int] = []

        async def prune() -> None:
            deleted.append(await store.prune(self._retention))

        # In steps, so that each is short; until none is left, or the table of busy clients grows.
        while await self._succeeds(prune()) and deleted[-1] >= PRUNED_AT_ONCE:
            if self._waiting:  # they come first
                self._next_prune = self._clock.monotonic()
                return


def _cut(text: str | None) -> str | None:
    if text is None or len(text) <= MAX_TEXT_CHARACTERS:
        return text
    return f"{text[: MAX_TEXT_CHARACTERS - 1]}…"


def event_fields(event: AuditEvent) -> dict[str, str | None]:
    """Return an event as JSON has it."""
    return {
        "id": event.id,
        "at": timestamp(event.at),
        "actor": event.actor,
        "address": event.address,
        "action": event.action,
        "target": event.target,
        "outcome": event.outcome,
        "before": event.before,
        "after": event.after,
        "detail": event.detail,
        "correlationId": event.correlation_id,
        "instance": event.instance,
    }


def jobs_in_words(count: int, *, more: bool = False) -> str:
    """Return the number of changed jobs, as the detail of an event."""
    return f"{count} job{'s' * (count != 1)}{', and more match' if more else ''}"


# -- refusals ------------------------------------------------------------------------------------

_REFUSAL_SECONDS = 60.0
_MAX_SOURCES = 1000
_MAX_REFUSALS = 60
"""Refusals of all sources that are recorded in a minute."""


@dataclass(slots=True)
class _Refused:
    until: float
    others: int = 0


@dataclass(slots=True)
class RefusalLimit:
    """Chooses the refused requests that become events: a client may send thousands a second.

    Of each source, such as an address, one a minute is recorded, and of all together sixty.
    """

    monotonic: Callable[[], float]
    _sources: "OrderedDict[Hashable, _Refused]" = field(default_factory=OrderedDict)
    _minute: float = -_REFUSAL_SECONDS
    _recorded: int = 0

    def others(self, source: Hashable) -> int | None:
        """Return how many refusals of a source were not recorded since the last one that was.

        None: this one is not recorded either.
        """
        now = self.monotonic()
        if now - self._minute >= _REFUSAL_SECONDS:
            self._minute, self._recorded = now, 0
        known = self._sources.get(source)
        if known is None:
            if len(self._sources) >= _MAX_SOURCES:
                self._sources.popitem(last=False)
            known = self._sources[source] = _Refused(now)
        if now < known.until or self._recorded >= _MAX_REFUSALS:
            known.others += 1
            return None
        self._recorded += 1
        known.until, others, known.others = now + _REFUSAL_SECONDS, known.others, 0
        self._sources.move_to_end(source)
        return others
