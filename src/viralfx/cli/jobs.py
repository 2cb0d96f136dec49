"""``viralfx jobs``: works on the ledger of DATABASE_URL.

The ledger is used directly, so no service needs to run.
"""

import argparse
import asyncio
import logging
import os
import pwd
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from typing import Any

import msgspec

from viralfx.bootstrap import assemble
from viralfx.cli import note
from viralfx.cli.output import (
    agrees,
    hint_of,
    plain,
    print_changed,
    print_jobs,
    print_json,
    print_table,
    readable,
)
from viralfx.core.clock import timestamp
from viralfx.core.errors import (
    ConfigurationError,
    LedgerUnavailableError,
    StartupError,
    UnstorableError,
    suggest,
)
from viralfx.domain.audit import Action, AuditEntry, AuditTrail, jobs_in_words
from viralfx.jobs.bulk import BulkCount
from viralfx.jobs.codec import PayloadError
from viralfx.jobs.ledger import Accepted
from viralfx.jobs.model import (
    ANY_JOB,
    InvalidFilterError,
    Job,
    JobFilter,
    JobNotFoundError,
    JobState,
    JobStateError,
    KeyConflictError,
    UnknownQueueError,
    filter_in_words,
)
from viralfx.jobs.schedule import ScheduleTimes, UnknownScheduleError
from viralfx.jobs.service import JobService
from viralfx.jobs.tasks import Task, TaskRegistry, UnknownTaskError
from viralfx.settings import Settings, read_settings
from viralfx.telemetry.logging.events import log_settings
from viralfx.telemetry.logging.handler import configure_logging
from viralfx.telemetry.logging.lines import AUDIT
from viralfx.web.jobs import schemas

EXIT_REFUSED = 1
"""A job is missing, its state does not allow the command, or the operator does not want it."""

_MAX_COUNT = 1000
"""Jobs that are counted before the question whether to change them."""
_PAUSE_SECONDS = 2.0
"""Within this time all workers obey a pause."""
_WAIT_SECONDS = 0.5


class _RefusedError(Exception):
    """Some of the jobs of a command were refused; the messages are its arguments."""


