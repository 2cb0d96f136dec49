"""The job service, and when it notifies workers."""

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from tests.unit.jobs.fleet import Fleet

from viralfx.adapters.codec import MsgspecCodec
from viralfx.core.correlation import bind_user_id, current_user_id
from viralfx.core.errors import LedgerUnavailableError, TransactionError
from viralfx.core.ids import new_job_id
from viralfx.core.keys import NamedKey
from viralfx.jobs.bulk import BulkCount
from viralfx.jobs.codec import PayloadError
from viralfx.jobs.model import (
    InvalidFilterError,
    JobDraft,
    JobFilter,
    JobNotFoundError,
    JobState,
    KeyConflictError,
    Unique,
    UnknownQueueError,
)
from viralfx.jobs.schedule import Schedule, UnknownScheduleError
from viralfx.jobs.service import MAX_PAYLOADS, JobService
from viralfx.jobs.submission import Submission
from viralfx.jobs.tasks import JobContext, Task, UnknownTaskError, declared_task, task
from viralfx.resilience.deadline import Deadline
from viralfx.resilience.policy import BackoffPolicy


class _Announced:
    """Records the announced jobs."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.due_in: list[float] = []

    def __call__(self, _queue: str, ids: Sequence[str], due_in: float) -> None:
        self.ids.extend(ids)
        self.due_in.append(due_in)


def _service(fleet: Fleet, announced: _Announced) -> JobService:
    return JobService(
        ledger=fleet.ledger,
        tasks=fleet.tasks,
        codec=MsgspecCodec(),
        queues=["default"],
        notify=announced,
        clock=fleet.clock,
    )


@pytest.mark.parametrize(
    ("delay", "due_in"), [(None, 0.0), (-3600.0, 0.0), (0.0, 0.0), (3600.0, 3600.0)]
)
async def test_workers_are_notified_of_jobs(
    fleet: Fleet, delay: float | None, due_in: float
) -> None:
    """With the seconds until the job is due."""
    announced = _Announced()
    run_at = None if delay is None else fleet.clock.now() + timedelta(seconds=delay)
    accepted = await _service(fleet, announced).accept("note", b"1", run_at=run_at)

    assert announced.ids == [accepted.job.id]
    assert announced.due_in == [pytest.approx(due_in, abs=0.01)]


async def test_workers_are_notified_once_of_a_repeated_request(fleet: Fleet) -> None:
    """The same key with another job is a conflict."""
    announced = _Announced()
    service = _service(fleet, announced)
    first = await service.accept("note", b"1", key="key")
    again = await service.accept("note", b"1", key="key")
    with pytest.raises(KeyConflictError, match=first.job.id):
        await service.accept("note", b"2", key="key")

    assert (first.created, again.created) == (True, False)
    assert announced.ids == [first.job.id]


async def test_workers_are_notified_of_jobs_that_are_retried_by_filter(fleet: Fleet) -> None:
    """A filter without a field, or with a state that cannot be retried, changes nothing."""
    announced = _Announced()
    service = _service(fleet, announced)
    fleet.declare("lose", _lose, retry=BackoffPolicy(attempts=1))
    fleet.start()
    lost = [await fleet.accept("lose") for _ in range(3)]
    await fleet.final(*lost)
    await fleet.stop()
    limited = JobFilter(task="lose", limit=50)
    for wanted in (JobFilter(), limited, JobFilter(state=JobState.WAITING)):
        with pytest.raises(InvalidFilterError):
            await service.retry_all(wanted)
    with pytest.raises(UnknownQueueError):
        await service.cancel_all(JobFilter(queue="nothing"))

    assert await service.retry_all(JobFilter(task="lose")) == BulkCount(3)
    assert sorted(announced.ids) == sorted(lost)
    assert set(announced.due_in) == {0.0}
    assert await service.cancel_all(JobFilter(task="lose"), most=2) == BulkCount(2, more=True)
    assert await service.cancel_all(JobFilter(task="lose"), most=None) == BulkCount(1)


async def test_an_outage_does_not_hide_the_jobs_that_were_changed_before_it(fleet: Fleet) -> None:
    """The error has their number and the cause; without such jobs it is the ledger's own."""
    service = _service(fleet, _Announced())
    for payload in (b"1", b"2", b"3"):
        await service.accept("note", payload)
    fleet.ledger.failing_after = frozenset({"cancel_all"})
    with pytest.raises(LedgerUnavailableError, match=r"^2 jobs were changed; then unavailable"):
        await service.cancel_all(JobFilter(task="note"), most=2)
    with pytest.raises(LedgerUnavailableError, match=r"^1 job was changed; then unavailable"):
        await service.cancel_all(JobFilter(task="note"))
    fleet.ledger.unavailable = frozenset({"cancel_all"})
    with pytest.raises(LedgerUnavailableError, match=r"^unavailable$"):
        await service.cancel_all(JobFilter(task="note"))


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"task": len}, "task must be a text, not builtin_function_or_method"),
        ({"queue": 1}, "queue must be a text, not int"),
        ({"before": datetime.now(UTC)}, "not datetime; a time is created_before"),
        ({"created_before": datetime(2026, 1, 7)}, "created_before must be a datetime with a"),  # noqa: DTZ001
        ({"created_before": "2026-01-07T03:00:00Z"}, "created_before must be a datetime with a"),
        ({"state": "done"}, "state must be one of waiting, active, completed, failed, cancelled"),
        ({"limit": "5"}, "limit must be a whole number, not str"),
        ({"limit": 0}, "limit must be at least 1: 0"),
    ],
)
def test_a_filter_checks_its_fields(fields: dict[str, Any], problem: str) -> None:
    """A value of another type would select other jobs, or fail in the ledger."""
    with pytest.raises((TypeError, ValueError), match=problem):
        JobFilter(**fields)

    by_text: dict[str, Any] = {"state": "failed"}
    assert JobFilter(**by_text) == JobFilter(state=JobState.FAILED)


