"""The data of the console's views: answers to GET below ``ui/data/``."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Generic, NamedTuple, TypeVar
from urllib.parse import parse_qsl

import msgspec
from msgspec import Meta

from viralfx.bootstrap import JobRuntime
from viralfx.bootstrap.doctor import ConfigurationSource
from viralfx.core.clock import Clock, ignore_error, timestamp
from viralfx.core.correlation import current_correlation_id
from viralfx.core.errors import LedgerUnavailableError
from viralfx.core.ids import canonical_job_id
from viralfx.domain.audit import Action, AuditFilter, AuditUnavailableError, event_fields
from viralfx.domain.cache import SingleFlight
from viralfx.domain.doctor import Finding, diagnose
from viralfx.domain.fleet import (
    BEAT_SECONDS,
    SILENT_AFTER_SECONDS,
    CheckChange,
    FleetStore,
    FleetUnavailableError,
    histories,
    predecessors,
)
from viralfx.domain.operations import Operations
from viralfx.jobs.ledger import QueueCounts
from viralfx.jobs.model import Job, JobFilter, JobNotFoundError, UnknownQueueError
from viralfx.server.interface import RawResponse
from viralfx.server.problems import problem
from viralfx.settings import Settings
from viralfx.telemetry.logging.lines import LEVELS, LoggerLevels
from viralfx.web.console import views
from viralfx.web.console.feed import Feed
from viralfx.web.responses import encode, json_response, problem_response, raw_response
from viralfx.web.sessions import Reads

T = TypeVar("T")

_logger = logging.getLogger("viralfx.console")

ALL_JOBS = "all"
"""In place of an id: all jobs that match a filter."""
MAX_COUNTED = 10_000
"""Matching jobs that are counted; a change of more of them is guarded by "at least"."""
_PAGE_JOBS = 100
_MAX_LIMIT = 200
_CALL_SECONDS = 5.0
"""Time limit of a view: the page shows that the ledger does not answer."""
_READS_AT_ONCE = 2
"""Reads of changes at once: HEALTH_DETAILS may open them to all, and the pool is for requests."""
_SEARCH_SECONDS = 10.0
"""Time limit of the search for the jobs of an action."""
_DOCTOR_SECONDS, _DOCTOR_LIMIT = 60.0, 8.0

ShowPayload = Callable[[str, bytes], str | None]
"""Returns the text of a payload or result that readers may see, from the name of the task and JSON;
None hides it."""


def coded(status: int, code: str, detail: str, errors: list[Any] | None = None) -> RawResponse:
    """Return a problem with a code for the page."""
    body = problem(
        status,
        detail=detail,
        correlation_id=current_correlation_id(),
        code=code,
        errors=errors,
    )
    return raw_response(b"application/problem+json", status, encode(body))


NO_ANSWER = "ledger"
"""The code of a response if the database does not answer."""


def reason_of(error: Exception) -> str:
    """Return the sentence of an error of the database."""
    detail = str(error) or "the database does not answer in time"
    return detail[:1].upper() + detail[1:]


async def within(seconds: float, call: Coroutine[Any, Any, T]) -> T:
    """Return the result of a call; raise ``TimeoutError`` if it takes longer.

    The call is not cancelled, since the stores have time limits of their own.
    """
    task = asyncio.ensure_future(call)
    task.add_done_callback(ignore_error)
    if not (await asyncio.wait({task}, timeout=seconds))[0]:
        raise TimeoutError
    return task.result()


class Shared(Generic[T]):
    """A value that all pages share for a second, so that their number does not reach the database.

    Concurrent callers share one call; an error is shared as well.
    """

    def __init__(
        self, clock: Clock, load: Callable[[], Awaitable[T]], seconds: float = 1.0
    ) -> None:
        self._clock = clock
        self._load = load
        self._seconds = seconds
        self._flight = SingleFlight[T]()
        self._value: tuple[float, T] | None = None

    def forget(self) -> None:
        """Load the value at the next call: it has changed, also during a load in progress."""
        self._flight, self._value = SingleFlight[T](), None

    async def get(self) -> T:
        """Return the value, which is at most ``seconds`` old."""
        now = self._clock.monotonic()
        if self._value is not None and now - self._value[0] < self._seconds:
            return self._value[1]
        return await self._flight.run("", self._renew)

    async def _renew(self) -> T:
        flight, value = self._flight, await self._load()
        if flight is self._flight:
            self._value = (self._clock.monotonic(), value)
        return value


class JobQuery(msgspec.Struct, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """The filter of a list of jobs."""

    queue: str | None = None
    state: str | None = None
    task: str | None = None
    code: str | None = None
    correlation_id: str | None = None
    before: str | None = None
    since: Annotated[datetime, Meta(tz=True)] | None = None
    limit: Annotated[int, Meta(ge=1, le=_MAX_LIMIT)] = 50

    @property
    def wanted(self) -> JobFilter:
        """The filter of the ledger. Raises ``ValueError``."""
        names: dict[str, Any] = {
            name: value
            for name in ("queue", "task", "code", "state")
            if (value := getattr(self, name))
        }
        if self.before:
            if (job_id := canonical_job_id(self.before)) is not None:
                names["before"] = job_id
            else:
                names["created_before"] = datetime.fromisoformat(self.before)
        return JobFilter(**names)

    def is_too_old(self, job: Job) -> bool:
        """Return True for a job that was accepted before ``since``, as all older ones were."""
        return self.since is not None and job.created_at < self.since


class AuditQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The filter of the audit trail."""

    actor: str | None = None
    action: str | None = None
    outcome: str | None = None
    since: Annotated[datetime, Meta(tz=True)] | None = None
    until: Annotated[datetime, Meta(tz=True)] | None = None
    before: str | None = None
    limit: Annotated[int, Meta(ge=1, le=_MAX_LIMIT)] = 100

    @property
    def wanted(self) -> AuditFilter:
        """The filter of the store."""
        return AuditFilter(
            actor=self.actor or None,
            action=self.action or None,
            outcome=self.outcome or None,
            since=self.since,
            until=self.until,
        )

    @property
    def cursor(self) -> str | None:
        """The id of the event before the page. Raises ``ValueError`` for another text."""
        if not self.before:
            return None
        if (event_id := canonical_job_id(self.before)) is None:
            raise ValueError("before must be the nextCursor of another page")
        return event_id


