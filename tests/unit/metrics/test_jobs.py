"""Tests of the metrics of queues, and of jobs that this process accepts and runs."""

from datetime import UTC, datetime
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from tests.unit.metrics.reading import series, value

from viralfx.jobs.ledger import Accepted, QueueCounts
from viralfx.jobs.model import (
    Claim,
    JobDraft,
    JobError,
    Settlement,
    cancelled,
    completed,
    failed,
    handed_back,
    postponed,
    retried,
)
from viralfx.jobs.postgres.ledger_rows import job_of_draft
from viralfx.telemetry.metrics.jobs import JobMetrics, ProgressMetrics, QueueMetrics

ERROR = JobError(code="error", message="it failed")


def claim(task: str = "greet", attempt: int = 2) -> Claim:
    """Return a claim of a job that was due for 1.5 s."""
    unknown = ("correlation_id", "traceparent", "user_id", "created_at")
    fields: dict[str, Any] = dict.fromkeys(unknown)
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


def test_queue_metrics_are_those_of_the_last_count(registry: CollectorRegistry) -> None:
    """A scrape runs no query; before the first count there are no series."""
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
    """A job whose acceptance failed is not counted, a repeated idempotency key is."""
    draft = JobDraft(id="1", queue="default", task="greet", payload=b"null")
    with metrics.accepting(draft) as given:
        assert given is draft
    with pytest.raises(ConnectionError), metrics.accepting(draft):
        raise ConnectionError
    before = value(registry, "viralfx_jobs_accepted_total", queue="default", task="greet")
    times = dict.fromkeys(("created_at", "run_at"), datetime.now(UTC))
    for created in (True, False):
        metrics.accepted(Accepted(job_of_draft(draft, times), created=created))
    accepted = {"queue": "default", "task": "greet"}

    assert before is None
    assert value(registry, "viralfx_jobs_accepted_total", **accepted) == 2


@pytest.mark.parametrize(
    ("settlement", "outcome", "attempts"),
    [
        (None, "completed", 1),
        (completed(claim(), b"1"), "completed", 1),
        (failed(claim(), ERROR), "failed", 1),
        (retried(claim(), ERROR, 1.0), "retried", None),
        (postponed(claim(), ERROR, 1.0), "postponed", None),
        (handed_back(claim()), "handed_back", None),
        (cancelled(claim()), "cancelled", None),
    ],
)
def test_an_execution_is_counted_by_outcome(
    registry: CollectorRegistry,
    metrics: JobMetrics,
    settlement: Settlement | None,
    outcome: str,
    attempts: int | None,
) -> None:
    """The number of attempts is observed when the job has finished."""
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
def test_the_failure_counter_exists_before_the_first_failure(
    task: str, registry: CollectorRegistry
) -> None:
    """Otherwise ``increase`` would miss all failures before the first scrape of the series."""
    labels = {"queue": "default", "task": task}

    assert value(registry, "viralfx_job_executions_total", **labels, outcome="failed") == 0


def test_a_cancelled_execution_is_counted(registry: CollectorRegistry, metrics: JobMetrics) -> None:
    """Its outcome is ``abandoned``; another worker may still run the job."""
    with pytest.raises(TimeoutError), metrics.executing(claim()):
        raise TimeoutError
    labels = {"queue": "default", "task": "greet", "outcome": "abandoned"}

    assert value(registry, "viralfx_job_executions_total", **labels) == 1


def test_undeclared_tasks_share_one_label(registry: CollectorRegistry, metrics: JobMetrics) -> None:
    """A ledger may contain jobs of any version of the program."""
    with metrics.executing(claim("undeclared")) as ended:
        ended(None)
    before = series(registry)
    for number in range(10_000):
        with metrics.executing(claim(f"task{number}")) as ended:
            ended(None)
    labels = {"queue": "default", "task": "unknown", "outcome": "completed"}

    assert series(registry) == before
    assert value(registry, "viralfx_job_executions_total", **labels) == 10_001


def test_the_progress_of_jobs_is_a_mean_by_task(registry: CollectorRegistry) -> None:
    """A task without a running job that reports has no series."""
    progress = [("default", "rows.import", 0.25), ("default", "rows.import", 0.75)]
    registry.register(ProgressMetrics(lambda: progress))
    labels = {"queue": "default", "task": "rows.import"}

    assert value(registry, "viralfx_job_progress_ratio", **labels) == 0.5
    progress.clear()
    assert registry.get_sample_value("viralfx_job_progress_ratio", labels) is None
