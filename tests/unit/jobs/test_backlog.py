"""The queues as a health check."""

from collections.abc import Mapping

import pytest
from tests.unit.jobs.fleet import Fleet

from viralfx.domain.health import Status
from viralfx.domain.jobs.backlog import BacklogCheck
from viralfx.domain.jobs.job import LedgerUnavailableError, NotMigratedError
from viralfx.domain.jobs.ledger import QueueCounts

BUSY = QueueCounts(waiting=7, active=2, completed=100, failed=3, oldest_due=1.5, consumers=2)


def check_of(counts: Mapping[str, QueueCounts], **more: object) -> BacklogCheck:
    """Return a check that sees these counts."""

    async def count() -> Mapping[str, QueueCounts]:
        return counts

    return BacklogCheck(counts=count, **more)  # type: ignore[arg-type]


async def test_queues_are_shown_as_the_guide_shows_them() -> None:
    """With more numbers beside its own."""
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
        (QueueCounts(waiting=3, oldest_due=4.0), None, "All queues are healthy"),
        (QueueCounts(scheduled=3), None, "All queues are healthy"),
    ],
)
async def test_what_waits_too_long_is_told(
    queue: QueueCounts, code: str | None, message: str
) -> None:
    """And what nobody will run, unless a worker may just be starting."""
    seen = await check_of({"q": queue, "other": BUSY}).check()

    assert (seen.code, seen.message) == (code, message)
    assert seen.status is (Status.WARN if code else Status.PASS)
    assert [each["status"] for each in seen.details if isinstance(each, dict)] == [
        "warn" if code else "ok",
        "ok",
    ]


async def test_without_a_limit_no_wait_is_too_long() -> None:
    """Zero is none."""
    old = QueueCounts(waiting=3, oldest_due=10_000.0, consumers=1)

    assert (await check_of({"q": old}, warn_after=0.0).check()).status is Status.PASS


async def test_a_remark_is_made_whatever_is_seen() -> None:
    """That the jobs end with the process, for example."""
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
async def test_a_ledger_that_does_not_answer_fails_the_check(error: Exception, code: str) -> None:
    """With a code for why."""

    async def count() -> Mapping[str, QueueCounts]:
        raise error

    seen = await BacklogCheck(counts=count).check()

    assert (seen.status, seen.code, seen.error) == (Status.FAIL, code, error)


async def test_one_look_is_one_count(fleet: Fleet) -> None:
    """Of all queues at once."""
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
