"""The wiring of jobs: the running process, settings, shutdown and imports."""

import asyncio
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
from tests.manual_clock import ManualClock
from tests.unit.metrics.reading import family, value
from tests.virtual_time import LoopClock, run_in_virtual_time

from viralfx import JobContext, task
from viralfx.bootstrap import assemble
from viralfx.core.clock import Clock
from viralfx.core.errors import ConfigurationError, LedgerUnavailableError, WorkLostError, line_of
from viralfx.domain.health.model import Status
from viralfx.domain.operations import Operations
from viralfx.domain.shutdown import Outcome, Phase
from viralfx.jobs.memory import MemoryJobLedger, MemoryNotifier
from viralfx.jobs.model import Job, JobFilter, JobState
from viralfx.jobs.tasks import declared_task, mark
from viralfx.jobs.worker.worker import WorkerState
from viralfx.settings import DatabaseSettings, JobSettings, Secret, Settings

POSTGRES = Settings(database_url=Secret("postgresql://db/app"))


class Work:
    """A task that takes time on the clock, and writes down what it did."""

    def __init__(self, clock: Clock) -> None:
        self.done: list[float] = []
        self.running = 0
        self.most_running = 0
        self.attempts: list[int] = []

        @task("work")
        async def work(seconds: float) -> None:
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            try:
                await clock.sleep(seconds)
                self.done.append(seconds)
            finally:
                self.running -= 1

        @task("fail", queue="analytics")
        async def fail(_: object, context: JobContext) -> None:
            self.attempts.append(context.attempt)
            raise RuntimeError("planted")

        self.tasks = (work, fail)


@pytest.fixture
def work(clock: ManualClock) -> Work:
    """Return what there is to do."""
    return Work(clock)


def problems(
    *functions: Callable[..., object], settings: Settings | None = None
) -> tuple[str, ...]:
    """Return what is said about tasks; nothing when they are fine."""
    try:
        assemble(settings or Settings(), tasks=functions)
    except ConfigurationError as error:
        return error.problems
    return ()


async def ready(operations: Operations, clock: ManualClock) -> None:
    """Start, and let what works begin."""
    await operations.start()
    operations.application_ready()
    await clock.settle()


# -- who runs jobs ---------------------------------------------------------------------------


def test_only_the_memory_ledger_runs_an_embedded_worker_by_default() -> None:
    """Elsewhere a worker does it; either can be said otherwise."""
    memory, postgres = assemble(Settings()).jobs, assemble(POSTGRES).jobs

    assert (memory.in_memory, memory.worker is not None) == (True, True)
    assert (postgres.in_memory, postgres.worker) == (False, None)

    memory.disable_worker()
    postgres.enable_worker()

    assert (memory.worker, postgres.worker is not None) == (None, True)


def test_failure_counts_are_zero_from_the_start(work: Work) -> None:
    """Of each task in its queue, and of jobs in any queue that no task is for."""
    registry = assemble(Settings(), tasks=work.tasks).metrics.registry
    labels = {
        (sample.labels["queue"], sample.labels["task"])
        for sample in family(registry, "viralfx_job_executions").samples
        if sample.name.endswith("_total") and sample.labels["outcome"] == "failed"
    }

    assert labels >= {("default", "work"), ("analytics", "fail"), ("default", "default.prune")}
    assert {queue for queue, task in labels if task == "unknown"} == set(Settings().queues)


async def test_stale_counts_expire_after_three_intervals_and_a_timeout(
    clock: ManualClock, work: Work
) -> None:
    """Counts stay valid as long as the result of a check; then alerts use other instances."""
    assembly = assemble(Settings(), tasks=work.tasks, clock=clock)
    registry, operations = assembly.metrics.registry, assembly.operations
    await ready(operations, clock)
    await operations.monitor.stop()
    seen = []
    for seconds in (0.0, 16.9, 0.2):
        await clock.advance(seconds)
        seen.append(value(registry, "viralfx_queue_consumers", queue="default"))

    assert seen == [0, 0, None]
    await operations.shutdown.run()


def test_a_pool_too_small_for_a_worker_is_refused() -> None:
    """Its own tasks could keep it from renewing its lease."""
    jobs = assemble(
        Settings(
            database_url=Secret("postgresql://db/app"), db=DatabaseSettings(pool_min=1, pool_max=2)
        )
    ).jobs

    with pytest.raises(ConfigurationError, match="DB_POOL_MAX: 2 is too few to run jobs: "):
        jobs.enable_worker()


