"""The health check of the queues."""

from collections.abc import Mapping, Sequence

import pytest
from tests.unit.jobs.fleet import Fleet

from viralfx.core.errors import LedgerUnavailableError, NotMigratedError
from viralfx.domain.health.model import Status
from viralfx.jobs.health import BacklogCheck
from viralfx.jobs.ledger import QueueCounts, UnrunnableJobs
from viralfx.jobs.model import PAYLOAD, UNKNOWN_TASK

BUSY = QueueCounts(waiting=7, active=2, completed=100, failed=3, oldest_due=1.5, consumers=2)


def check_of(counts: Mapping[str, QueueCounts], **more: object) -> BacklogCheck:
    """Return a check that sees these counts."""

    async def count() -> Mapping[str, QueueCounts]:
        return counts

    return BacklogCheck(counts=count, **more)  # type: ignore[arg-type]


async def test_details_have_the_fields_of_the_guide() -> None:
    """Further counts are added."""
    seen = await check_of({"default": BUSY, "idle": QueueCounts()}).check()

    assert (seen.status, seen.message, seen.code) == (Status.PASS, "All queues are healthy", None)
    assert seen.details == [
        {
            "name": "default",
            "status": "ok",
            "metrics": {
                "waiting": 7,
                "active": 2,
                "completed": 100,
                "failed": 3,
                "scheduled": 0,
                "cancelled": 0,
                "oldestDue": 1.5,
                "consumers": 2,
            },
        },
        {
            "name": "idle",
            "status": "ok",
            "metrics": {
                "waiting": 0,
                "active": 0,
                "completed": 0,
                "failed": 0,
                "scheduled": 0,
                "cancelled": 0,
                "oldestDue": 0,
                "consumers": 0,
            },
        },
    ]


@pytest.mark.parametrize(
    ("queue", "code", "message"),
    [
        (
            QueueCounts(waiting=3, oldest_due=61.0, consumers=1),
            "backlog",
            "q: 3 jobs wait, one for 61 s",
        ),
        (QueueCounts(waiting=3, oldest_due=60.0, consumers=1), None, "All queues are healthy"),
        (
            QueueCounts(waiting=3, oldest_due=6.0),
            "no_consumers",
            "q: 3 jobs wait and no worker consumes the queue",
        ),
        (
            QueueCounts(waiting=3, oldest_due=61.0, consumers=3, blocked=1),
            "blocked",
            "q: the event loop of 1 of 3 workers is blocked: the log names the job",
        ),
        (QueueCounts(waiting=3, oldest_due=4.0), None, "All queues are healthy"),
        (QueueCounts(scheduled=3), None, "All queues are healthy"),
    ],
)
async def test_overdue_jobs_and_missing_consumers_warn(
    queue: QueueCounts, code: str | None, message: str
) -> None:
    """A queue without consumers warns only after a worker had time to start."""
    seen = await check_of({"q": queue, "other": BUSY}).check()

    assert (seen.code, seen.message) == (code, message)
    assert seen.status is (Status.WARN if code else Status.PASS)
    assert [each["status"] for each in seen.details if isinstance(each, dict)] == [
        "warn" if code else "ok",
        "ok",
    ]


@pytest.mark.parametrize(
    ("code", "count", "message"),
    [
        (UNKNOWN_TASK, 12, "q: 12 jobs of task x wait and no worker knows it"),
        (UNKNOWN_TASK, 1, "q: 1 job of task x waits and no worker knows it"),
        (UNKNOWN_TASK, 1000, "q: at least 1000 jobs of task x wait and no worker knows it"),
        (PAYLOAD, 12, "q: 12 jobs of task x wait and no worker can decode their payloads"),
        (PAYLOAD, 1, "q: 1 job of task x waits and no worker can decode its payload"),
    ],
)
async def test_jobs_that_no_worker_can_run_warn(code: str, count: int, message: str) -> None:
    """It looks for them only while jobs are overdue: the query would cost idle workers."""
    asked = 0

    async def unrunnable() -> Sequence[UnrunnableJobs]:
        nonlocal asked
        asked += 1
        return [UnrunnableJobs("q", "x", code, count)]

    late = QueueCounts(waiting=3, oldest_due=6.0, consumers=1)
    seen = await check_of({"q": late, "other": late}, unrunnable=unrunnable).check()
    early = await check_of({"q": BUSY}, unrunnable=unrunnable).check()

    assert (seen.status, seen.code, seen.message) == (Status.WARN, code, message)
    assert (early.status, asked) == (Status.PASS, 1)


