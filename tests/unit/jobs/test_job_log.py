"""The lines at debug of what becomes of jobs."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from tests.unit.jobs.fleet import Fleet

from viralfx.adapters.codec import MsgspecCodec
from viralfx.domain.correlation import correlated, current_correlation_id
from viralfx.domain.jobs.job import KeyConflictError, conversation_of
from viralfx.domain.jobs.observing import Unobserved
from viralfx.domain.jobs.service import JobService
from viralfx.domain.jobs.tasks import TaskRegistry
from viralfx.domain.resilience.backoff import Backoff
from viralfx.domain.resilience.retry_policy import BackoffPolicy
from viralfx.telemetry.job_log import JobLog

LOGGER = logging.getLogger("viralfx.jobs")
FIELDS = ("job", "task", "queue", "attempt", "code")
QUICKLY = BackoffPolicy(attempts=2, backoff=Backoff(base=1.0))


class Lines(logging.Handler):
    """Keeps the lines of jobs, with the correlation id that each is written with."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.shown: list[tuple[str, str | None, dict[str, object]]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line, where it is of one job."""
        own = vars(record)
        if "job" not in own:
            return
        conversation = own.get("correlationId") or current_correlation_id()
        fields = {name: own[name] for name in FIELDS if name in own}
        self.records.append(record)
        self.shown.append((record.getMessage(), conversation, fields))

    def messages(self) -> list[str]:
        """Return what was said."""
        return [message for message, _, _ in self.shown]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """Return what is logged, at debug and above."""
    kept, before = Lines(), LOGGER.level
    LOGGER.addHandler(kept)
    LOGGER.setLevel(logging.DEBUG)
    yield kept
    LOGGER.setLevel(before)
    LOGGER.removeHandler(kept)


def service_of(fleet: Fleet) -> JobService:
    """Return who accepts jobs, with the log."""
    return JobService(
        ledger=fleet.ledger,
        tasks=fleet.tasks,
        codec=MsgspecCodec(),
        queues=["default"],
        observer=JobLog(Unobserved()),
    )


async def test_a_job_that_goes_well_is_three_lines(fleet: Fleet, lines: Lines) -> None:
    """All of the conversation that it was asked for in, and with its id."""
    with correlated("order-17"):
        accepted = await service_of(fleet).accept("sleep", b"0.25")
    job = accepted.job
    # Whoever starts a worker has a conversation of no job.
    fleet.start(observer=JobLog(Unobserved()))
    await fleet.final(job.id)
    names = {"job": job.id, "task": "sleep", "queue": "default"}

    assert lines.shown == [
        ("Job accepted", "order-17", names),
        ("Job started", "order-17", {**names, "attempt": 1}),
        ("Job completed", "order-17", {**names, "attempt": 1}),
    ]
    assert {record.levelno for record in lines.records} == {logging.DEBUG}
    assert vars(lines.records[-1])["duration"] >= 0


async def test_a_job_that_nobody_asked_for_is_a_conversation_of_its_own(
    fleet: Fleet, lines: Lines
) -> None:
    """From its acceptance on."""
    accepted = await service_of(fleet).accept("note", b"1")
    fleet.start(observer=JobLog(Unobserved()))
    await fleet.final(accepted.job.id)

    assert len(lines.shown) == 3
    assert {conversation for _, conversation, _ in lines.shown} == {conversation_of(accepted.job)}


async def test_a_job_that_is_asked_for_again_is_named_to_who_asks(
    fleet: Fleet, lines: Lines
) -> None:
    """It is the one that is kept, and the conversation that of the later request."""
    service = service_of(fleet)
    with correlated("order-17"):
        first = await service.accept("note", b"1", key="key")
    with correlated("order-18"):
        await service.accept("note", b"1", key="key")
        with pytest.raises(KeyConflictError):
            await service.accept("note", b"2", key="key")
    names = {"job": first.job.id, "task": "note", "queue": "default"}

    assert lines.shown == [
        ("Job accepted", "order-17", names),
        ("Job accepted before", "order-18", names),
    ]


async def test_what_goes_wrong_is_said_once(fleet: Fleet, lines: Lines) -> None:
    """Each execution has an end, and a failure the line that it has at any level."""

    async def fail(_: object) -> None:
        raise ValueError("it does not work")

    fleet.declare("it", fail, retry=QUICKLY)
    fleet.start(observer=JobLog(Unobserved()))
    await fleet.final(await fleet.accept("it"))

    assert lines.messages() == [
        "Job started",
        "Job attempt failed",
        "Job started",
        "Job failed",
    ]


async def test_what_did_not_end_here_is_said(fleet: Fleet, lines: Lines) -> None:
    """A job that this worker does not know, and one that it leaves."""
    await fleet.accept("sleep", "100.0")
    await fleet.accept("unknown", queue="default")
    observer = JobLog(Unobserved())
    tasks = TaskRegistry()
    tasks.add(fleet.tasks.find("sleep"))
    worker = fleet.start(tasks=tasks, observer=observer, durable=True)
    await fleet.until(lambda: "Job postponed" in lines.messages())
    await worker.drain(1.0)

    assert sorted(set(lines.messages())) == [
        "Job handed back",
        "Job postponed",
        "Job started",
        "Jobs postponed: their task is unknown here",
    ]


class Untouchable:
    """Anything that fails when it is looked at."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"somebody looked at {name}")


def test_nothing_is_looked_at_while_nobody_wants_it(lines: Lines) -> None:
    """A job is surrounded by the other observer alone, as if there were no log."""
    LOGGER.setLevel(logging.INFO)
    within = Unobserved()
    log = JobLog(within)
    job: Any = Untouchable()
    surroundings = log.executing(job)
    log.accepted(job)

    assert surroundings is within.executing(job)
    assert lines.shown == []