async def test_the_worker_starts_when_the_application_is_ready(
    clock: ManualClock, work: Work
) -> None:
    """Jobs that are accepted earlier wait for the start."""
    assembly = assemble(Settings(), tasks=work.tasks, clock=clock)
    worker = assembly.jobs.worker
    await assembly.operations.start()
    await assembly.jobs.service.submit("work", 0.0)
    await clock.settle()

    assert worker is not None
    assert (worker.state, work.done) == (WorkerState.NEW, [])

    assembly.operations.application_ready()
    assembly.operations.application_ready()
    await clock.settle()

    assert (worker.state, work.done) == (WorkerState.RUNNING, [0.0])
    await assembly.operations.shutdown.run()
    assert worker.state is WorkerState.STOPPED


async def test_an_embedded_worker_runs_each_queue_by_its_concurrency(
    clock: ManualClock, work: Work
) -> None:
    """So many at a time, as JOB_CONCURRENCY says."""
    settings = Settings(job=JobSettings(concurrency=2))
    assembly = assemble(settings, tasks=work.tasks, clock=clock)
    await ready(assembly.operations, clock)
    for _ in range(6):
        await assembly.jobs.service.submit("work", 1.0)
    await clock.advance(3.0)

    assert (len(work.done), work.most_running) == (6, 2)
    await assembly.operations.shutdown.run()


async def test_attempts_follow_the_settings(clock: ManualClock, work: Work) -> None:
    """JOB_MAX_ATTEMPTS attempts, 1, 2, 4 ... s apart (docs/jobs.md); then the job has failed."""
    settings = Settings(job=JobSettings(max_attempts=2))
    assembly = assemble(settings, tasks=work.tasks, clock=clock)
    await ready(assembly.operations, clock)
    job = (await assembly.jobs.service.submit("fail", None)).job
    await clock.settle()

    assert work.attempts == [1]

    await clock.advance(1.1)
    failed = await assembly.jobs.service.get(job.id)

    assert work.attempts == [1, 2]
    assert (failed.state, failed.attempts) == (JobState.FAILED, 2)
    await assembly.operations.shutdown.run()


def test_an_attempt_has_the_time_of_the_settings() -> None:
    """JOB_TIMEOUT for a task that says nothing itself."""

    async def run() -> Job:
        clock = LoopClock()
        settings = Settings(job=JobSettings(timeout=0.5, max_attempts=1))
        assembly = assemble(settings, tasks=Work(clock).tasks, clock=clock)
        await assembly.operations.start()
        assembly.operations.application_ready()
        job = (await assembly.jobs.service.submit("work", 100.0)).job
        await clock.sleep(1.0)
        failed = await assembly.jobs.service.get(job.id)
        await assembly.operations.shutdown.run()
        return failed

    failed = run_in_virtual_time(run())

    assert failed.error is not None
    assert (failed.state, failed.error.code) == (JobState.FAILED, "timeout")


async def test_built_in_tasks_run_once_an_hour(clock: ManualClock) -> None:
    """Those with a schedule, in their queues."""
    seldom = JobSettings(poll_interval=600.0, sweep_interval=600.0, lease=1800.0)
    assembly = assemble(Settings(job=seldom, health_check_interval=600.0), clock=clock)
    await ready(assembly.operations, clock)
    await clock.advance(7200.0)
    jobs = await assembly.jobs.service.search(JobFilter(state=JobState.COMPLETED))

    assert sorted(job.task for job in jobs.jobs) == [
        *["analytics.rollup_health"] * 2,
        *["default.prune"] * 2,
    ]
    await assembly.operations.shutdown.run()


def test_built_in_tasks_use_an_existing_queue() -> None:
    """QUEUES may have other names: then the first one runs them."""
    tasks = assemble(Settings(queues=("slow", "analytics"))).jobs.tasks

    assert {each.name: each.queue for each in tasks} == {
        "notifications.webhook": "slow",
        "analytics.rollup_health": "analytics",
        "default.prune": "slow",
    }


def test_the_payload_of_a_scheduled_task_may_be_null() -> None:
    """Another type of a task that ``@task`` does not declare is refused at the start."""

    @task("nightly")
    async def nightly(_: int) -> None: ...

    @task("hourly", cron="0 * * * *")
    async def hourly(_: int | None) -> None: ...

    declared = declared_task(nightly)
    assert declared is not None
    mark(nightly, replace(declared, cron="0 3 * * *"))
    with pytest.raises(ConfigurationError) as caught:
        assemble(Settings(), tasks=[nightly, hourly])

    (problem,) = caught.value.problems
    assert problem.startswith("@task('nightly'): cron= runs it with the payload null")
    assert "declare the payload as None" in problem