async def test_each_task_that_no_worker_can_run_is_named() -> None:
    """The code is that of the first one."""

    async def unrunnable() -> Sequence[UnrunnableJobs]:
        return [UnrunnableJobs("q", "a", PAYLOAD, 2), UnrunnableJobs("q", "b", UNKNOWN_TASK, 1)]

    late = QueueCounts(waiting=3, oldest_due=6.0, consumers=1)
    seen = await check_of({"q": late}, unrunnable=unrunnable).check()

    assert seen.code == PAYLOAD
    assert seen.message == (
        "q: 2 jobs of task a wait and no worker can decode their payloads; 1 job of task b waits"
        " and no worker knows it"
    )


async def test_zero_turns_the_backlog_warning_off() -> None:
    """The backlog limit is zero."""
    old = QueueCounts(waiting=3, oldest_due=10_000.0, consumers=1)

    assert (await check_of({"q": old}, warn_after=0.0).check()).status is Status.PASS


async def test_the_remark_is_added_to_every_message() -> None:
    """In memory mode it says that jobs end with the process."""
    late = QueueCounts(waiting=1, oldest_due=100.0, consumers=1)
    messages = [
        (await check_of({"q": queue}, remark=", in memory").check()).message
        for queue in (BUSY, late)
    ]

    assert messages == [
        "All queues are healthy, in memory",
        "q: 1 jobs wait, one for 100 s, in memory",
    ]


@pytest.mark.parametrize(
    ("error", "code"),
    [(LedgerUnavailableError("away"), "unavailable"), (NotMigratedError("no"), "not_migrated")],
)
async def test_an_unavailable_ledger_fails_the_check(error: Exception, code: str) -> None:
    """The code names the cause."""

    async def count() -> Mapping[str, QueueCounts]:
        raise error

    seen = await BacklogCheck(counts=count).check()

    assert (seen.status, seen.code, seen.error) == (Status.FAIL, code, error)


async def test_one_check_counts_once(fleet: Fleet) -> None:
    """For all queues together."""
    fleet.start(queues={"default": 1, "other": 1})
    for _ in range(2):
        await fleet.accept("sleep", "10.0")
    await fleet.until(lambda: fleet.running)
    seen = await BacklogCheck(counts=fleet.ledger.counts).check()

    assert fleet.ledger.count("counts") == 1
    by_name = {each["name"]: each["metrics"] for each in seen.details if isinstance(each, dict)}
    assert by_name["default"]["active"] == 1
    assert by_name["default"]["waiting"] == 1
    assert by_name["other"]["consumers"] == 1


async def test_unrecorded_outcomes_warn() -> None:
    """Before any other problem of their queue."""
    late = QueueCounts(waiting=3, oldest_due=6.0)

    async def counts() -> dict[str, QueueCounts]:
        return {"a": late, "b": BUSY, "c": BUSY}

    seen = await BacklogCheck(counts=counts, unrecorded=lambda: {"a": 1, "c": 20}).check()

    assert (seen.status, seen.code) == (Status.WARN, "unrecorded")
    assert seen.message == (
        "a: 1 outcome is not recorded for longer than a lease: the log has the jobs;"
        " c: 20 outcomes are not recorded for longer than a lease: the log has the jobs"
    )