async def _lose(_: object) -> None:
    raise RuntimeError("planted")


# -- options ---------------------------------------------------------------------------------


def _declared(fleet: Fleet, **options: Any) -> JobService:
    """Return a service that also knows a task with options."""
    fleet.tasks.add(
        Task(
            name="it",
            function=fleet.note,
            queue="default",
            payload_type=Any,
            wants_context=False,
            transactional=False,
            timeout=None,
            retry=None,
            **options,
        )
    )
    return _service(fleet, _Announced())


async def test_a_submission_overrides_the_options_of_its_task(fleet: Fleet) -> None:
    """Without its own, those of the task hold; a zero is an own one."""
    service = _declared(
        fleet, priority=5, unique=Unique.UNFINISHED, concurrency_key="tenant", concurrency=1
    )
    bind_user_id("ada")
    usual = await service.submit("it", {"tenant": 7, "n": 1})
    urgent = await service.submit("it", {"tenant": 7, "n": 2}, priority=9)
    plain = await service.submit("it", {"tenant": 8, "n": 3}, priority=0, unique="waiting")
    twin = await service.submit("it", {"n": 1, "tenant": 7}, priority=100)

    assert [each.job.priority for each in (usual, urgent, plain)] == [5, 9, 0]
    assert [each.job.concurrency_key for each in (usual, plain)] == ["7", "8"]
    assert {each.job.user_id for each in (usual, urgent, plain)} == {"ada"}
    assert (twin.created, twin.job) == (False, usual.job)


async def test_a_payload_without_the_concurrency_key_is_refused(fleet: Fleet) -> None:
    """The error names the field."""
    service = _declared(fleet, concurrency_key="tenant", concurrency=1)
    with pytest.raises(PayloadError, match="tenant"):
        await service.submit("it", {"customer": 7})

    assert await fleet.memory_ledger.page() == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"run_at": datetime(2030, 1, 1)}, "time zone"),  # noqa: DTZ001 - that is the mistake
        ({"run_at": timedelta(seconds=5)}, "datetime with a time zone"),
        ({"run_at": datetime.max.replace(tzinfo=timezone(timedelta(hours=-9)))}, "out of range"),
        ({"run_at": datetime.max.replace(tzinfo=UTC)}, "from 0001-01-02 to 9999-12-30"),
        ({"run_at": datetime.min.replace(tzinfo=UTC)}, "from 0001-01-02 to 9999-12-30"),
        ({"priority": 101}, "from -100 to 100"),
        ({"priority": True}, "from -100 to 100"),
        ({"priority": 0.5}, "from -100 to 100"),
        ({"unique": "always"}, "'waiting' or 'unfinished'"),
        ({"max_attempts": 0}, "from 1 to 10000: 0"),
        ({"max_attempts": 10_001}, "from 1 to 10000"),
        ({"max_attempts": True}, "from 1 to 10000"),
        ({"max_attempts": 2.0}, "from 1 to 10000"),
    ],
)
async def test_an_invalid_option_is_refused(
    fleet: Fleet, options: dict[str, Any], text: str
) -> None:
    """With what to write; nothing is accepted."""
    service = _service(fleet, _Announced())
    with pytest.raises(ValueError, match=text):
        await service.submit("note", 1, **options)
    with pytest.raises(ValueError, match=f"index 0: .*{text}"):
        await service.submit_many("note", [1], **options)

    assert await fleet.memory_ledger.page() == []


