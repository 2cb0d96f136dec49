"""The debug log lines of jobs."""

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from tests.unit.jobs.fleet import Fleet

from viralfx.adapters.codec import MsgspecCodec
from viralfx.core.correlation import correlated, current_correlation_id
from viralfx.jobs.hooks import CombinedHooks
from viralfx.jobs.model import KeyConflictError, correlation_id_of_job
from viralfx.jobs.service import JobService
from viralfx.resilience.policy import Backoff, BackoffPolicy
from viralfx.telemetry.logging.events import JobLog

LOGGER = logging.getLogger("viralfx.jobs")
FIELDS = ("job", "task", "queue", "attempt", "code")
QUICKLY = BackoffPolicy(attempts=2, backoff=Backoff(base=1.0))


class Lines(logging.Handler):
    """Records the log lines of jobs with their correlation ids."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.shown: list[tuple[str, str | None, dict[str, object]]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Record a line about a job."""
        own = vars(record)
        if "job" not in own:
            return
        correlation_id = own.get("correlationId") or current_correlation_id()
        fields = {name: own[name] for name in FIELDS if name in own}
        self.records.append(record)
        self.shown.append((record.getMessage(), correlation_id, fields))

    def messages(self) -> list[str]:
        """Return the messages."""
        return [message for message, _, _ in self.shown]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """Return the log lines from debug on."""
    kept, before = Lines(), LOGGER.level
    LOGGER.addHandler(kept)
    LOGGER.setLevel(logging.DEBUG)
    yield kept
    LOGGER.setLevel(before)
    LOGGER.removeHandler(kept)


def service_of(fleet: Fleet) -> JobService:
    """Return a service with the job log."""
    return JobService(
        ledger=fleet.ledger,
        tasks=fleet.tasks,
        codec=MsgspecCodec(),
        queues=["default"],
        hooks=JobLog(CombinedHooks()),
    )


async def test_a_completed_job_has_three_log_lines(fleet: Fleet, lines: Lines) -> None:
    """All with the correlation id of its request."""
    with correlated("order-17"):
        accepted = await service_of(fleet).accept("sleep", b"0.25")
    job = accepted.job
    # The correlation id of the code that starts a worker must not become that of a job.
    fleet.start(hooks=JobLog(CombinedHooks()))
    await fleet.final(job.id)
    names = {"job": job.id, "task": "sleep", "queue": "default"}

    assert lines.shown == [
        ("Job accepted", "order-17", names),
        ("Job started", "order-17", {**names, "attempt": 1}),
        ("Job completed", "order-17", {**names, "attempt": 1}),
    ]
    assert {record.levelno for record in lines.records} == {logging.DEBUG}
    assert vars(lines.records[-1])["duration"] >= 0


async def test_a_job_without_a_request_has_its_own_correlation_id(
    fleet: Fleet, lines: Lines
) -> None:
    """From its acceptance on."""
    accepted = await service_of(fleet).accept("note", b"1")
    fleet.start(hooks=JobLog(CombinedHooks()))
    await fleet.final(accepted.job.id)

    assert len(lines.shown) == 3
    assert {correlation_id for _, correlation_id, _ in lines.shown} == {
        correlation_id_of_job(accepted.job)
    }


async def test_a_repeated_request_logs_the_first_job(fleet: Fleet, lines: Lines) -> None:
    """With the correlation id of the later request."""
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


async def test_a_failure_is_logged_once(fleet: Fleet, lines: Lines) -> None:
    """Each execution has one last line."""

    async def fail(_: object) -> None:
        raise ValueError("it does not work")

    fleet.declare("it", fail, retry=QUICKLY)
    fleet.start(hooks=JobLog(CombinedHooks()))
    await fleet.final(await fleet.accept("it"))

    assert lines.messages() == [
        "Job started",
        "Job attempt failed",
        "Job started",
        "Job failed",
    ]


async def test_postponed_and_handed_back_jobs_are_logged(fleet: Fleet, lines: Lines) -> None:
    """One job has a payload of another version, the other runs during the drain."""
    fleet.declare("number", fleet.note, payload_type=int)
    await fleet.accept("sleep", "100.0")
    await fleet.accept("number", '"text"')
    worker = fleet.start(hooks=JobLog(CombinedHooks()), durable=True)
    await fleet.until(lambda: "Job postponed" in lines.messages())
    await worker.drain(1.0)

    assert sorted(set(lines.messages())) == [
        "Job handed back",
        "Job postponed",
        "Job started",
        "Jobs left to other workers: their payload does not fit the task here",
    ]


class Untouchable:
    """Raises when one of its attributes is read."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"{name} was read")


def test_the_job_log_costs_nothing_while_its_level_is_off(lines: Lines) -> None:
    """An execution is wrapped by the other hooks alone, and no attribute of a job is read."""
    LOGGER.setLevel(logging.INFO)
    wrapper = object()
    hooks: Any = SimpleNamespace(executing=lambda _: wrapper, accepted=lambda _: None)
    log = JobLog(hooks)
    job: Any = Untouchable()
    log.accepted(job)

    assert log.executing(job) is wrapper
    assert lines.shown == []