Answer = Callable[[bytes, Reads], Awaitable[RawResponse]]
"""Returns the response to the query of a caller with these rights."""


class DataView(NamedTuple):
    """A view: the rights that it needs, and its answer."""

    needs: Reads
    answer: Answer


class _Return(NamedTuple):
    """The timer that restores the level of a logger, and the change that it undoes."""

    timer: asyncio.TimerHandle
    at: datetime
    change: int


class ConsoleData:
    """Answers the views of the console."""

    def __init__(
        self,
        operations: Operations,
        *,
        jobs: JobRuntime,
        fleet: FleetStore,
        feed: Feed,
        settings: Settings,
        source: ConfigurationSource,
        levels: LoggerLevels,
        show_payload: ShowPayload | None,
    ) -> None:
        self._operations = operations
        self._jobs = jobs
        self._fleet = fleet
        self._feed = feed
        self._settings = settings
        self._source = source
        self._show_payload = show_payload
        self._clock = operations.clock
        self.levels = levels
        self._returning: dict[str, _Return] = {}
        self._unshown: set[str] = set()
        """Tasks for a job of which ``show_payload`` has failed."""
        self._fleet_view = Shared(self._clock, self._load_fleet)
        self._runs = Shared(self._clock, lambda: fleet.runs(operations.instance))
        self._reads = SingleFlight[Sequence[CheckChange]]()
        self._turns = asyncio.Semaphore(_READS_AT_ONCE)
        self.queue_counts = Shared[Mapping[str, QueueCounts]](self._clock, jobs.service.queues)
        self._diagnosis = Shared[tuple[datetime, tuple[Finding, ...]]](
            self._clock, self._diagnose, _DOCTOR_SECONDS
        )
        self._last_diagnosis: tuple[datetime, tuple[Finding, ...]] | None = None
        status, session, settings_view = Reads.STATUS, Reads.ALL, Reads.SETTINGS
        self._views = {
            "status": DataView(status, self._status),
            "status/history": DataView(status, self._answer(self.history)),
            "stop": DataView(status, self._answer(self.stop)),
            "circuits": DataView(status, self._answer(self.circuits)),
            "fleet": DataView(session, self._answer(self.fleet)),
            "fleet/changes": DataView(session, self._answer(self.changes)),
            "jobs": DataView(session, self._answer(self.job_list)),
            f"jobs/{ALL_JOBS}": DataView(session, self._answer(self.job_count)),
            "queues": DataView(session, self._answer(self.queues)),
            "schedules": DataView(session, self._answer(self.schedules)),
            "loggers": DataView(session, self._answer(self.loggers)),
            "audit": DataView(session, self._answer(self.audit)),
            "settings": DataView(settings_view, self._answer(self.all_settings)),
            "settings/doctor": DataView(settings_view, self._answer(self.doctor)),
        }

    def find(self, path: str) -> DataView | None:
        """Return the view for a path below ``ui/data/``; None if there is none."""
        name, _, job_id = path.partition("/")
        if path not in self._views and name == "jobs" and job_id:
            return DataView(Reads.ALL, self._answer(lambda _: self.job(job_id)))
        return self._views.get(path)

    def _answer(self, view: Callable[[dict[str, str]], Coroutine[Any, Any, views.View]]) -> Answer:
        async def answer(query: bytes, _: Reads) -> RawResponse:
            try:
                values = _values_of(query)
                return _available(await within(_CALL_SECONDS, view(values)))
            except (
                AuditUnavailableError,
                FleetUnavailableError,
                LedgerUnavailableError,
                TimeoutError,
            ) as error:
                # No error status: a browser would write a line for each, as long as it lasts.
                body = {"available": False, "code": NO_ANSWER, "detail": reason_of(error)}
                return json_response(200, encode(body))
            except JobNotFoundError as error:
                return problem_response(404, f"{error}.")
            except UnknownQueueError as error:
                return problem_response(422, f"{error}.")
            except (msgspec.ValidationError, ValueError, TypeError, OverflowError) as error:
                return problem_response(400, f"The query is invalid: {error}.")

        return answer

    # -- the process -------------------------------------------------------------------------

    async def _status(self, _: bytes, reads: Reads) -> RawResponse:
        return _available(self._feed.snapshot(everything=reads.includes(Reads.ALL)))

    async def stop(self, _: dict[str, str]) -> views.View:
        """``ui/data/stop``."""
        return views.stop_view(self._operations)

    # -- the fleet ---------------------------------------------------------------------------

    async def fleet(self, _: dict[str, str]) -> views.View:
        """``ui/data/fleet``."""
        return {"now": timestamp(self._clock.now()), **await self._fleet_view.get()}

    async def _load_fleet(self) -> views.View:
        found = await self._fleet.fleet()
        return {
            "kept": self._fleet.kept,
            "beat": BEAT_SECONDS,
            "silentAfter": SILENT_AFTER_SECONDS,
            "more": found.more,
            # Encoded once for all pages.
            "items": msgspec.Raw(
                encode(views.fleet_view(found.instances, self._operations.instance))
            ),
        }

    async def changes(self, query: dict[str, str]) -> views.View:
        """``ui/data/fleet/changes``."""
        check, instance = query.get("check") or None, query.get("instance") or None
        limit = _limit(query, 200, 1000)
        found = await self._read(
            f"changes {check!r} {instance!r} {limit}",
            lambda: self._fleet.changes(check=check, instance=instance, limit=limit),
        )
        return {"kept": self._fleet.kept, "items": [views.fleet_change_view(e) for e in found]}

    async def history(self, query: dict[str, str]) -> views.View:
        """``ui/data/status/history``."""
        until = self._clock.now()
        hours = min(168.0, max(0.1, float(query.get("hours", "24"))))
        since = until - timedelta(hours=hours)
        instances = await self._runs.get()
        own = [each for each in instances if each.report.instance == self._operations.instance]
        runs = [*predecessors(instances, own[0].report), *own] if own else []
        runs = [each for each in runs if each in own or each.seen_at > since]
        names = [each.report.instance for each in runs]
        found = await self._read(f"history {hours}", lambda: self._fleet.history(names, since))
        checks = views.history_view(histories(runs, found, since, until))
        return {"from": timestamp(since), "to": timestamp(until), "checks": checks}

    async def _read(
        self, key: str, load: Callable[[], Awaitable[Sequence[CheckChange]]]
    ) -> Sequence[CheckChange]:
        """Return changes; equal reads share one, and different ones wait for their turn."""

        async def in_turn() -> Sequence[CheckChange]:
            async with asyncio.timeout(_CALL_SECONDS), self._turns:
                return await load()

        return await self._reads.run(key, in_turn)

    # -- jobs --------------------------------------------------------------------------------

    async def job_list(self, values: dict[str, str]) -> views.View:
        """``ui/data/jobs``."""
        query = msgspec.convert(values, JobQuery, strict=False)
        found = await self._jobs.service.search(
            _with_limit(query.wanted, query.limit), correlation_id=query.correlation_id or None
        )
        shown = [job for job in found.jobs if not query.is_too_old(job)]
        older = len(shown) < len(found.jobs)
        return {
            "items": [views.job_view(job) for job in shown],
            "nextCursor": None if older else found.before,
        }

    async def job_count(self, values: dict[str, str]) -> views.View:
        """``ui/data/jobs/all``: how many jobs an action on all that match would change."""
        action = values.pop("action", "")
        if action not in {"retry", "cancel"}:
            raise ValueError("action must be retry or cancel")
        query = msgspec.convert(values, JobQuery, strict=False)
        ids = await self.matching(query, action)
        return {"count": len(ids), "atLeast": len(ids) >= MAX_COUNTED}

    async def matching(self, query: JobQuery, action: str) -> list[str]:
        """Return the ids of the jobs that an action on many jobs would change, up to a limit."""
        states = ["failed"] if action == "retry" else ["waiting", "active"]
        if query.state:
            states = [query.state] if query.state in states else []
        ids: list[str] = []
        # A search of few matches reads every job, also after the response that it did not end.
        ends = self._clock.monotonic() + _SEARCH_SECONDS
        for state in states:
            wanted = msgspec.structs.replace(query, state=state)
            before: str | None = query.before
            while len(ids) < MAX_COUNTED:
                page = msgspec.structs.replace(wanted, before=before).wanted
                found = await self._jobs.service.search(_with_limit(page, _PAGE_JOBS))
                fit = [job.id for job in found.jobs if not query.is_too_old(job)]
                ids += fit
                if found.before is None or len(fit) < len(found.jobs):
                    break
                if self._clock.monotonic() > ends:
                    raise TimeoutError("the search takes too long: narrow the filter")
                before = found.before
        return ids[:MAX_COUNTED]

    async def job(self, job_id: str) -> views.View:
        """``ui/data/jobs/{id}``."""
        job = await self._jobs.service.get(job_id)
        payload, result = self._shown(job)
        hidden = self._show_payload is None or job.task in self._unshown
        return views.job_details(job, payload, result, hidden=hidden)

    def _shown(self, job: Job) -> tuple[str | None, str | None]:
        """Return the texts of payload and result; None for one that is hidden or missing."""
        show = self._show_payload
        if show is None:
            return None, None
        try:
            payload = show(job.task, job.payload)
            return payload, None if job.result is None else show(job.task, job.result)
        except Exception as error:  # noqa: BLE001 - the function is the application's
            # Once, as the page asks again. Without the message, which may have the payload.
            if job.task not in self._unshown:
                self._unshown.add(job.task)
                extra = {"task": job.task, "reason": type(error).__name__}
                _logger.warning("Payload is hidden: show_payload failed", extra=extra)
            return None, None

    async def queues(self, _: dict[str, str]) -> views.View:
        """``ui/data/queues``."""
        found = await self.queue_counts.get()
        concurrency = self._jobs.concurrency
        return {"items": [views.queue_view(n, each, concurrency) for n, each in found.items()]}

    async def schedules(self, _: dict[str, str]) -> views.View:
        """``ui/data/schedules``."""
        found = await self._jobs.service.schedules()
        return {"items": [views.schedule_view(each) for each in found]}

    async def audit(self, values: dict[str, str]) -> views.View:
        """``ui/data/audit``: the events, the latest first."""
        query = msgspec.convert(values, AuditQuery, strict=False)
        store = self._operations.audit.store
        if store is None:
            raise AuditUnavailableError("this process stores no events")
        # One more than asked for shows whether there are older ones.
        found = await store.read(query.wanted, before=query.cursor, limit=query.limit + 1)
        shown = found[: query.limit]
        return {
            "kept": store.kept,
            "actions": list(Action),
            "items": [event_fields(each) for each in shown],
            "nextCursor": shown[-1].id if len(found) > len(shown) else None,
        }

    # -- circuits, loggers, settings ---------------------------------------------------------

    async def circuits(self, _: dict[str, str]) -> views.View:
        """``ui/data/circuits``."""
        items = [self._feed.circuit(each) for each in self._operations.breakers]
        return {"instance": self._operations.instance, "items": items}

    async def loggers(self, _: dict[str, str]) -> views.View:
        """``ui/data/loggers``."""
        items = [self.logger(name) for name in self.levels.all()]
        return {"items": items, "levels": list(LEVELS)}

    def logger(self, name: str) -> views.View:
        """Return the view of a logger that exists."""
        level = self.levels.get(name)
        returning = self._returning.get(name)
        # A later change, as by ``PUT /health/loggers``, stays.
        returns = returning is not None and returning.change == self.levels.changes(name)
        return {
            "name": name,
            "level": level.level,
            "effectiveLevel": level.effective,
            "returnsAt": timestamp(returning.at) if returning and returns else None,
        }

    def set_level(self, name: str, level: str | None, seconds: float | None) -> None:
        """Change the level of a logger that exists; after ``seconds``, if given, it returns.

        Raises ``KeyError`` for an unknown level name.
        """
        self.levels.set(name, level)
        if (pending := self._returning.pop(name, None)) is not None:
            pending.timer.cancel()
        if level is not None and seconds is not None:
            change = self.levels.changes(name)
            timer = asyncio.get_running_loop().call_later(seconds, self._level_back, name, change)
            at = self._clock.now() + timedelta(seconds=seconds)
            self._returning[name] = _Return(timer, at, change)

    def _level_back(self, name: str, change: int) -> None:
        self._returning.pop(name, None)
        if self.levels.changes(name) == change:
            self.levels.set(name, None)

    async def all_settings(self, _: dict[str, str]) -> views.View:
        """``ui/data/settings``: as ``viralfx env``, with secrets masked."""
        return views.settings_view(self._settings, self._source)

    async def doctor(self, _: dict[str, str]) -> views.View:
        """``ui/data/settings/doctor``: the last diagnosis."""
        return views.diagnosis_view(self._last_diagnosis)

    async def diagnose(self) -> views.View:
        """Run the doctor, at most once a minute."""
        self._last_diagnosis = await self._diagnosis.get()
        return views.diagnosis_view(self._last_diagnosis)

    async def _diagnose(self) -> tuple[datetime, tuple[Finding, ...]]:
        checks = self._source.doctor_checks(self._settings)
        findings = await diagnose(checks, clock=self._clock, limit=_DOCTOR_LIMIT)
        return datetime.now(UTC), findings


def _available(view: views.View) -> RawResponse:
    return json_response(200, encode({"available": True, **view}))


def _values_of(query: bytes) -> dict[str, str]:
    return require_storable(dict(parse_qsl(query.decode("latin-1"), max_num_fields=20)))


def require_storable(values: dict[str, str]) -> dict[str, str]:
    """Return the values. Raises ``ValueError`` for a character that Postgres does not store."""
    if any("\0" in value for value in values.values()):
        raise ValueError("a value has a NUL character")
    return values


def _limit(query: dict[str, str], default: int, most: int) -> int:
    return max(1, min(most, int(query.get("limit", default))))


def _with_limit(wanted: JobFilter, limit: int) -> JobFilter:
    names = ("queue", "state", "task", "code", "created_before", "before")
    return JobFilter(**{name: getattr(wanted, name) for name in names}, limit=limit)