@pytest.mark.parametrize("key", [17, "", b"key"])
async def test_a_key_is_a_text(fleet: Fleet, key: Any) -> None:
    """Another type is refused in memory, too: Postgres cannot store it."""
    with pytest.raises(ValueError, match="key must be a text that is not empty"):
        await _service(fleet, _Announced()).submit("note", 1, key=key)


async def test_only_a_name_submits_its_keys(fleet: Fleet) -> None:
    """A text in the form of such a key is refused, also in a batch and in a draft."""
    service = _service(fleet, _Announced())
    text = "@ann order-17"
    with pytest.raises(ValueError, match="belong to the names of TOKENS"):
        await service.submit("note", 1, key=text)
    with pytest.raises(ValueError, match=r"index 0: .* belong to the names of TOKENS"):
        await service.accept_all([Submission(task="note", payload=b"1", key=text)])
    draft = JobDraft(id=new_job_id(), queue="default", task="note", payload=b"1", key=text)
    with pytest.raises(ValueError, match="belong to the names of TOKENS"):
        await service.accept_draft(draft)
    owned = await service.accept("note", b"1", key=NamedKey("ann", "order-17"))

    assert [job.key for job in await fleet.memory_ledger.page()] == [owned.job.key] == [text]


async def test_a_task_is_given_by_name_or_function(fleet: Fleet) -> None:
    """Another object is refused, and a function whose task this process does not know."""

    @task("mail")
    async def mail(to: str) -> None: ...

    service = _service(fleet, _Announced())
    with pytest.raises(UnknownTaskError, match=r"does not know the task 'mail' .*; add it to Op"):
        await service.submit(mail, "ada")
    declared = declared_task(mail)
    assert declared is not None
    fleet.tasks.add(declared)
    jobs = [await service.submit(mail, "ada"), *await service.submit_many(mail, ["bo"])]
    for other in (print, 7, None):
        with pytest.raises(TypeError, match="pass the name of a task, or a function that @task"):
            await service.submit(other, "ada")  # type: ignore[arg-type]

    assert [each.job.task for each in jobs] == ["mail", "mail"]


async def test_too_many_payloads_are_refused(fleet: Fleet) -> None:
    """Also an endless iterator of them."""
    with pytest.raises(ValueError, match=f"at most {MAX_PAYLOADS} payloads"):
        await _service(fleet, _Announced()).submit_many("note", itertools.count())

    assert await fleet.memory_ledger.page() == []


async def test_a_caller_waits_for_a_job(fleet: Fleet) -> None:
    """Until its final state, the timeout or the stop of the process."""
    service = _service(fleet, _Announced())
    fleet.declare("double", lambda number: asyncio.sleep(3.0, 2 * number))
    job_id = (await service.submit("double", 21)).job.id
    with pytest.raises(TimeoutError, match="the deadline of 2 s has passed"):
        await service.wait(job_id, timeout=2)
    fleet.start()
    waiting = [asyncio.create_task(service.wait(job_id)) for _ in range(3)]
    await asyncio.sleep(1.0)
    assert service.follower._followers == 0  # they take no place of an event stream
    jobs = await asyncio.gather(*waiting)
    service.follower.end()

    assert {(job.state, job.result) for job in jobs} == {(JobState.COMPLETED, b"42")}
    assert await service.wait(job_id) == jobs[0]
    late = await service.submit("double", 21, run_at=fleet.clock.now() + timedelta(hours=1))
    with pytest.raises(TimeoutError, match="this process stops before"):
        await service.wait(late.job.id)
    with pytest.raises(JobNotFoundError):
        await service.wait("no such job")
    accepted: Any = late  # the type checker refuses it as well
    for call in (service.get, service.wait, service.retry, service.cancel):
        with pytest.raises(TypeError, match=r"such as accepted\.job\.id, not Accepted$"):
            await call(accepted)