def jobs(options: argparse.Namespace) -> int:
    """Run the command and return its exit code.

    Raises :class:`ConfigurationError` for invalid settings and arguments, and
    :class:`StartupError` if the ledger cannot be reached.
    """
    settings = read_settings(os.environ, strict=True)
    declared = None
    if _submits(options) and options.app is not None:
        from viralfx.runner.applications import find_application  # noqa: PLC0415

        _, plugin = find_application(settings, options.app)
        settings, declared = plugin.settings, plugin.assembly.jobs.tasks
    if settings.database_url is None:
        problem = (
            "DATABASE_URL: not set, so each process keeps its jobs in its own memory, where no"
            " other program can find them; set it"
        )
        raise ConfigurationError([problem])
    # The result goes to standard output, log lines for people to standard error.
    configure_logging(level="warn", console=True, stream=sys.stderr)
    log_settings(settings)
    # Their warnings are lines of the service's log, and here the result or the error itself.
    for name in ("viralfx.queues", "viralfx.database"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("viralfx.jobs").setLevel(logging.CRITICAL)
    try:
        asyncio.run(_run(settings, _COMMANDS[options.command], options, declared))
    except _RefusedError as error:
        for line in error.args:
            note(f"viralfx: {plain(line)}")
        return EXIT_REFUSED
    except _INVALID as error:
        raise ConfigurationError([plain(str(error))]) from None
    except (LedgerUnavailableError, UnstorableError) as error:
        raise StartupError(plain(f"DATABASE_URL: {error}")) from None
    return 0


def _submits(options: argparse.Namespace) -> bool:
    """Return True if the command needs to know tasks."""
    by_schedule = options.command == "run" and options.schedule is not None
    return by_schedule or options.command == "submit"


_INVALID = (
    InvalidFilterError,
    PayloadError,
    UnknownQueueError,
    UnknownScheduleError,
    UnknownTaskError,
)
"""Errors of an argument."""

Command = Callable[["_Ledger", argparse.Namespace], Awaitable[None]]


class _Ledger:
    """The job service of this command, and the tasks that it knows."""

    def __init__(
        self,
        queues: Sequence[str],
        service: JobService,
        tasks: TaskRegistry,
        audit: AuditTrail,
    ) -> None:
        self.queues = queues
        """The names in QUEUES."""
        self.service = service
        self.tasks = tasks
        self._audit = audit

    @contextmanager
    def recorded(self, action: Action, target: str) -> Iterator[AuditEntry]:
        """Record the block in the audit trail, as an action of the user of the system."""
        with self._audit.recorded(action, actor=f"cli {_user()}", target=target) as entry:
            yield entry


def _user() -> str:
    """Return the name of the user; not from the environment, which the user sets."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container may run with any number
        return str(os.getuid())


async def _run(
    settings: Settings,
    command: Command,
    options: argparse.Namespace,
    declared: TaskRegistry | None,
) -> None:
    with_tasks = _submits(options) and declared is None
    stream = logging.getLogger(AUDIT)
    stream.addFilter(_is_shown)  # the events of a command are in the table alone
    try:
        async with _opened(settings, with_tasks=with_tasks) as ledger:
            for task in declared or ():
                if task.name not in ledger.tasks:
                    ledger.tasks.add(task)
            await command(ledger, options)
    finally:
        stream.removeFilter(_is_shown)


def _is_shown(_: logging.LogRecord) -> bool:
    return False


@asynccontextmanager
async def _opened(settings: Settings, *, with_tasks: bool) -> AsyncIterator[_Ledger]:
    """Connect; at the end send the notifications of new jobs and disconnect."""
    if not with_tasks:  # a module that cannot be imported must not keep an operator from the jobs
        settings = msgspec.structs.replace(settings, task_modules=())
    # One attempt to connect: an operator repeats the command.
    db = msgspec.structs.replace(settings.db, pool_min=1, pool_max=1, max_reconnect_attempts=1)
    assembly = assemble(msgspec.structs.replace(settings, db=db))
    trail = assembly.operations.audit
    try:
        for resource in assembly.operations.resources:
            await resource.open()
        yield _Ledger(settings.queues, assembly.jobs.service, assembly.jobs.tasks, trail)
    finally:
        # These are the steps of every process, and would be log lines of no use here.
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            await asyncio.shield(assembly.operations.shutdown.run())
        finally:
            logging.disable(before)
        if trail.lost:
            note("viralfx: the audit trail has no event of this, as its table does not take it")


# -- the commands ---------------------------------------------------------------------------------


async def _list(ledger: _Ledger, options: argparse.Namespace) -> None:
    wanted = replace(_filter(options), before=options.cursor)
    # One more than asked for shows whether there are older ones.
    found = await _search(ledger.service, wanted, options.limit + 1)
    page, more = found[: options.limit], len(found) > options.limit
    if options.json:
        print_json(schemas.page(page, page[-1].id if more else None))
        return
    print_jobs(page)
    if not page:
        note("no job matches")
    if more:
        note(f"older jobs: --cursor {page[-1].id}")


async def _search(
    service: JobService, wanted: JobFilter, limit: int, *, ending: bool = True
) -> list[Job]:
    """Return at least ``limit`` jobs if so many match; without ``ending`` none that ends anyway."""
    found: list[Job] = []
    ends = JobState.ACTIVE, True
    while len(found) < limit:
        step = await service.search(replace(wanted, limit=limit))
        found += [job for job in step.jobs if ending or (job.state, job.cancel_requested) != ends]
        if step.before is None:
            break
        wanted = replace(wanted, before=step.before)
    return found


async def _show(ledger: _Ledger, options: argparse.Namespace) -> None:
    try:
        job = await ledger.service.get(options.id)
    except JobNotFoundError as missing:
        raise _RefusedError(str(missing)) from None
    if options.json:
        print_json(schemas.view(job))
        return
    shown: dict[str, object] = msgspec.json.decode(msgspec.json.encode(schemas.summary(job)))
    error = job.error
    lines = {name: value for name, value in shown.items() if name not in {"links", "error"}}
    lines["error"] = None if error is None else f"{error.code}: {error.message}"
    lines["payload"] = readable(job.payload)
    lines["result"] = None if job.result is None else readable(job.result)
    width = max(map(len, lines)) + 2
    for name, value in lines.items():
        if value is not None:
            text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
            print(f"{name:{width}}{plain(text)}")
    for attempt in job.history:
        print(
            f"\nexecution {attempt.number} ended at {timestamp(attempt.ended_at)} on"
            f" {plain(attempt.worker or 'no worker')}, {plain(attempt.error.code)}:"
            f" {plain(attempt.error.message)}"
        )
        for line in (attempt.error.traceback or "").splitlines():
            print(f"  {plain(line)}")


async def _submit(ledger: _Ledger, options: argparse.Namespace) -> None:
    if options.queue is not None:
        await _declare(ledger, options.task, options.queue)
    if options.payload == "-" and sys.stdin is None:
        raise ConfigurationError(["jobs submit: standard input is closed"])
    payload = sys.stdin.buffer.read() if options.payload == "-" else options.payload.encode()
    try:
        with ledger.recorded(Action.SUBMIT, options.task) as entry:
            accepted = await ledger.service.accept(
                options.task,
                payload,
                key=options.key,
                run_at=options.run_at,
                priority=options.priority,
                unique=options.unique,
                queue=options.queue,
                max_attempts=options.max_attempts,
            )
            entry.detail = f"job {accepted.job.id}"
    except KeyConflictError as error:
        raise _RefusedError(str(error)) from None
    except UnknownTaskError as error:
        hint = "declare it in TASK_MODULES or pass --app; or pass --queue to use its name alone"
        raise _with_hint(error, hint) from None
    except PayloadError as error:
        raise PayloadError(f"jobs submit {options.task}: {error}{hint_of(payload)}") from None
    _print_accepted(options, accepted)


def _with_hint(error: UnknownTaskError, hint: str) -> UnknownTaskError:
    return UnknownTaskError(f"{error}{'' if str(error).endswith('?') else ';'} {hint}")


def _print_accepted(options: argparse.Namespace, accepted: Accepted) -> None:
    job = accepted.job
    if options.json:
        print_json(schemas.accepted(job))
    else:
        print(f"{job.id}  {plain(job.task)} in {plain(job.queue)}, {job.state}")
        if not accepted.created:
            note("there was a job like it: nothing was submitted")


async def _declare(ledger: _Ledger, task: str, queue: str) -> None:
    """Let the service accept jobs in a queue, also of a task that is declared elsewhere."""
    queues = [*ledger.queues]
    if queue not in queues and queue not in (queues := [*await ledger.service.queues()]):
        hint = suggest(queue, queues) or f"there are {', '.join(queues)}"
        raise ConfigurationError([f"--queue: there is no queue named {queue!r}; {hint}"])
    if task not in ledger.tasks:
        ledger.tasks.add(
            Task(
                name=task,
                function=_declare,
                queue=queue,
                payload_type=Any,
                wants_context=False,
                transactional=False,
                timeout=None,
                retry=None,
            )
        )


async def _retry(ledger: _Ledger, options: argparse.Namespace) -> None:
    if options.id:
        await _change_each(ledger, options, Action.RETRY, ledger.service.retry)
    else:
        # In one call, so that a job that fails again meanwhile is retried once.
        await _change_all(
            ledger, options, Action.RETRY_ALL, ledger.service.retry_all, JobState.FAILED
        )


async def _cancel(ledger: _Ledger, options: argparse.Namespace) -> None:
    if options.id:
        await _change_each(ledger, options, Action.CANCEL, ledger.service.cancel)
    else:
        states = JobState.WAITING, JobState.ACTIVE
        await _change_all(ledger, options, Action.CANCEL_ALL, ledger.service.cancel_all, *states)


async def _run_now(ledger: _Ledger, options: argparse.Namespace) -> None:
    if options.schedule is None:
        await _change_each(ledger, options, Action.RUN, ledger.service.run)
        return
    try:
        with ledger.recorded(Action.RUN_SCHEDULE, options.schedule) as entry:
            accepted = await ledger.service.run_schedule(options.schedule)
            entry.detail = f"job {accepted.job.id}"
    except UnknownTaskError as error:
        raise _with_hint(error, "declare it in TASK_MODULES or pass --app") from None
    _print_accepted(options, accepted)


async def _queues(ledger: _Ledger, options: argparse.Namespace) -> None:
    found = schemas.queue_list(await ledger.service.queues())
    if options.json:
        print_json(found)
        return
    columns = ("waiting", "scheduled", "active", "completed", "failed", "cancelled")
    rows = [
        (
            each.name,
            "paused" if each.paused else "-",
            str(each.consumers),
            *(str(getattr(each.counts, column)) for column in columns),
            f"{each.oldest_due:.0f} s",
        )
        for each in found.items
    ]
    print_table([("queue", "paused", "consumers", *columns, "oldest due"), *rows])


async def _pause(ledger: _Ledger, options: argparse.Namespace) -> None:
    if options.schedule is not None:
        if options.wait:
            raise ConfigurationError(["jobs pause: --wait is for a queue, not for --schedule"])
        with ledger.recorded(Action.PAUSE_SCHEDULE, options.schedule) as entry:
            found = await ledger.service.pause_schedule(options.schedule)
            entry.after = "paused"
        _print_schedule(options, found)
        return
    with ledger.recorded(Action.PAUSE_QUEUE, options.queue) as entry:
        await ledger.service.pause(options.queue)
        entry.after = "paused"
    if options.wait:
        await asyncio.sleep(_PAUSE_SECONDS)
        while (await ledger.service.queues())[options.queue].active:  # noqa: ASYNC110
            await asyncio.sleep(_WAIT_SECONDS)
    _print_paused(options, options.queue, paused=True)


async def _resume(ledger: _Ledger, options: argparse.Namespace) -> None:
    if options.schedule is not None:
        with ledger.recorded(Action.RESUME_SCHEDULE, options.schedule) as entry:
            found = await ledger.service.resume_schedule(options.schedule)
            entry.after = "running"
        _print_schedule(options, found)
        return
    with ledger.recorded(Action.RESUME_QUEUE, options.queue) as entry:
        await ledger.service.resume(options.queue)
        entry.after = "running"
    _print_paused(options, options.queue, paused=False)


def _print_schedule(options: argparse.Namespace, found: ScheduleTimes) -> None:
    _print_paused(options, found.task, view=schemas.schedule_view(found), paused=found.paused)


def _print_paused(
    options: argparse.Namespace, name: str, *, paused: bool, view: object = None
) -> None:
    if options.json:
        print_json(view or {"queue": name, "paused": paused})
    else:
        print(f"{plain(name)}  {'paused' if paused else 'resumed'}")


async def _change_each(
    ledger: _Ledger,
    options: argparse.Namespace,
    action: Action,
    change: Callable[[str], Awaitable[Job]],
) -> None:
    if options.command != "run" and _filter(options) != ANY_JOB:
        raise ConfigurationError([f"jobs {options.command}: pass ids or a filter, not both"])
    changed: list[Job] = []
    refused: list[str] = []
    try:
        for job_id in dict.fromkeys(options.id):
            try:
                with ledger.recorded(action, job_id) as entry:
                    changed.append(await change(job_id))
                    entry.after = str(changed[-1].state)
            except (JobNotFoundError, JobStateError) as error:
                refused.append(str(error))
    finally:  # after an outage, too: these were changed before it
        with suppress(BrokenPipeError):
            if options.json:
                print_json([schemas.summary(job) for job in changed])
            else:
                print_changed(changed)
    if refused:
        raise _RefusedError(*refused)


async def _change_all(
    ledger: _Ledger,
    options: argparse.Namespace,
    action: Action,
    change: Callable[..., Awaitable[BulkCount]],
    *states: JobState,
) -> None:
    """Change the jobs that the filter matches; ask first if it matches several."""
    wanted = _filter(options)
    if wanted == ANY_JOB:
        raise ConfigurationError([f"jobs {options.command}: pass ids, or a filter such as --queue"])
    most = None  # the service refuses other states
    if not options.yes and wanted.state in (None, *states):
        most = await _confirmed(ledger, options, wanted, states)
    with ledger.recorded(action, filter_in_words(wanted)) as entry:
        changed = await change(wanted, most=most)
        entry.detail = jobs_in_words(changed.count, more=changed.more)
    if changed.more:
        match = "may match"
        with suppress(LedgerUnavailableError):  # the jobs that were changed are shown without it
            left = await _count(ledger, wanted, states)
            changed, match = replace(changed, more=left > 0), "match"
        if changed.more:
            note(f"more jobs {match} by now; repeat the command")
    await _print_count(ledger, options, changed)


async def _confirmed(
    ledger: _Ledger, options: argparse.Namespace, wanted: JobFilter, states: Sequence[JobState]
) -> int | None:
    """Return how many jobs the operator agrees to change; None: all that match."""
    if (count := await _count(ledger, wanted, states)) <= 1:
        return 1
    many = f"more than {_MAX_COUNT} jobs" if count > _MAX_COUNT else f"{count} jobs"
    if sys.stdin is None or not sys.stdin.isatty():
        problem = f"jobs {options.command}: the filter matches {many}; repeat it with --yes"
        raise ConfigurationError([problem])
    if not agrees(f"{options.command} {many}?"):
        raise _RefusedError("nothing was changed")
    return None if count > _MAX_COUNT else count


async def _count(ledger: _Ledger, wanted: JobFilter, states: Sequence[JobState]) -> int:
    count = 0
    for state in states if wanted.state is None else (wanted.state,):
        of_state = replace(wanted, state=state)
        count += len(await _search(ledger.service, of_state, _MAX_COUNT + 1, ending=False))
    return count


async def _print_count(ledger: _Ledger, options: argparse.Namespace, changed: BulkCount) -> None:
    count = changed.count
    if not count and options.task is not None:
        # Without a job in any state the name may be misspelt.
        found = await ledger.service.search(JobFilter(task=options.task, limit=1))
        if not found.jobs:
            note(f"no job of a task {options.task!r} was found in any state")
    if options.json:
        print_json(schemas.job_count(changed))
    else:
        print(f"{count} job{'s' * (count != 1)}")


async def _schedules(ledger: _Ledger, options: argparse.Namespace) -> None:
    found = schemas.schedule_list(await ledger.service.schedules())
    if options.json:
        print_json(found)
        return
    rows = [
        (
            *(each.task, each.cron, each.timezone, each.last_run_at or "-"),
            "paused" if each.paused else each.next_run_at or "-",
        )
        for each in found.items
    ]
    print_table([("task", "cron", "time zone", "last run", "next run"), *rows])


_COMMANDS: Mapping[str, Command] = {
    "list": _list,
    "show": _show,
    "submit": _submit,
    "retry": _retry,
    "cancel": _cancel,
    "run": _run_now,
    "queues": _queues,
    "pause": _pause,
    "resume": _resume,
    "schedules": _schedules,
}


# -- arguments ------------------------------------------------------------------------------------


def _filter(options: argparse.Namespace) -> JobFilter:
    return JobFilter(
        queue=options.queue,
        task=options.task,
        state=None if options.state is None else JobState(options.state),
        code=options.code,
        created_before=options.before,
    )
