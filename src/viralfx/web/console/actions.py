"""The actions of operators: answers to POST below ``console/``. Each has a log line."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from viralfx.bootstrap import JobRuntime
from viralfx.domain.errors import ViralFXError
from viralfx.domain.fleet import FleetUnavailableError
from viralfx.domain.jobs.ledger import QueueCounts
from viralfx.domain.jobs.model import (
    JobNotFoundError,
    JobStateError,
    LedgerUnavailableError,
    UnknownQueueError,
)
from viralfx.domain.operations import Operations
from viralfx.web.console import views
from viralfx.web.console.access import Caller
from viralfx.web.console.data import (
    MAX_COUNTED,
    ConsoleData,
    JobQuery,
    coded,
    require_storable,
    unavailable,
    within,
)
from viralfx.web.console.feed import Feed
from viralfx.web.responses import RawResponse, encode, json_response, problem_response

_logger = logging.getLogger("viralfx.console")

MAX_BODY_BYTES = 16 * 1024
_ACTION_SECONDS = 30.0
"""Time limit of an action; a change of many jobs that takes longer can be repeated."""
_CHANGES_AT_ONCE = 8

Text = Annotated[str, Meta(max_length=500)]


class _Body(msgspec.Struct, kw_only=True, rename="camel", forbid_unknown_fields=True):
    pass


class StopBody(_Body):
    """Begin the stop of the instance with this name, so that no other one is stopped by mistake."""

    instance: Text


class JobBody(_Body):
    """Change one job."""

    id: Text
    action: Literal["retry", "cancel"]


class BulkFilter(_Body):
    """The jobs that a change of many jobs is for."""

    queue: Text | None = None
    state: Text | None = None
    task: Text | None = None
    code: Text | None = None
    before: Text | None = None
    since: Text | None = None


class BulkBody(_Body):
    """Change all jobs that match; ``count`` is how many the operator saw."""

    action: Literal["retry", "cancel"]
    filter: BulkFilter
    count: Annotated[int, Meta(ge=0)]


class QueueBody(_Body):
    """Pause or resume a queue."""

    queue: Text
    action: Literal["pause", "resume"]


class CircuitBody(_Body):
    """Open or close a circuit of this process."""

    name: Text
    action: Literal["open", "close"]


class LoggerBody(_Body):
    """Change the level of a logger; ``minutes``: until it returns by itself, null: never."""

    name: Text
    level: Text | None
    minutes: Annotated[float, Meta(gt=0, le=1440)] | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The response of an action, with the words for the log."""

    response: RawResponse
    target: str
    words: str = "ok"


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
        self.paths: Mapping[str, Callable[[Caller, bytes], Awaitable[RawResponse]]] = {
            "checks": self._performer("check now", _Body, self._check),
            "stop": self._performer("begin stop", StopBody, self._stop),
            "jobs": self._performer("job", JobBody, self._job),
            "jobs/bulk": self._performer("jobs", BulkBody, self._bulk),
            "queues": self._performer("queue", QueueBody, self._queue),
            "circuits": self._performer("circuit", CircuitBody, self._circuit),
            "loggers": self._performer("logger level", LoggerBody, self._level),
            "doctor": self._performer("doctor", _Body, self._doctor),
        }
        """The actions by path below ``console/``."""

    def _performer(
        self, action: str, kind: type[Any], perform: Callable[[Any], Coroutine[Any, Any, Outcome]]
    ) -> Callable[[Caller, bytes], Awaitable[RawResponse]]:
        decode = msgspec.json.Decoder(kind).decode

        async def run(caller: Caller, body: bytes) -> RawResponse:
            try:
                wanted = decode(body or b"{}")
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                return problem_response(400, f"The body is invalid: {error}.")
            name = action
            if (verb := getattr(wanted, "action", None)) is not None:
                name = f"{verb} {action}"
            try:
                outcome = await within(_ACTION_SECONDS, perform(wanted))
            except (LedgerUnavailableError, FleetUnavailableError, TimeoutError) as error:
                outcome = Outcome(unavailable(error), _target_of(wanted), "no answer")
            except JobNotFoundError as error:
                outcome = Outcome(problem_response(404, f"{error}."), _target_of(wanted), "unknown")
            except UnknownQueueError as error:
                outcome = Outcome(problem_response(404, f"{error}."), _target_of(wanted), "unknown")
            except JobStateError as error:
                outcome = Outcome(coded(409, "state", f"{error}."), _target_of(wanted), "refused")
            except (ViralFXError, ValueError, TypeError, OverflowError) as error:
                return problem_response(400, f"The body is invalid: {error}.")
            except BaseException as error:
                # Also if the client left: the action may have had an effect.
                response = problem_response(500, "The action failed.")
                words = f"error: {type(error).__name__}"
                self._record(caller, name, Outcome(response, _target_of(wanted), words))
                raise
            self._record(caller, name, outcome)
            return outcome.response

        return run

    def _record(self, caller: Caller, action: str, outcome: Outcome) -> None:
        _logger.warning(
            "Console action",
            extra={
                "actor": caller.actor,
                "role": str(caller.role),
                "action": action,
                "target": outcome.target[:500],
                "outcome": outcome.words,
            },
        )

    # -- actions -----------------------------------------------------------------------------

    async def _check(self, _: _Body) -> Outcome:
        await self._operations.monitor.refresh()
        report = views.checks_view(self._operations.monitor.report())
        return Outcome(json_response(200, encode(report)), self._operations.instance)

    async def _stop(self, wanted: StopBody) -> Outcome:
        own = self._operations.instance
        if wanted.instance != own:
            detail = f"This is {own}; type its whole name."
            return Outcome(coded(409, "instance", detail), wanted.instance, "refused")
        if not self._operations.staged:
            detail = "This server handles its own stop; run it with `viralfx serve`."
            return Outcome(coded(409, "unstaged", detail), own, "refused")
        began = self._operations.shutdown.trigger(f"POST {self._path}/console/stop")
        body = encode(views.stop_view(self._operations))
        return Outcome(json_response(202, body), own, "ok" if began else "had begun")

    async def _job(self, wanted: JobBody) -> Outcome:
        service = self._jobs.service
        change = service.retry if wanted.action == "retry" else service.cancel
        job = await change(wanted.id)
        return Outcome(json_response(200, encode(views.job_view(job))), wanted.id)

    async def _bulk(self, wanted: BulkBody) -> Outcome:
        given = {k: v for k, v in msgspec.structs.asdict(wanted.filter).items() if v}
        target = _target_of(wanted)
        if not given:
            raise ValueError("the filter needs at least one field, or it means every job")
        query = msgspec.convert(require_storable(given), JobQuery, strict=False)
        ids = await self._data.matching(query, wanted.action)
        if len(ids) > wanted.count and wanted.count < MAX_COUNTED:
            detail = f"{len(ids)} jobs match now, not {wanted.count}: look again."
            response = coded(409, "count", detail, errors=[{"count": len(ids)}])
            return Outcome(response, target, f"refused: {len(ids)}, not {wanted.count}")
        service = self._jobs.service
        if query.since is None:
            many = service.retry_all if wanted.action == "retry" else service.cancel_all
            # The number that the operator has confirmed.
            count = (await many(query.wanted, most=None)).count
        else:
            # The ledger has no filter for it, so exactly the jobs that were found are changed.
            one = service.retry if wanted.action == "retry" else service.cancel
            count = await _each(one, ids)
        return Outcome(json_response(200, encode({"count": count})), target, f"ok: {count}")

    async def _queue(self, wanted: QueueBody) -> Outcome:
        service = self._jobs.service
        change = service.pause if wanted.action == "pause" else service.resume
        await change(wanted.queue)
        counts = (await service.queues()).get(wanted.queue, QueueCounts())
        view = views.queue_view(wanted.queue, counts, self._jobs.concurrency)
        return Outcome(json_response(200, encode(view)), wanted.queue)

    async def _circuit(self, wanted: CircuitBody) -> Outcome:
        try:
            breaker = self._operations.breakers[wanted.name]
        except KeyError:
            response = problem_response(404, "This process has no such circuit.")
            return Outcome(response, wanted.name, "unknown")
        if wanted.action == "open":
            breaker.open()
        else:
            breaker.close()
        return Outcome(json_response(200, encode(self._feed.circuit(breaker))), wanted.name)

    async def _level(self, wanted: LoggerBody) -> Outcome:
        data = self._data
        name = data.levels.find(wanted.name)
        target = f"{wanted.name} {wanted.level or 'back'}"
        if name is None:
            return Outcome(problem_response(404, "There is no such logger."), target, "unknown")
        try:
            seconds = None if wanted.minutes is None else 60 * wanted.minutes
            data.set_level(name, wanted.level, seconds)
        except KeyError:
            raise ValueError(f"there is no level {wanted.level!r}") from None
        return Outcome(json_response(200, encode(data.logger(name))), target)

    async def _doctor(self, _: _Body) -> Outcome:
        found = await self._data.diagnose()
        return Outcome(json_response(200, encode(found)), self._operations.instance)


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
        raise LedgerUnavailableError(f"{count} jobs were changed; then {failure}") from failure
    return count


def _target_of(wanted: Any) -> str:
    if isinstance(wanted, BulkBody):
        given = msgspec.structs.asdict(wanted.filter)
        return ", ".join(f"{name}={value}" for name, value in given.items() if value)
    for name in ("id", "queue", "name", "instance"):
        if (value := getattr(wanted, name, None)) is not None:
            return str(value)
    return ""
