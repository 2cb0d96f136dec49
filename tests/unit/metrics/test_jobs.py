"""The queues as they were counted last, and the jobs that this process accepts and runs."""

from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from tests.unit.metrics.reading import series, value

from viralfx.domain.jobs.job import (
    Claim,
    JobDraft,
    JobError,
    Settlement,
    completed,
    failed,
    handed_back,
    postponed,
    retried,
)
from viralfx.domain.jobs.ledger import QueueCounts
from viralfx.telemetry.metrics.jobs import JobMetrics, QueueMetrics

ERROR = JobError(code="error", message="it failed")


def claim(task: str = "greet", attempt: int = 2) -> Claim:
    """Make a claim of a job that was due for 1.5 s."""
    fields: dict[str, Any] = {"correlation_id": None, "traceparent": None, "created_at": None}
    return Claim(
        id="1",
        queue="default",
        task=task,
        payload=b"null",
        worker="w",
        number=1,
        attempt=attempt,
        crashes=0,
        due_since=1.5,
        **fields,
    )


@pytest.fixture
def registry() -> CollectorRegistry:
    """Return an empty registry."""
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> JobMetrics:
    """Return metrics that know one task."""
    return JobMetrics(registry, {"greet": "default"}, ["default"])


def test_queues_are_as_they_were_counted_last(registry: CollectorRegistry) -> None:
    """A scrape asks nobody, and before the first count there is nothing."""
    counts: dict[str, QueueCounts] = {}
    registry.register(QueueMetrics(lambda: counts))
    before = series(registry)
    counts["default"] = QueueCounts(
        waiting=1, scheduled=2, active=3, completed=4, failed=5, cancelled=6, oldest_due=7.5
    )
    jobs = {
        state: value(registry, "viralfx_queue_jobs", queue="default", state=state)
        for state in ("waiting", "scheduled", "active")
    }
    finished = {
        state: value(registry, "viralfx_queue_finished_jobs_total", queue="default", state=state)
        for state in ("completed", "failed", "cancelled")
    }

    assert before == 0
    assert jobs == {"waiting": 1, "scheduled": 2, "active": 3}
    assert finished == {"completed": 4, "failed": 5, "cancelled": 6}
    assert value(registry, "viralfx_queue_oldest_due_seconds", queue="default") == 7.5
    assert value(registry, "viralfx_queue_consumers", queue="default") == 0


def test_a_job_is_counted_once_it_is_accepted(
    registry: CollectorRegistry, metrics: JobMetrics
) -> None:
    """One that could not be accepted is not."""
    draft = JobDraft(id="1", queue="default", task="greet", payload=b"null")
    with metrics.accepting(draft) as given:
        assert given is draft
    with pytest.raises(ConnectionError), metrics.accepting(draft):
        raise ConnectionError

    accepted = {"queue": "default", "task": "greet"}
    assert value(registry, "viralfx_jobs_accepted_total", **accepted) == 1


@pytest.mark.parametrize(
    ("settlement", "outcome", "attempts"),
    [
        (None, "completed", 1),
        (completed(claim(), b"1"), "completed", 1),
        (failed(claim(), ERROR), "failed", 1),
        (retried(claim(), ERROR, 1.0), "retried", None),
        (postponed(claim(), ERROR, 1.0), "postponed", None),
        (handed_back(claim()), "handed_back", None),
    ],
)
def test_an_execution_is_counted_by_what_became_of_it(
    registry: CollectorRegistry,
    metrics: JobMetrics,
    settlement: Settlement | None,
    outcome: str,
    attempts: int | None,
) -> None:
    """Its attempts are counted when the job is done with."""
    with metrics.executing(claim()) as ended:
        ended(settlement)
    labels = {"queue": "default", "task": "greet"}
    executions = value(registry, "viralfx_job_executions_total", **labels, outcome=outcome)

    assert executions == 1
    assert value(registry, "viralfx_job_wait_seconds_sum", **labels) == 1.5
    assert value(registry, "viralfx_job_duration_seconds_count", **labels) == 1
    assert value(registry, "viralfx_job_attempts_count", **labels) == attempts


@pytest.mark.usefixtures("metrics")
@pytest.mark.parametrize("task", ["greet", "unknown"])
def test_nothing_failed_is_told_before_something_does(
    task: str, registry: CollectorRegistry
) -> None:
    """Or two hundred failures between two scrapes would be where the counter began: no increase."""
    labels = {"queue": "default", "task": task}

    assert value(registry, "viralfx_job_executions_total", **labels, outcome="failed") == 0


def test_an_execution_that_was_cut_is_counted_too(
    registry: CollectorRegistry, metrics: JobMetrics
) -> None:
    """As abandoned: what becomes of its job others decide."""
    with pytest.raises(TimeoutError), metrics.executing(claim()):
        raise TimeoutError
    labels = {"queue": "default", "task": "greet", "outcome": "abandoned"}

    assert value(registry, "viralfx_job_executions_total", **labels) == 1


def test_ten_thousand_tasks_of_others_are_one_label(
    registry: CollectorRegistry, metrics: JobMetrics
) -> None:
    """A ledger may hold jobs of any version of the program."""
    with metrics.executing(claim("never heard of")) as ended:
        ended(None)
    before = series(registry)
    for number in range(10_000):
        with metrics.executing(claim(f"task{number}")) as ended:
            ended(None)
    labels = {"queue": "default", "task": "unknown", "outcome": "completed"}

    assert series(registry) == before
    assert value(registry, "viralfx_job_executions_total", **labels) == 10_001