@pytest.mark.parametrize("field", ["task", "code", "created_before", "queue", "state"])
async def test_a_search_applies_every_field(fleet: Fleet, field: str) -> None:
    """Page by page, newest first."""
    service = _service(fleet, _Announced())
    jobs = [(await service.submit("note", number)).job for number in range(5)]
    values: dict[str, Any] = {
        "task": "other",
        "code": "error",
        "created_before": jobs[0].created_at - timedelta(hours=1),
        "state": JobState.FAILED,
        "queue": "default",
    }
    wanted = JobFilter(limit=2)
    if field != "queue":
        found = await service.search(replace(wanted, **{field: values[field]}))
        assert (list(found.jobs), found.before) == ([], None)
        return
    wanted = replace(wanted, queue="default")
    pages = [await service.search(wanted)]
    while (before := pages[-1].before) is not None:
        pages.append(await service.search(replace(wanted, before=before)))
    assert [[job.id for job in page.jobs] for page in pages] == [
        [jobs[4].id, jobs[3].id],
        [jobs[2].id, jobs[1].id],
        [jobs[0].id],
    ]


async def test_many_jobs_are_one_call(fleet: Fleet) -> None:
    """In the order of the payloads, and workers are notified once."""
    announced = _Announced()
    service = _service(fleet, announced)
    accepted = await service.submit_many("note", (number for number in range(500)))

    assert [each.job.payload for each in accepted] == [b"%d" % number for number in range(500)]
    assert fleet.ledger.count("accept") == 1
    assert announced.ids == [each.job.id for each in accepted]
    assert announced.due_in == [0.0]
    assert await service.submit_many("note", []) == []


async def test_a_job_has_the_queue_and_the_attempts_that_its_submission_asks_for(
    fleet: Fleet,
) -> None:
    """Alone and among many. A queue that no process knows is refused, and one of a worker not."""
    service = _service(fleet, _Announced())
    await fleet.memory_ledger.register("w", ["elsewhere"], 600.0)
    options: dict[str, Any] = {"queue": "elsewhere", "max_attempts": 7}
    one = await service.submit("note", 1, **options)
    many = await service.submit_many("note", [1, 2], **options)
    usual = await service.submit("note", 1)
    for queue in ("nowhere", ""):
        with pytest.raises(UnknownQueueError, match=f"there is no queue '{queue}'"):
            await service.submit("note", 1, queue=queue)
        with pytest.raises(UnknownQueueError, match="index 1: there is no queue"):
            await service.accept_all(
                [Submission(task="note", payload=b"1", queue=each) for each in ("default", queue)]
            )

    jobs = [each.job for each in (one, *many)]
    assert {(job.queue, job.max_attempts) for job in jobs} == {("elsewhere", 7)}
    assert (usual.job.queue, usual.job.max_attempts) == ("default", None)
    assert len(await fleet.memory_ledger.page()) == 4


@pytest.mark.parametrize("change", ["run", "retry", "resume", "run_schedule"])
async def test_workers_are_notified_of_jobs_that_become_due(fleet: Fleet, change: str) -> None:
    """As of new ones. A resumed queue announces its due jobs alone."""
    announced = _Announced()
    service = _service(fleet, announced)
    fleet.declare("tick", fleet.note, cron="*/5 * * * *")
    fleet.declare("lose", _lose, retry=BackoffPolicy(attempts=1))
    later = await service.submit("note", 1, run_at=fleet.clock.now() + timedelta(hours=1))
    job_id = later.job.id
    match change:
        case "run":
            assert (await service.run(job_id)).run_at == fleet.clock.now()
        case "retry":
            job_id = await fleet.accept("lose")
            fleet.start()
            await fleet.final(job_id)
            await fleet.stop()
            await service.retry(job_id)
        case "resume":
            await service.pause("default")
            job_id = await fleet.accept()
            await service.resume("default")
        case _:
            job_id = (await service.run_schedule("tick")).job.id

    assert announced.ids == [later.job.id, job_id]
    assert announced.due_in == [3600.0, 0.0]


async def test_a_schedule_is_paused_run_and_resumed(fleet: Fleet) -> None:
    """By its task, before any worker has declared it; another name is an error with a hint."""
    service = _service(fleet, _Announced())
    fleet.declare("tick", fleet.note, cron="*/5 * * * *", queue="default", priority=3)
    paused = await service.pause_schedule("tick")
    accepted = await service.run_schedule("tick")
    (state,) = await fleet.memory_ledger.schedules()
    resumed = await service.resume_schedule("tick")
    for change in (service.pause_schedule, service.resume_schedule, service.run_schedule):
        with pytest.raises(UnknownScheduleError, match=r"'tik' has .*; did you mean tick\?"):
            await change("tik")

    assert (paused.paused, resumed.paused) == (True, False)
    assert paused.next_runs == resumed.next_runs
    assert (accepted.job.task, accepted.job.payload, accepted.job.priority) == ("tick", b"null", 3)
    assert accepted.job.run_at == fleet.clock.now()
    assert (state.paused_at, state.last_run_at) == (fleet.clock.now(), None)