# -- the check -------------------------------------------------------------------------------


async def test_the_check_counts_each_queue_in_order(clock: ManualClock, work: Work) -> None:
    """The queues of QUEUES in that order, with the metrics of docs/operations.md."""
    assembly = assemble(Settings(), tasks=work.tasks, clock=clock)
    await ready(assembly.operations, clock)
    for seconds in (0.0, 100.0):
        await assembly.jobs.service.submit("work", seconds)
    await clock.settle()
    seen = await assembly.jobs.check.check()
    assert isinstance(seen.details, list)
    metrics = {each["name"]: each["metrics"] for each in seen.details}

    assert (seen.status, list(metrics)) == (Status.PASS, ["default", "notifications", "analytics"])
    assert seen.message == "All queues are healthy, in memory: their jobs end with this process"
    assert [metrics["default"][n] for n in ("waiting", "active", "completed", "failed")] == [
        0,
        1,
        1,
        0,
    ]
    ending = asyncio.create_task(drained(assembly.operations))
    await clock.advance(30.0)
    assert await ending is Outcome.FAILED  # 100 s are more than there are


async def test_jobs_without_a_worker_are_a_warning(clock: ManualClock, work: Work) -> None:
    """The check of the queues warns once a job has waited too long."""
    assembly = assemble(Settings(), tasks=work.tasks, clock=clock)
    assembly.jobs.disable_worker()
    await ready(assembly.operations, clock)
    await assembly.jobs.service.submit("work", 0.0)
    await clock.advance(11.0)
    report = assembly.operations.monitor.report().checks["queues"]

    assert (report.status, report.code) == (Status.WARN, "no_consumers")


# -- leaving ---------------------------------------------------------------------------------


async def drained(operations: Operations) -> Outcome | None:
    """Shut down; return how the draining went."""
    report = await operations.shutdown.run()
    return next(p.outcome for p in report.phases if p.phase is Phase.DRAIN)


async def test_jobs_in_memory_are_finished_before_the_end(clock: ManualClock, work: Work) -> None:
    """Those that wait as well: they would be lost."""
    settings = Settings(job=JobSettings(concurrency=2))
    assembly = assemble(settings, tasks=work.tasks, clock=clock)
    await ready(assembly.operations, clock)
    for _ in range(6):
        await assembly.jobs.service.submit("work", 1.0)
    await clock.settle()
    ending = asyncio.create_task(drained(assembly.operations))
    await clock.advance(2.9)

    assert not ending.done()

    await clock.advance(0.5)

    assert (await ending, len(work.done)) == (Outcome.OK, 6)


async def test_a_job_during_the_shutdown_is_refused(clock: ManualClock, work: Work) -> None:
    """Not accepted is not lost: its sender can go elsewhere."""
    assembly = assemble(Settings(), tasks=work.tasks, clock=clock)
    await ready(assembly.operations, clock)
    await drained(assembly.operations)

    with pytest.raises(LedgerUnavailableError, match="the process stops"):
        await assembly.jobs.service.submit("work", 1.0)


async def test_unfinished_jobs_in_memory_are_logged(clock: ManualClock, work: Work) -> None:
    """The stage fails, and says how many."""
    settings = Settings(job=JobSettings(concurrency=1), shutdown_drain_timeout=2.0)
    assembly = assemble(settings, tasks=work.tasks, clock=clock)
    await ready(assembly.operations, clock)
    for _ in range(3):
        await assembly.jobs.service.submit("work", 100.0)
    await clock.settle()
    ending = asyncio.create_task(assembly.operations.shutdown.run())
    await clock.advance(5.0)
    report = await ending
    (phase,) = (p for p in report.phases if p.phase is Phase.DRAIN)
    error = next(stage.error for stage in phase.stages if stage.name == "jobs")

    assert isinstance(error, WorkLostError)
    assert "3 in-memory jobs were due and did not finish: the drain took" in str(error)


async def test_waiting_jobs_in_memory_are_logged_at_the_end(clock: ManualClock, work: Work) -> None:
    """Jobs of a disabled worker count as lost."""
    assembly = assemble(Settings(), tasks=work.tasks, clock=clock)
    assembly.jobs.disable_worker()
    await ready(assembly.operations, clock)

    await assembly.jobs.service.submit("work", 1.0)

    assert await drained(assembly.operations) is Outcome.FAILED


