"""The actions of operators: answers to ``POST ui/data/{view}/{id}/{action}``.

Each is an event of the audit trail.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from viralfx.bootstrap import JobRuntime
from viralfx.core.errors import LedgerUnavailableError, ViralFXError
from viralfx.domain.access import Right
from viralfx.domain.audit import Action, AuditEntry, AuditOutcome, jobs_in_words
from viralfx.domain.operations import Operations
from viralfx.jobs.bulk import cut_off
from viralfx.jobs.ledger import QueueCounts
from viralfx.jobs.model import Job, JobNotFoundError, JobStateError, UnknownQueueError
from viralfx.jobs.schedule import UnknownScheduleError
from viralfx.jobs.tasks import UnknownTaskError
from viralfx.resilience.breaker import CircuitBreaker
from viralfx.server.interface import RawResponse
from viralfx.telemetry.logging.lines import FixedLevelError
from viralfx.web.console import views
from viralfx.web.console.data import (
    ALL_JOBS,
    MAX_COUNTED,
    NO_ANSWER,
    ConsoleData,
    JobQuery,
    coded,
    reason_of,
    require_storable,
    within,
)
from viralfx.web.console.feed import Feed
from viralfx.web.responses import encode, json_response, problem_response

MAX_BODY_BYTES = 16 * 1024
_ACTION_SECONDS = 30.0
"""Time limit of an action; a change of many jobs that takes longer can be repeated."""
_CHANGES_AT_ONCE = 8

Text = Annotated[str, Meta(max_length=500)]


@dataclass(frozen=True, slots=True)
class Actor:
    """The sender of an action."""

    name: str
    """Its name in the audit trail."""
    peer: str | None
    """The address of the client; None for a Unix socket."""


class Nothing(msgspec.Struct, forbid_unknown_fields=True):
    """The body of an action without data."""


class BulkFilter(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The jobs that a change of many jobs is for."""

    queue: Text | None = None
    state: Text | None = None
    task: Text | None = None
    code: Text | None = None
    before: Text | None = None
    since: Text | None = None

    @property
    def given(self) -> dict[str, str]:
        """The fields that are set."""
        return {name: text for name, text in msgspec.structs.asdict(self).items() if text}


class BulkBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Change all jobs that match; ``count`` is how many the operator saw."""

    filter: BulkFilter
    count: Annotated[int, Meta(ge=0)]


class LevelBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Change the level of a logger; ``minutes``: until it returns by itself, null: never."""

    level: Text | None
    minutes: Annotated[float, Meta(gt=0, le=1440)] | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The response of an action, with its facts for the audit trail."""

    response: RawResponse
    result: AuditOutcome = AuditOutcome.DONE
    detail: str | None = None
    before: str | None = None
    after: str | None = None


def _refused(response: RawResponse, detail: str) -> Outcome:
    return Outcome(response, AuditOutcome.REFUSED, detail)


Perform = Callable[[Actor, bytes], Awaitable[RawResponse]]
"""Performs an action with the body of the request."""
_Perform = Callable[[str, Any], Coroutine[Any, Any, Outcome]]


@dataclass(frozen=True, slots=True)
class _Action:
    name: Action
    """Its name in the audit trail."""
    kind: type[Any]
    """The type of its body."""
    perform: _Perform
    """Performs it, from the id in the path and the body."""
    only: str | None = None
    """The one id that it has; None: any."""
    needs: Right = Right.OPERATE


class FoundAction(NamedTuple):
    """An action for one id, and the right that it needs."""

    needs: Right
    perform: Perform


class ConsoleActions:
    """Performs the actions of the console."""

    def __init__(
        self,
        operations: Operations,
        *,
        jobs: JobRuntime,
        feed: Feed,
        data: ConsoleData,
        path: str,
    ) -> None:
        self._operations = operations
        self._jobs = jobs
        self._feed = feed
        self._data = data
        self._path = path
        self._actions = {
            "status/run": _Action(Action.CHECK, Nothing, self._check, "checks"),
            "stop/begin": _Action(Action.STOP, Nothing, self._stop, needs=Right.ADMIN),
            "jobs/retry": _Action(Action.RETRY, Nothing, self._job("retry")),
            "jobs/cancel": _Action(Action.CANCEL, Nothing, self._job("cancel")),
            "jobs/run": _Action(Action.RUN, Nothing, self._job("run")),
            "queues/pause": _Action(Action.PAUSE_QUEUE, Nothing, self._queue("pause")),
            "queues/resume": _Action(Action.RESUME_QUEUE, Nothing, self._queue("resume")),
            "schedules/pause": _Action(Action.PAUSE_SCHEDULE, Nothing, self._pause_schedule),
            "schedules/resume": _Action(Action.RESUME_SCHEDULE, Nothing, self._resume_schedule),
            "schedules/run": _Action(Action.RUN_SCHEDULE, Nothing, self._run_schedule),
            "circuits/open": _Action(Action.OPEN_CIRCUIT, Nothing, self._open_circuit),
            "circuits/close": _Action(Action.CLOSE_CIRCUIT, Nothing, self._close_circuit),
            "loggers/level": _Action(Action.LEVEL, LevelBody, self._level),
            "settings/run": _Action(Action.DOCTOR, Nothing, self._doctor, "doctor", Right.ADMIN),
        }
        """The actions by view and last part of the path."""
        self._bulk_actions = {
            "jobs/retry": _Action(Action.RETRY_ALL, BulkBody, self._bulk("retry")),
            "jobs/cancel": _Action(Action.CANCEL_ALL, BulkBody, self._bulk("cancel")),
        }

    def find(self, path: str) -> FoundAction | None:
        """Return the action for a path below ``ui/data/``; None if there is none.

        The id is the middle of the path, and may have slashes.
        """
        view, _, rest = path.partition("/")
        target, _, verb = rest.rpartition("/")
        actions = self._bulk_actions if (view, target) == ("jobs", ALL_JOBS) else self._actions
        action = actions.get(f"{view}/{verb}")
        if action is None or not target or action.only not in {None, target}:
            return None
        return FoundAction(action.needs, self._performer(action, target))

    def _performer(self, action: _Action, target: str) -> Perform:
        async def run(actor: Actor, body: bytes) -> RawResponse:
            try:
                wanted = msgspec.json.decode(body or b"{}", type=action.kind)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                return problem_response(400, f"The body is invalid: {error}.")
            entry = AuditEntry(
                action=action.name,
                actor=actor.name,
                address=actor.peer,
                target=_target_in_words(target, wanted),
            )
            try:
                outcome = await self._ended(action.perform(target, wanted))
            except (ViralFXError, ValueError, TypeError, OverflowError) as error:
                return problem_response(400, f"The body is invalid: {error}.")
            except BaseException as error:
                # Also if the client left: the action may have had an effect.
                entry.outcome, entry.detail = AuditOutcome.FAILED, type(error).__name__
                self._operations.audit.record(entry)
                raise
            entry.outcome, entry.detail = outcome.result, outcome.detail
            entry.before, entry.after = outcome.before, outcome.after
            self._operations.audit.record(entry)
            return outcome.response

        return run

    async def _ended(self, performed: Coroutine[Any, Any, Outcome]) -> Outcome:
        """Return the outcome of an action; errors of the ledger and refusals have one."""
        try:
            return await within(_ACTION_SECONDS, performed)
        except (LedgerUnavailableError, TimeoutError) as error:
            reason = reason_of(error)
            return Outcome(coded(503, NO_ANSWER, reason), AuditOutcome.FAILED, reason)
        except (JobNotFoundError, UnknownQueueError, UnknownScheduleError) as error:
            return _refused(problem_response(404, f"{error}."), str(error))
        except UnknownTaskError as error:
            return _refused(problem_response(422, f"{error}."), str(error))
        except JobStateError as error:
            return _refused(coded(409, "state", f"{error}."), str(error))

    # -- actions -----------------------------------------------------------------------------

    async def _check(self, _target: str, _: Nothing) -> Outcome:
        await self._operations.monitor.refresh()
        return _done(views.checks_view(self._operations.monitor.report()))

    async def _stop(self, instance: str, _: Nothing) -> Outcome:
        own = self._operations.instance
        if instance != own:
            detail = f"This is {own}; type its whole name."
            return _refused(coded(409, "instance", detail), "another instance")
        if not self._operations.staged:
            detail = "This server handles its own stop; run it with `viralfx serve`."
            return _refused(coded(409, "unstaged", detail), "this server handles its own stop")
        began = self._operations.shutdown.trigger(f"POST {self._path}/ui/data/stop")
        return _done(
            views.stop_view(self._operations),
            status=202,
            detail=None if began else "it had begun",
        )

    def _change(self, verb: str) -> Callable[[str], Awaitable[Job]]:
        service = self._jobs.service
        changes = {"retry": service.retry, "cancel": service.cancel, "run": service.run}
        return changes[verb]

    def _job(self, verb: str) -> _Perform:
        async def perform(job_id: str, _: Nothing) -> Outcome:
            job = await self._change(verb)(job_id)
            return _done(views.job_view(job), after=str(job.state))

        return perform

    def _bulk(self, verb: str) -> _Perform:
        async def perform(_target: str, wanted: BulkBody) -> Outcome:
            if not wanted.filter.given:
                raise ValueError("the filter needs at least one field, or it means every job")
            given = require_storable(wanted.filter.given)
            query = msgspec.convert(given, JobQuery, strict=False)
            ids = await self._data.matching(query, verb)
            if len(ids) > wanted.count and wanted.count < MAX_COUNTED:
                detail = f"{len(ids)} jobs match now, not {wanted.count}: look again."
                response = coded(409, "count", detail, errors=[{"count": len(ids)}])
                return _refused(response, f"{len(ids)} jobs match, not {wanted.count}")
            if query.since is None:
                service = self._jobs.service
                many = service.retry_all if verb == "retry" else service.cancel_all
                # More may match by now; the operator has confirmed this number.
                most = None if wanted.count >= MAX_COUNTED else len(ids)
                count = (await many(query.wanted, most=most)).count
            else:
                # The ledger has no filter for it, so exactly the jobs that were found are changed.
                count = await _each(self._change(verb), ids)
            return _done({"count": count}, detail=jobs_in_words(count))

        return perform

    def _queue(self, verb: str) -> _Perform:
        async def perform(queue: str, _: Nothing) -> Outcome:
            service = self._jobs.service
            await (service.pause(queue) if verb == "pause" else service.resume(queue))
            self._data.queue_counts.forget()
            counts = await self._data.queue_counts.get()
            self._feed.on_counted(counts)
            shown = counts.get(queue, QueueCounts())
            view = views.queue_view(queue, shown, self._jobs.concurrency)
            return _done(view, after="paused" if shown.paused else "running")

        return perform

    async def _pause_schedule(self, task: str, _: Nothing) -> Outcome:
        return _done(views.schedule_view(await self._jobs.service.pause_schedule(task)))

    async def _resume_schedule(self, task: str, _: Nothing) -> Outcome:
        return _done(views.schedule_view(await self._jobs.service.resume_schedule(task)))

    async def _run_schedule(self, task: str, _: Nothing) -> Outcome:
        accepted = await self._jobs.service.run_schedule(task)
        view = views.job_view(accepted.job)
        return _done(view, status=202 if accepted.created else 200, detail=f"job {accepted.job.id}")

    async def _open_circuit(self, name: str, _: Nothing) -> Outcome:
        return self._circuit(name, CircuitBreaker.open)

    async def _close_circuit(self, name: str, _: Nothing) -> Outcome:
        return self._circuit(name, CircuitBreaker.close)

    def _circuit(self, name: str, change: Callable[[CircuitBreaker], None]) -> Outcome:
        try:
            breaker = self._operations.breakers[name]
        except KeyError:
            detail = "This process has no such circuit."
            return _refused(problem_response(404, detail), "there is no such circuit")
        before = str(breaker.get_state()["state"])
        change(breaker)
        # No event tells that a circuit which is open already was opened by hand.
        self._feed.publish_circuit(name)
        view = self._feed.circuit(breaker)
        return _done(view, before=before, after=str(view["state"]))

    async def _level(self, logger: str, wanted: LevelBody) -> Outcome:
        data = self._data
        name = data.levels.find(logger)
        if name is None:
            missing = problem_response(404, "There is no such logger.")
            return _refused(missing, "there is no such logger")
        before = data.levels.get(name).effective
        try:
            seconds = None if wanted.minutes is None else 60 * wanted.minutes
            data.set_level(name, wanted.level, seconds)
        except FixedLevelError as error:
            detail = f"This level does not change: {error}."
            return _refused(coded(409, "fixed", detail), str(error))
        except KeyError:
            raise ValueError(f"there is no level {wanted.level!r}") from None
        return _done(
            data.logger(name),
            before=before,
            after=data.levels.get(name).effective,
            detail=None if wanted.minutes is None else f"for {wanted.minutes:g} min",
        )

    async def _doctor(self, _target: str, _: Nothing) -> Outcome:
        return _done(await self._data.diagnose())


def _done(
    view: views.View,
    *,
    status: int = 200,
    before: str | None = None,
    after: str | None = None,
    detail: str | None = None,
) -> Outcome:
    response = json_response(status, encode(view))
    return Outcome(response, detail=detail, before=before, after=after)


async def _each(change: Callable[[str], Awaitable[Any]], ids: list[str]) -> int:
    """Change each of some jobs; return how many. A job that has moved on is left out.

    Raises :class:`LedgerUnavailableError`, with the number that were changed before.
    """
    left, count = list(reversed(ids)), 0
    failure: LedgerUnavailableError | None = None

    async def work() -> None:
        nonlocal count, failure
        while left and failure is None:
            try:
                await change(left.pop())
            except (JobNotFoundError, JobStateError):
                continue
            except LedgerUnavailableError as error:
                failure = error
                return
            count += 1

    await asyncio.gather(*(work() for _ in range(_CHANGES_AT_ONCE)))
    if failure is not None:
        raise cut_off(count, failure) from failure
    return count


def _target_in_words(target: str, wanted: Any) -> str:
    if isinstance(wanted, BulkBody):
        return ", ".join(f"{name}={text}" for name, text in wanted.filter.given.items())
    return target