async def test_a_schedule_whose_limits_have_a_key_is_run(fleet: Fleet) -> None:
    """Its payload, null, has no key, as for its workers; a submission without one is refused."""
    service = _service(fleet, _Announced())
    limits: dict[str, Any] = {"concurrency": 1, "concurrency_key": "customer"}
    fleet.declare("all", fleet.note, cron="0 * * * *", payload_type=dict | None, **limits)
    accepted = await service.run_schedule("all")
    with pytest.raises(PayloadError, match="has no field 'customer'"):
        await service.submit("all", None)

    assert (accepted.job.payload, accepted.job.concurrency_key) == (b"null", "")


async def test_a_schedule_of_workers_alone_is_paused_and_not_run(fleet: Fleet) -> None:
    """To submit a job, this process must know its task."""
    service = _service(fleet, _Announced())
    await fleet.memory_ledger.declare_schedules([Schedule(task="far", cron="0 * * * *")], 60.0)

    assert (await service.pause_schedule("far")).paused
    with pytest.raises(UnknownTaskError, match="no task named 'far' here"):
        await service.run_schedule("far")
    assert [each.paused for each in await service.schedules()] == [True]


async def test_all_or_none_of_many_jobs_are_accepted(fleet: Fleet) -> None:
    """The error names the position of the wrong one, counted from 0."""
    announced = _Announced()
    service = _service(fleet, announced)
    first = await service.submit("note", 0, key="a")
    wrong: list[tuple[Submission, type[Exception]]] = [
        (Submission(task="note", payload=b"{"), PayloadError),
        (Submission(task="not", payload=b"1"), UnknownTaskError),
        (Submission(task="note", payload=b"1", key="a"), KeyConflictError),
    ]
    for submission, kind in wrong:
        batch = [Submission(task="note", payload=b"2", key="b"), submission]
        with pytest.raises(kind, match="the job at index 1: ") as raised:
            await service.accept_all(batch)
        assert vars(raised.value)["index"] == 1
    with pytest.raises(PayloadError, match="the job at index 2: object has no JSON"):
        await service.submit_many("note", [1, 2, object()])

    assert fleet.memory_ledger.submitted() == [first.job]
    assert announced.ids == [first.job.id]


async def test_jobs_in_memory_take_part_in_no_transaction(fleet: Fleet) -> None:
    """A connection is refused."""
    with pytest.raises(TransactionError, match="DATABASE_URL"):
        await _service(fleet, _Announced()).submit("note", 1, connection=object())


async def test_a_task_submits_jobs(fleet: Fleet) -> None:
    """They inherit the correlation id and the user of its own job."""
    service = _service(fleet, _Announced())
    users: list[str | None] = []

    async def parent(payload: int, context: JobContext) -> None:
        await context.submit("child", payload, key=f"{context.id}:child", priority=3)

    async def child(_: int) -> None:
        users.append(current_user_id())

    for transactional in (False, True):
        name = f"parent {transactional}"
        fleet.declare(name, parent, wants_context=True, transactional=transactional)
    fleet.declare("child", child)
    fleet.start(submit=service.submit)
    parents = []
    for transactional in (False, True):
        bind_user_id("ada" if transactional else None)
        accepted = await service.submit(f"parent {transactional}", 1)
        parents.append(accepted.job)
        await fleet.final(accepted.job.id)
    await asyncio.sleep(10.0)
    jobs = await fleet.memory_ledger.page()
    children = [job for job in reversed(jobs) if job.task == "child"]

    assert [job.state for job in jobs] == [JobState.COMPLETED] * 4
    assert [job.priority for job in children] == [3, 3]
    assert [job.correlation_id for job in children] == [
        each.id.replace("-", "") for each in parents
    ]
    assert [job.user_id for job in children] == users == [None, "ada"]


async def test_a_context_of_no_worker_submits_nothing(fleet: Fleet) -> None:
    """The error says so."""
    context = JobContext(
        id="1",
        attempt=1,
        deadline=Deadline(1.0, clock=fleet.clock),
        correlation_id="c",
        created_at=fleet.clock.now(),
    )
    with pytest.raises(RuntimeError, match="not made by a worker"):
        await context.submit("note", 1)