async def test_alerts_are_sent_as_jobs_and_end_with_the_process(clock: ManualClock) -> None:
    """A change of health is a job of ``notifications.webhook``."""
    settings = Settings(
        alert_webhook_url=Secret("https://127.0.0.1:9/hush"), health_critical=(), queues=("q",)
    )
    assembly = assemble(settings, clock=clock)
    jobs = assembly.jobs
    jobs.disable_worker()
    await ready(assembly.operations, clock)
    await jobs.service.submit("default.prune", None)
    await clock.advance(11.0)  # no worker runs it, so the check of the queues warns
    (alert, _) = (await jobs.service.search()).jobs
    alert = await jobs.service.get(alert.id)

    assert alert.task == "notifications.webhook"
    assert b'"no_consumers"' in alert.payload
    assert b"hush" not in alert.payload
    assert jobs.alerting is not None
    await assembly.operations.shutdown.run()
    await clock.settle()
    assert jobs.alerting.done()


# -- tasks -----------------------------------------------------------------------------------


def test_an_invalid_task_is_refused() -> None:
    """OperationsConfig.tasks takes functions with @task."""

    async def plain(_: object) -> None: ...

    (line,) = problems(plain)

    assert line.startswith("OperationsConfig.tasks: <function ")
    assert line.endswith(" is no task; put @task('...') on it")


def test_a_task_imported_twice_is_one_task() -> None:
    """TASK_MODULES and the application may both name it."""
    from tests import job_tasks  # noqa: PLC0415 - the module that the setting names

    settings = Settings(task_modules=("tests.job_tasks", "tests.job_tasks"))

    assert problems(job_tasks.ship, settings=settings) == ()


def test_an_unknown_queue_is_refused() -> None:
    """With a suggestion where one is near."""

    @task("a", queue="defualt")
    async def near(_: object) -> None: ...

    @task("b", queue="zzz")
    async def far(_: object) -> None: ...

    assert problems(near, far) == (
        f"@task('a'): there is no queue named 'defualt'; did you mean default? ({line_of(near)})",
        (
            "@task('b'): there is no queue named 'zzz';"
            f" add it to QUEUES, which has default, notifications, analytics ({line_of(far)})"
        ),
    )


def test_two_tasks_of_one_name_are_refused() -> None:
    """Also where one of them is built in."""

    @task("a")
    async def first(_: object) -> None: ...

    @task("a")
    async def second(_: object) -> None: ...

    @task("default.prune")
    async def third(_: object) -> None: ...

    same, built_in = problems(first, second, third)

    assert same.startswith("@task('a'): there are two tasks named 'a'; rename one (")
    assert same.endswith(f"({line_of(second)})")
    assert built_in.startswith("@task('default.prune'): there are two tasks named ")


# -- what is wired ---------------------------------------------------------------------------


def test_the_settings_select_the_ledger() -> None:
    """And the notifier: with Postgres and without Redis it is NOTIFY."""
    memory, postgres = assemble(Settings()).jobs, assemble(POSTGRES).jobs

    assert isinstance(memory.ledger, MemoryJobLedger)
    assert isinstance(memory.notifier, MemoryNotifier)
    assert type(postgres.ledger).__name__ == "PostgresJobLedger"
    assert type(postgres.notifier).__name__ == "PostgresNotifier"


IMPORTED = """
import sys
from viralfx.settings import read_settings
from viralfx.runner.applications import find_application
find_application(read_settings({environ!r}), None)
names = ("asyncpg", "redis", "taskiq", "taskiq_redis", "httpx", "httpcore", "sqlalchemy")
print(*[name for name in names if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("environ", "imported"),
    [
        ({}, ""),
        ({"DATABASE_URL": "postgresql://db/app"}, "asyncpg"),
        ({"REDIS_HOST": "redis"}, "redis"),
        (
            {"DATABASE_URL": "postgresql://db/app", "REDIS_HOST": "redis"},
            "asyncpg redis taskiq taskiq_redis",
        ),
        ({"WEBHOOK_ALLOWED_HOSTS": "example.com", "ALERT_WEBHOOK_URL": "https://example.com"}, ""),
    ],
    ids=["memory", "postgres", "redis", "both", "webhooks"],
)
def test_only_configured_adapters_are_imported(environ: dict[str, str], imported: str) -> None:
    """A service in memory has none of the drivers to wait for."""
    code = IMPORTED.format(environ=environ)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )

    assert done.stdout.strip() == imported
