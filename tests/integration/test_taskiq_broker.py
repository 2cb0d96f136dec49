"""LedgerBroker runs applications of taskiq, in memory and on Postgres."""

import asyncio
import base64
import datetime as dt
import json
import pickle
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Annotated, Any, Generic, TypeVar

import pytest
from litestar import Litestar
from litestar.testing import AsyncTestClient
from pydantic import BaseModel
from taskiq import (
    AsyncTaskiqTask,
    Context,
    InMemoryBroker,
    SendTaskError,
    SimpleRetryMiddleware,
    SmartRetryMiddleware,
    TaskiqDepends,
    TaskiqEvents,
    TaskiqMessage,
    TaskiqMiddleware,
    TaskiqResult,
    TaskiqScheduler,
    TaskiqState,
)
from taskiq.api import run_scheduler_task
from taskiq.brokers.shared_broker import async_shared_broker
from taskiq.depends.progress_tracker import ProgressTracker, TaskState
from taskiq.exceptions import NoResultError
from taskiq.kicker import AsyncKicker
from taskiq.labels import LabelType
from taskiq.schedule_sources import LabelScheduleSource
from taskiq.scheduler.scheduled_task import ScheduledTask
from taskiq.serializers import PickleSerializer
from tests.integration import taskiq_senders
from tests.integration.taskiq_brokers import (
    MEMORY,
    TASKIQ,
    VARIANTS,
    VIRALFX,
    Running,
    assembled,
    set_environment,
)
from tests.servers.postgres import Database
from tests.servers.waiting import until

from viralfx import Discard, OperationsConfig, OperationsPlugin, Snooze, bind_user_id
from viralfx.adapters.taskiq.broker import _Trial, registers_tasks
from viralfx.adapters.taskiq.messages import MessageError
from viralfx.adapters.taskiq.retry import DEFAULT_ATTEMPTS, attempts_of
from viralfx.core.correlation import (
    bind_correlation_id,
    current_correlation_id,
    current_user_id,
)
from viralfx.core.errors import ConfigurationError
from viralfx.core.ids import is_job_id
from viralfx.jobs.codec import PayloadError, PayloadTooLargeError
from viralfx.jobs.limits import Limit, Rate
from viralfx.jobs.model import JobState, JobStateError, KeyConflictError, UnknownQueueError
from viralfx.jobs.tasks import declared_task
from viralfx.taskiq import LedgerBroker
from viralfx.testing import run_pending
from viralfx.web.jobs.changes import jobs_router

pytestmark = pytest.mark.timeout(60)

Kind = TypeVar("Kind")
SCHEMA = "viralfx_ops"
SECONDS = 20.0
"""Patience of a wait for a result."""


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Set the environment of each variant."""
    url = None
    if request.param != MEMORY:
        url = request.getfixturevalue("migrated_database").url
    set_environment(monkeypatch, url)
    return str(request.param)


@pytest.fixture
def running(variant: str) -> Running:
    """Start brokers in each variant."""
    return VARIANTS[variant]


@pytest.fixture
def on_postgres(monkeypatch: pytest.MonkeyPatch, migrated_database: Database) -> None:
    """Set the environment of a broker on Postgres."""
    set_environment(monkeypatch, migrated_database.url)


@pytest.fixture
def broker() -> LedgerBroker:
    """Return a broker that has not started."""
    return LedgerBroker()


async def result_of(task: AsyncTaskiqTask[Any]) -> TaskiqResult[Any]:
    """Wait for a result."""
    return await task.wait_result(check_interval=0.02, timeout=SECONDS)


class Order(BaseModel):
    """An argument and a result."""

    number: int
    cents: int = 0


class StockError(Exception):
    """An error of a task."""


# -- results -------------------------------------------------------------------------------------


async def test_a_task_runs_and_its_result_comes_back(
    broker: LedgerBroker, running: Running
) -> None:
    """Of a coroutine and of a plain function, which runs in a thread; with taskiq's types."""

    @broker.task
    async def add_one(value: int) -> int:
        return value + 1

    @broker.task(audience="tests")
    def paid(order: Order, *, cents: int) -> Order:
        assert threading.current_thread() is not threading.main_thread()
        return Order(number=order.number, cents=cents)

    async with running(broker):
        sent = await add_one.kiq(1)
        result = await result_of(sent)
        order = await result_of(await paid.kiq(Order(number=7), cents=5))
        job = await broker.find_job(sent.task_id)

    assert (result.is_err, result.error, result.return_value) == (False, None, 2)
    assert 0 <= result.execution_time < SECONDS
    assert order.return_value == Order(number=7, cents=5)
    assert order.labels == {"audience": "tests"}
    assert is_job_id(sent.task_id)
    assert (job.id, job.state, job.result) == (sent.task_id, JobState.COMPLETED, b"2")


async def test_a_task_that_taskiq_does_not_register_runs(
    broker: LedgerBroker,
    running: Running,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A release may have another name for the private method; one warning says so."""
    for each in (LedgerBroker, _Trial):
        monkeypatch.delattr(each, "_register_task")
    registers_tasks.cache_clear()
    try:

        @broker.task(queue="notifications")
        async def add_one(value: int) -> int:
            return value + 1

        async with running(broker):
            results = [await result_of(await add_one.kiq(each)) for each in (1, 2)]
    finally:
        registers_tasks.cache_clear()

    assert [each.return_value for each in results] == [2, 3]
    warned = [each for each in caplog.records if "lacks" in each.message]
    assert [vars(each)["lacking"] for each in warned] == ["AsyncBroker._register_task"]


async def test_an_error_comes_back_with_its_type(broker: LedgerBroker, running: Running) -> None:
    """Without a retry, as in taskiq; the job has failed."""
    runs: list[int] = []

    @broker.task
    async def reserve() -> None:
        runs.append(1)
        raise StockError("there are 3: too few")

    async with running(broker):
        sent = await reserve.kiq()
        result = await result_of(sent)
        job = await broker.find_job(sent.task_id)

    assert (result.is_err, result.return_value, runs) == (True, None, [1])
    with pytest.raises(StockError, match=r"^there are 3: too few$"):
        result.raise_for_error()
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert job.error.message.endswith("StockError: there are 3: too few")


@pytest.mark.parametrize("variant", [MEMORY], indirect=True)
async def test_other_failures_are_errors_of_the_result(
    broker: LedgerBroker, running: Running
) -> None:
    """A value without JSON, a label ``timeout``, a rejection, an error of no importable type."""

    class LocalError(Exception):
        pass

    @broker.task
    async def opaque() -> object:
        return object()

    @broker.task(timeout=0.05)
    async def slow() -> None:
        await asyncio.sleep(SECONDS)

    @broker.task
    async def rejecting(context: Context = TaskiqDepends()) -> None:  # noqa: B008
        context.reject()

    @broker.task
    async def local() -> None:
        raise LocalError

    @broker.task
    async def exiting() -> None:
        raise SystemExit(3)

    tasks = (opaque, slow, rejecting, local, exiting)
    async with running(broker):
        results = [await result_of(await task.kiq()) for task in tasks]

    assert [type(result.error).__name__ for result in results] == [
        "JobNotCompletedError",
        "TimeoutError",
        "TaskRejectedError",
        "LocalError",
        "SystemExit",
    ]
    assert all(isinstance(result.error, Exception) for result in results)
    assert "object has no JSON" in str(results[0].error)


@pytest.mark.parametrize("variant", [MEMORY, TASKIQ, VIRALFX], indirect=True)
async def test_a_cancellation_of_its_own_is_a_failure_of_the_task(
    broker: LedgerBroker, running: Running
) -> None:
    """It runs as often as with any other error: once, unless its labels allow more."""
    runs: Counter[str] = Counter()

    @broker.task
    async def raising() -> None:
        runs["raising"] += 1
        raise asyncio.CancelledError

    @broker.task(max_retries=2)
    async def timed() -> None:
        runs["timed"] += 1
        current = asyncio.current_task()
        assert current is not None
        asyncio.get_running_loop().call_later(0.01, current.cancel)
        await asyncio.sleep(SECONDS)

    async with running(broker):
        results = [await result_of(await task.kiq()) for task in (raising, timed)]

    assert [type(result.error).__name__ for result in results] == ["CancelledError"] * 2
    assert runs == {"raising": 1, "timed": 2}


# -- retries -------------------------------------------------------------------------------------


SIMPLE = SimpleRetryMiddleware(default_retry_label=True)
SMART = SmartRetryMiddleware(default_retry_label=True, default_delay=0.05, use_jitter=False)


@pytest.mark.parametrize(
    ("variant", "middleware"),
    [
        (MEMORY, SIMPLE),
        (MEMORY, SMART),
        (MEMORY, None),
        (TASKIQ, SIMPLE),
        (TASKIQ, SMART),
        (VIRALFX, SMART),
        (VIRALFX, None),
    ],
    indirect=["variant"],
)
async def test_retries_are_attempts_of_one_job(
    broker: LedgerBroker, running: Running, middleware: TaskiqMiddleware | None
) -> None:
    """``max_retries`` counts the executions, and the task sees how many there were."""
    seen: list[int] = []
    if middleware is not None:
        broker.add_middlewares(middleware)

    async def fail(context: Context = TaskiqDepends()) -> None:  # noqa: B008
        seen.append(int(context.message.labels.get("_retries", 0)))
        raise ValueError(len(seen))

    labels: dict[str, Any] = {} if middleware is None else {"retry_on_error": True}
    failing: Any = broker.task(max_retries=2, **labels)(fail)
    async with running(broker):
        sent = await failing.kiq()
        result = await result_of(sent)
        job = await broker.find_job(sent.task_id)

    assert seen == [0, 1]
    assert (type(result.error), str(result.error)) == (ValueError, "2")
    assert (job.state, job.attempts) == (JobState.FAILED, 2)


@pytest.mark.parametrize(
    ("labels", "alone", "beside"),
    [
        ({}, 1, 1),
        ({"max_retries": 3}, 3, 1),
        ({"max_retries": "3"}, 3, 1),
        ({"max_retries": 0}, 1, 1),
        ({"max_retries": 3, "retry_on_error": False}, 1, 1),
        ({"max_retries": 2, "retry_on_error": True}, 2, 2),
        ({"max_retries": 0, "retry_on_error": True}, 1, 1),
        ({"retry_on_error": "True"}, DEFAULT_ATTEMPTS, DEFAULT_ATTEMPTS),
        ({"max_retries": None}, 1, 1),
    ],
)
def test_the_label_max_retries_is_the_number_of_attempts(
    labels: dict[str, Any], alone: int, beside: int
) -> None:
    """Alone it allows more than one; beside a middleware for retries that decides as before."""
    assert attempts_of(labels) == alone
    assert attempts_of(labels, [SimpleRetryMiddleware()]) == beside


def test_a_label_max_retries_that_is_no_number_is_refused(broker: LedgerBroker) -> None:
    """At the declaration."""
    with pytest.raises(MessageError, match="the label max_retries must be a number: 'many'"):

        @broker.task(max_retries="many")
        async def failing() -> None: ...


@pytest.mark.parametrize("variant", [MEMORY, TASKIQ], indirect=True)
@pytest.mark.parametrize("retries", [False, True])
async def test_the_timeout_of_the_job_cancels_the_task(
    broker: LedgerBroker, running: Running, monkeypatch: pytest.MonkeyPatch, *, retries: bool
) -> None:
    """The task sees a cancellation, the result is a ``TimeoutError``; a middleware may retry it."""
    monkeypatch.setenv("JOB_TIMEOUT", "1000")
    broker.add_middlewares(SimpleRetryMiddleware(default_retry_label=retries))
    ends: list[str] = []

    @broker.task(max_retries=3)
    async def first_hangs() -> int:
        if not ends:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                ends.append("cancelled")
                raise
        return 1

    async with running(broker):
        sent = await first_hangs.kiq()
        result = await result_of(sent)
        job = await broker.find_job(sent.task_id)

    assert ends == ["cancelled"]
    assert job.attempts == 1
    assert result.return_value == (1 if retries else None)
    assert isinstance(result.error, type(None) if retries else TimeoutError)


@pytest.mark.parametrize("variant", [MEMORY], indirect=True)
async def test_a_retry_that_succeeds_has_a_result(broker: LedgerBroker, running: Running) -> None:
    """Between the attempts there is none, although the middleware would set one."""
    broker.add_middlewares(SimpleRetryMiddleware(no_result_on_retry=False))
    runs: list[int] = []

    @broker.task(retry_on_error=True)
    async def second_time() -> str:
        runs.append(1)
        if len(runs) == 1:
            raise ValueError("not yet")
        return "done"

    async with running(broker):
        assert (await result_of(await second_time.kiq())).return_value == "done"


@pytest.mark.parametrize("variant", [MEMORY, TASKIQ], indirect=True)
async def test_a_requeued_message_runs_again(broker: LedgerBroker, running: Running) -> None:
    """As the same job, without an attempt; the label counts."""
    seen: list[str | None] = []

    @broker.task
    async def later(context: Context = TaskiqDepends()) -> int:  # noqa: B008
        seen.append(context.message.labels.get("X-Taskiq-requeue"))
        if len(seen) < 3:
            await context.requeue()
        return len(seen)

    async with running(broker):
        sent = await later.kiq()
        result = await result_of(sent)
        job = await broker.find_job(sent.task_id)

    assert (result.return_value, seen) == (3, [None, "1", "2"])
    assert (job.attempts, job.claims) == (0, 3)


@pytest.mark.parametrize("variant", [MEMORY], indirect=True)
@pytest.mark.parametrize("middlewares", [(), (SimpleRetryMiddleware(),)], ids=["labels", "simple"])
async def test_a_task_decides_about_its_job(
    broker: LedgerBroker, running: Running, middlewares: tuple[TaskiqMiddleware, ...]
) -> None:
    """By the errors that tasks of ``@task`` raise, too."""
    runs: list[int] = []
    broker.add_middlewares(*middlewares)

    @broker.task(retry_on_error=True, max_retries=5)
    async def pay() -> None:
        runs.append(1)
        if len(runs) == 1:
            raise Snooze(0.01)
        raise Discard("the account is closed")

    async with running(broker):
        sent = await pay.kiq()
        result = await result_of(sent)
        job = await broker.find_job(sent.task_id)

    assert (type(result.error), job.attempts, len(runs)) == (Discard, 1, 2)
    assert job.error is not None
    assert job.error.code == "discarded"
    assert str(result.error) == "the account is closed"


@pytest.mark.parametrize("variant", [MEMORY, TASKIQ], indirect=True)
async def test_progress_is_that_of_the_job(broker: LedgerBroker, running: Running) -> None:
    """State and ``meta``; the task reads its own at once, others within some seconds."""
    may_end = asyncio.Event()

    @broker.task
    async def count(tracker: ProgressTracker[dict[str, int]] = TaskiqDepends()) -> Any:  # noqa: B008
        await tracker.set_progress(TaskState.STARTED, {"current": 1, "total": 4})
        await tracker.set_progress("reading")
        await may_end.wait()
        return await tracker.get_progress()

    async with running(broker):
        sent = await count.kiq()
        async with asyncio.timeout(SECONDS):
            while (seen := await sent.get_progress()) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        job = await broker.find_job(sent.task_id)
        may_end.set()
        result = await result_of(sent)

    assert (seen.state, seen.meta) == ("reading", {"current": 1, "total": 4})
    assert job.progress is not None
    assert b'"total": 4' in job.progress
    assert result.return_value == {"state": "reading", "meta": {"current": 1, "total": 4}}


async def test_a_strange_progress_keeps_no_job_from_its_end(
    broker: LedgerBroker, running: Running
) -> None:
    """Numbers that a progress cannot have are left out."""

    @broker.task
    async def strange(tracker: ProgressTracker[Any] = TaskiqDepends()) -> None:  # noqa: B008
        await tracker.set_progress("work", {"current": float("nan"), "total": 10**400})

    async with running(broker):
        sent = await strange.kiq()
        result = await result_of(sent)
        job = await broker.find_job(sent.task_id)

    assert not result.is_err
    assert job.progress is not None
    assert b'"current": null, "total": null' in job.progress


@pytest.mark.parametrize("variant", [MEMORY], indirect=True)
async def test_a_task_without_a_result_completes(broker: LedgerBroker, running: Running) -> None:
    """``NoResultError`` is no failure; the result is None."""

    @broker.task
    async def silent() -> None:
        raise NoResultError

    async with running(broker):
        result = await result_of(await silent.kiq())

    assert (result.is_err, result.return_value) == (False, None)


async def test_a_schedule_source_for_retries_is_not_needed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The delay is the job's, so a retry survives the scheduler."""
    set_environment(monkeypatch, None)
    broker = LedgerBroker()
    middleware = SmartRetryMiddleware(
        default_retry_label=True, default_delay=0.01, schedule_source=LabelScheduleSource(broker)
    )
    broker.add_middlewares(middleware)

    @broker.task(max_retries=2)
    async def failing() -> None:
        raise ValueError

    await broker.startup()
    assert isinstance((await result_of(await failing.kiq())).error, ValueError)
    await broker.shutdown()

    assert "needs no schedule_source" in caplog.text


# -- dependencies, middlewares, events -----------------------------------------------------------


# taskiq's library of dependencies throws errors into generators in this form.
@pytest.mark.filterwarnings("ignore:the .type, exc, tb. signature of athrow:DeprecationWarning")
async def test_dependencies_are_injected(broker: LedgerBroker, running: Running) -> None:
    """State, context, and a generator whose end follows the task."""
    ends: list[str] = []

    @broker.on_event(TaskiqEvents.WORKER_STARTUP)
    async def begin(state: TaskiqState) -> None:
        state.connection = "open"

    async def session(
        state: Annotated[TaskiqState, TaskiqDepends()],
    ) -> AsyncIterator[str]:
        try:
            yield f"session on {state.connection}"
        except StockError:
            ends.append("rollback")
            raise
        ends.append("commit")

    @broker.task(tenant="a")
    async def use(
        fail: bool,  # noqa: FBT001 - an argument like any other
        used: Any = TaskiqDepends(session),  # noqa: B008
        context: Context = TaskiqDepends(),  # noqa: B008
    ) -> list[str]:
        if fail:
            raise StockError
        return [used, context.message.labels["tenant"]]

    async with running(broker):
        good = await result_of(await use.kiq(False))
        bad = await result_of(await use.kiq(True))

    assert (good.return_value, bad.is_err) == (["session on open", "a"], True)
    assert ends == ["commit", "rollback"]


def base() -> int:
    """Return what the other dependencies begin with."""
    bases.append(8)
    return 8


bases: list[int] = []


def plus_one(number: int = TaskiqDepends(base)) -> int:
    """Depend on ``base``."""
    return number + 1


def plus_two(number: int = TaskiqDepends(base)) -> int:
    """Depend on ``base``, which runs once for both."""
    return number + 2


def plus_three(number: int = TaskiqDepends(base, use_cache=False)) -> int:
    """Depend on a ``base`` of its own."""
    return number + 3


class Stock:
    """A dependency with a dependency."""

    def __init__(self, count: int = TaskiqDepends(base)) -> None:
        self.count = count


class Shelf(Generic[Kind]):
    """A generic dependency."""

    def __init__(self, kept: Kind = TaskiqDepends()) -> None:  # noqa: B008
        self.kept = kept


async def test_dependencies_of_every_form_of_taskiqs_documentation_work(
    broker: LedgerBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trees, with and without a cache, classes, generics, and annotations."""
    set_environment(monkeypatch, None)
    bases.clear()

    @broker.task
    def tree(
        one: Annotated[int, TaskiqDepends(plus_one)],
        two: Annotated[int, TaskiqDepends(plus_two)],
        three: Annotated[int, TaskiqDepends(plus_three)],
        stock: Annotated[Stock, TaskiqDepends()],
        shelf: Annotated[Shelf[Stock], TaskiqDepends()],
    ) -> list[int]:
        return [one, two, three, stock.count, shelf.kept.count]

    await broker.startup()
    result = await result_of(await AsyncKicker[..., Any](tree.task_name, broker, {}).kiq())
    await broker.shutdown()

    assert result.return_value == [9, 10, 11, 8, 8]
    assert bases == [8, 8]


@pytest.mark.parametrize("variant", [TASKIQ, VIRALFX], indirect=True)
async def test_a_task_declared_beside_a_worker_runs(
    broker: LedgerBroker, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in taskiq's documentation of dynamic brokers, a function without a module of its own."""
    monkeypatch.setenv("JOB_POLL_INTERVAL", "200")
    async with running(broker):
        double = broker.register_task(lambda x: x * 2, task_name="dynamic")
        assert (await result_of(await double.kiq(x=4))).return_value == 8


class Recorder(TaskiqMiddleware):
    """Notes each call."""

    def __init__(self, name: str, calls: list[str]) -> None:
        super().__init__()
        self._name = name
        self._calls = calls

    def _note(self, hook: str) -> None:
        self._calls.append(f"{hook} {self._name}")

    def startup(self) -> None:
        """See taskiq."""
        self._note("startup")

    async def shutdown(self) -> None:
        """See taskiq."""
        self._note("shutdown")

    def pre_send(self, message: TaskiqMessage) -> TaskiqMessage:
        """See taskiq."""
        self._note("pre_send")
        message.labels[self._name] = "sent"
        return message

    def post_send(self, message: TaskiqMessage) -> None:
        """See taskiq."""
        assert message.labels[self._name] == "sent"
        self._note("post_send")

    async def pre_execute(self, message: TaskiqMessage) -> TaskiqMessage:
        """See taskiq."""
        assert message.labels[self._name] == "sent"
        self._note("pre_execute")
        return message

    def on_error(
        self, message: TaskiqMessage, result: TaskiqResult[Any], exception: BaseException
    ) -> None:
        """See taskiq."""
        assert (message.task_name, result.is_err) == ("failing", True)
        self._note(f"on_error {type(exception).__name__}")

    def post_execute(self, message: TaskiqMessage, result: TaskiqResult[Any]) -> None:
        """See taskiq."""
        assert (message.task_name, result.is_err) == ("failing", True)
        self._note("post_execute")

    def post_save(self, message: TaskiqMessage, result: TaskiqResult[Any]) -> None:
        """See taskiq."""
        assert (message.task_name, result.is_err) == ("failing", True)
        self._note("post_save")


async def test_middlewares_run_in_taskiqs_order(broker: LedgerBroker, running: Running) -> None:
    """Each hook once; those after the execution in reverse."""
    calls: list[str] = []
    broker.add_middlewares(Recorder("a", calls), Recorder("b", calls))

    @broker.task("failing")
    async def failing() -> None:
        raise ValueError

    async with running(broker):
        await result_of(await failing.kiq())

    assert sorted(calls[:-2]) == sorted(
        f"{hook} {name}"
        for hook in (
            *("startup", "pre_send", "post_send", "pre_execute"),
            *("on_error ValueError", "post_execute", "post_save"),
        )
        for name in ("a", "b")
    )
    executed = [call for call in calls if call.split()[0] in ("pre_execute", "on_error")]
    assert [call[-1] for call in executed] == ["a", "b", "b", "a"]
    assert calls[-2:] == ["shutdown a", "shutdown b"]


async def test_a_middleware_that_fails_does_not_lose_the_message(
    broker: LedgerBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is retried a few times, and fails with the middleware's error."""
    set_environment(monkeypatch, None)

    class Failing(TaskiqMiddleware):
        def pre_execute(self, message: TaskiqMessage) -> TaskiqMessage:
            calls.append(message.task_id)
            if len(calls) == 1:
                raise ConnectionError("the other side is down")
            return message

    calls: list[str] = []
    broker.add_middlewares(Failing())

    @broker.task
    async def add_one(value: int) -> int:
        return value + 1

    await broker.startup()
    sent = await add_one.kiq(1)
    assert (await result_of(sent)).return_value == 2
    await broker.shutdown()
    assert calls == [sent.task_id] * 2


class Judge(TaskiqMiddleware):
    """Makes something else of the errors of tasks."""

    def on_error(
        self,
        message: TaskiqMessage,
        result: TaskiqResult[Any],
        exception: BaseException,  # noqa: ARG002 - taskiq's signature
    ) -> None:
        """Put a value or another error in the result, as the label of the task says."""
        match message.labels["verdict"]:
            case "value":
                result.is_err, result.error, result.return_value = False, None, "fallback"
            case "error":
                result.error = StockError("friendlier")
            case "no result":
                result.error = NoResultError()


@pytest.mark.parametrize(
    ("variant", "retries", "retries_first"),
    [
        (MEMORY, False, False),
        (MEMORY, True, False),
        (MEMORY, True, True),
        (TASKIQ, True, True),
        (VIRALFX, False, True),
    ],
    indirect=["variant"],
)
async def test_the_verdict_of_a_middleware_about_an_error_counts(
    broker: LedgerBroker, running: Running, *, retries: bool, retries_first: bool
) -> None:
    """As with the brokers of taskiq, for the last attempt; an earlier one has no result."""
    retrying = SimpleRetryMiddleware(default_retry_label=retries)
    broker.add_middlewares(*([retrying, Judge()] if retries_first else [Judge(), retrying]))
    runs: Counter[str] = Counter()

    async def fail(context: Context = TaskiqDepends()) -> None:  # noqa: B008
        runs[context.message.labels["verdict"]] += 1
        raise KeyError("number")

    async with running(broker):
        results = [
            await result_of(
                await broker.task(f"fail {verdict}", max_retries=2, verdict=verdict)(fail).kiq()
            )
            for verdict in ("value", "error", "no result")
        ]

    assert [(each.is_err, each.return_value) for each in results] == [
        (False, "fallback"),
        (True, None),
        (True, None),
    ]
    assert [repr(each.error) for each in results] == [
        "None",
        "StockError('friendlier')",
        "KeyError('number')",
    ]
    assert set(runs.values()) == {2 if retries else 1}


@pytest.mark.parametrize("variant", [MEMORY], indirect=True)
@pytest.mark.parametrize("verdict", ["value", "error"])
async def test_a_middleware_changes_no_decision_about_the_job(
    broker: LedgerBroker, running: Running, verdict: str
) -> None:
    """A discarded job fails for good, one that is due again runs, a cancelled one is cancelled."""
    broker.add_middlewares(Judge())
    runs: Counter[str] = Counter()

    @broker.task(verdict=verdict)
    async def again() -> int:
        runs["again"] += 1
        if runs["again"] == 1:
            raise Snooze(0.0)
        return runs["again"]

    @broker.task(verdict=verdict, max_retries=3)
    async def discarded() -> None:
        runs["discarded"] += 1
        raise Discard("no more")

    @broker.task(verdict=verdict)
    async def endless() -> None:
        runs["endless"] += 1
        await asyncio.sleep(3600)

    async with running(broker):
        repeated = await result_of(await again.kiq())
        sent = await discarded.kiq()
        given_up = await result_of(sent)
        failed = await broker.find_job(sent.task_id)
        cancelled = await endless.kiq()
        await until(lambda: runs["endless"])
        await (await broker.job_service()).cancel(cancelled.task_id, running=True)
        ended = await result_of(cancelled)

    assert repeated.return_value == 2
    assert runs["discarded"] == 1
    assert given_up.is_err is (verdict == "error")
    if verdict == "error":
        assert (failed.state, failed.error and failed.error.code) == (JobState.FAILED, "discarded")
        assert repr(given_up.error) == "StockError('friendlier')"
    assert repr(ended.error) == "JobNotCompletedError('the job was cancelled')"


@pytest.mark.parametrize(
    ("variant", "events"),
    [
        (MEMORY, ["client_startup", "worker_startup", "worker_shutdown", "client_shutdown"]),
        (TASKIQ, ["worker_startup", "worker_shutdown"]),
        (VIRALFX, ["worker_startup", "worker_shutdown"]),
    ],
    indirect=["variant"],
)
async def test_events_are_those_of_the_process(
    broker: LedgerBroker, running: Running, events: list[str]
) -> None:
    """Once each; a worker in the client's process has both."""
    seen: list[str] = []

    def note(name: str, _: TaskiqState) -> None:
        seen.append(name.lower())

    for event in TaskiqEvents:
        broker.add_event_handler(event, partial(note, event.value))

    @broker.task
    async def nothing() -> None: ...

    async with running(broker):
        await broker.startup()
        await result_of(await nothing.kiq())

    await broker.shutdown()
    assert seen == events


@pytest.mark.usefixtures("on_postgres")
async def test_a_start_that_fails_costs_no_attempt(broker: LedgerBroker) -> None:
    """The messages wait until the handlers of the worker's start succeed."""
    starts: list[int] = []

    @broker.on_event(TaskiqEvents.WORKER_STARTUP)
    async def begin(state: TaskiqState) -> None:
        starts.append(1)
        if len(starts) < 2:
            raise ConnectionError("not yet")
        state.begun = True

    @broker.task
    async def begun(context: Context = TaskiqDepends()) -> bool:  # noqa: B008
        return bool(context.state.begun)

    async with VARIANTS[VIRALFX](broker):
        sent = await begun.kiq()
        assert (await result_of(sent)).return_value is True
        assert (await broker.find_job(sent.task_id)).attempts == 0


# -- sending -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_postgres")
async def test_labels_are_options_of_the_job(broker: LedgerBroker) -> None:
    """Of the declaration, and of one call."""

    @broker.task(priority=3, queue="notifications")
    async def nothing() -> None: ...

    plain = await nothing.kiq()
    other = await nothing.kicker().with_labels(priority=9, queue="default", delay=600).kiq()
    first, second = await broker.find_job(plain.task_id), await broker.find_job(other.task_id)
    await broker.shutdown()

    assert (first.queue, first.priority) == ("notifications", 3)
    assert (second.queue, second.priority) == ("default", 9)
    assert dt.timedelta(minutes=9) < second.run_at - first.run_at < dt.timedelta(minutes=11)
    assert nothing.labels == {"priority": 3, "queue": "notifications"}


@pytest.mark.each_python
@pytest.mark.parametrize("variant", [MEMORY, VIRALFX], indirect=True)
async def test_a_delayed_message_runs_later(broker: LedgerBroker, running: Running) -> None:
    """After the seconds of the label ``delay``."""

    @broker.task
    async def nothing() -> None: ...

    async with running(broker):
        sent = await nothing.kicker().with_labels(delay=0.5).kiq()
        await result_of(sent)
        job = await broker.find_job(sent.task_id)

    assert job.started_at is not None
    assert job.started_at - job.created_at >= dt.timedelta(seconds=0.2)


@pytest.mark.usefixtures("on_postgres")
async def test_a_sender_need_not_know_the_task(broker: LedgerBroker) -> None:
    """A message of an unknown task waits for a worker that knows it."""
    sender = LedgerBroker()
    sent = await AsyncKicker[..., int]("shop:double", sender, {}).kiq(21)
    other = LedgerBroker()

    @other.task
    async def unrelated() -> None: ...

    @broker.task("shop:double")
    async def double(value: int) -> int:
        return value * 2

    async with VARIANTS[TASKIQ](other):
        await result_of(await unrelated.kiq())
        waiting = await sender.find_job(sent.task_id)
    async with VARIANTS[TASKIQ](broker):
        result = await result_of(sent)
    await sender.shutdown()

    assert (waiting.state, waiting.claims) == (JobState.WAITING, 0)
    assert result.return_value == 42


@pytest.mark.parametrize(
    ("labels", "error", "text"),
    [
        ({"queue": "nowhere"}, UnknownQueueError, "there is no queue 'nowhere'"),
        ({"priority": 1e9}, ValueError, "priority must be a whole number from -100 to 100"),
        ({"delay": "soon"}, ValueError, "delay must be a number: 'soon'"),
        ({"note": "x" * 2_000_000}, PayloadTooLargeError, "JOB_MAX_RESULT_BYTES=1048576"),
    ],
)
async def test_a_message_that_cannot_be_a_job_is_refused(
    broker: LedgerBroker,
    monkeypatch: pytest.MonkeyPatch,
    labels: dict[str, Any],
    error: type[Exception],
    text: str,
) -> None:
    """As taskiq's ``SendTaskError``, whose cause names the reason."""
    set_environment(monkeypatch, None)

    @broker.task
    async def nothing() -> None: ...

    with pytest.raises(SendTaskError) as refused:
        await nothing.kicker().with_labels(**labels).kiq()
    await broker.shutdown()

    assert isinstance(refused.value.__cause__, error)
    assert text in str(refused.value.__cause__)


@pytest.mark.parametrize("task_id", ["order-7", "0" * 32, "ä\n"])
async def test_a_task_id_is_used_once(
    broker: LedgerBroker, monkeypatch: pytest.MonkeyPatch, task_id: str
) -> None:
    """Any text is one. The same message again is the same job, another one an error."""
    set_environment(monkeypatch, None)
    may_end = asyncio.Event()

    @broker.task
    async def add_one(value: int) -> int:
        await may_end.wait()
        return value + 1

    kicker = add_one.kicker().with_task_id(task_id).with_labels(delay=0.01)
    sent = await kicker.kiq(1)
    await kicker.kiq(1)
    with pytest.raises(SendTaskError) as other:
        await kicker.kiq(2)
    may_end.set()
    result = await result_of(sent)
    with pytest.raises(SendTaskError) as again:
        await kicker.kiq(1)
    await broker.shutdown()

    assert (sent.task_id, result.return_value) == (task_id, 2)
    assert isinstance(other.value.__cause__, KeyConflictError)
    assert isinstance(again.value.__cause__, JobStateError)


@pytest.mark.parametrize("variant", [MEMORY, TASKIQ], indirect=True)
async def test_another_serializer_and_result_backend_work(
    broker: LedgerBroker, running: Running
) -> None:
    """A message that is no JSON is stored as Base64; the ledger records the outcome, too."""
    backend = InMemoryBroker().result_backend
    broker.with_serializer(PickleSerializer()).with_result_backend(backend)

    @broker.task
    async def size(value: str) -> int:
        return len(value)

    async with running(broker):
        sent = await size.kiq("ä\0")
        result = await result_of(sent)
        await until(lambda: sent.task_id in backend.results)
        while not (job := await broker.find_job(sent.task_id)).state.final:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    assert (result.return_value, job.result) == (2, b"2")
    assert b'"base64":' in job.payload


async def until_left(broker: LedgerBroker, task_id: str) -> None:
    """Wait until a worker leaves a job to others, because it cannot read the payload."""
    async with asyncio.timeout(SECONDS):
        job = await broker.find_job(task_id)
        while job.claims == 0 or job.state is not JobState.WAITING:
            await asyncio.sleep(0.02)
            job = await broker.find_job(task_id)
    assert job.attempts == 0


class Watched(PickleSerializer):
    """Keeps the bytes that it loads."""

    def __init__(self) -> None:
        self.loaded: list[bytes] = []

    def loadb(self, value: bytes) -> Any:
        """Load a pickle."""
        self.loaded.append(value)
        return super().loadb(value)


@pytest.mark.usefixtures("on_postgres")
async def test_foreign_bytes_reach_no_serializer(
    broker: LedgerBroker, migrated_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Pickle would run code of every sender; messages that the broker stored are decoded."""
    serializer = Watched()
    broker.with_serializer(serializer)

    @broker.task("shop:double")
    async def double(value: int) -> int:
        return value * 2

    own = await double.kiq(21)
    await broker.shutdown()
    encoded = base64.b64encode(pickle.dumps("foreign")).decode()
    payloads = [
        encoded,
        {"task_id": own.task_id, "base64": encoded},
        {"task_id": own.task_id, "task_name": "shop:double", "args": [1], "kwargs": {}},
    ]
    plugin = OperationsPlugin(OperationsConfig(tasks=[broker]))
    app = Litestar([jobs_router(plugin)], plugins=[plugin], logging_config=None)
    async with AsyncTestClient(app) as client:
        for payload in payloads:
            asked = {"task": "shop:double", "payload": payload}
            assert (await client.post("/api/v1/jobs", json=asked)).status_code == 422
    sent = [
        migrated_database.execute(
            f"select {SCHEMA}.enqueue('shop:double', '{json.dumps(payload)}')::text"
        )[0][0]
        for payload in payloads
    ]
    async with VARIANTS[VIRALFX](broker):
        assert (await result_of(own)).return_value == 42
        for task_id in sent:
            await until_left(broker, task_id)
    assert "no message of taskiq to this job" in caplog.text

    assert serializer.loaded
    assert not [each for each in serializer.loaded if b"foreign" in each or b"args" not in each]


@pytest.mark.parametrize("variant", [MEMORY, VIRALFX], indirect=True)
async def test_a_job_submitted_without_taskiq_has_arguments_alone(
    broker: LedgerBroker, running: Running
) -> None:
    """So the API, SQL and schedules can run taskiq's functions, too."""

    @broker.task("shop:price", rounds=2, types_of_exceptions=(ValueError,))
    async def price(
        number: int, context: Annotated[Context, TaskiqDepends()], *, cents: int
    ) -> int:
        assert context.message.args == [number]
        assert context.message.labels == {"rounds": 2}
        return number * cents

    async with running(broker):
        jobs = await broker.job_service()
        accepted = await jobs.submit("shop:price", {"args": [3], "kwargs": {"cents": 50}})
        sent: AsyncTaskiqTask[Any] = AsyncTaskiqTask(accepted.job.id, broker.result_backend)
        assert (await result_of(sent)).return_value == 150

        for payload, problem in (
            ([3], "Expected `object`, got `array`"),
            ({"arg": [3]}, "unknown field `arg`"),
            ({"args": [3]}, "missing a required (keyword-only )?argument: 'cents'"),
            ({"args": [3, 4], "kwargs": {"cents": 50}}, "too many positional arguments"),
            ({"args": [3], "kwargs": {"cents": 50, "context": None}}, "keyword argument 'context'"),
        ):
            with pytest.raises(PayloadError, match=problem):
                await jobs.submit("shop:price", payload)


@pytest.mark.parametrize("variant", [MEMORY, TASKIQ], indirect=True)
async def test_a_message_that_the_receiver_would_drop_is_kept(
    broker: LedgerBroker,
    running: Running,
    variant: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The receiver logs and acknowledges it, as if it had run. Other workers may read it."""

    @broker.task("shop:double")
    async def double(value: int) -> int:
        return value * 2

    message = TaskiqMessage(
        task_id=broker.id_generator(),
        task_name="shop:double",
        labels={"weight": "light"},
        labels_types={"weight": LabelType.INT},
        args=[21],
        kwargs={},
    )
    async with running(broker):
        await broker.kick(broker.formatter.dumps(message))
        await until_left(broker, message.task_id)
        if variant == MEMORY:
            monkeypatch.setattr(broker, "find_task", {}.get)
            dropped = await result_of(await double.kiq(21))
            assert "the receiver did not run the message" in str(dropped.error)

    assert "invalid literal for int()" in caplog.text


# -- schedules -----------------------------------------------------------------------------------


async def test_taskiqs_scheduler_sends_what_is_due(
    broker: LedgerBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From labels; a task declared while everything runs is sent as well."""
    set_environment(monkeypatch, None)
    seen: list[int] = []
    soon = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=0.1)
    scheduler = TaskiqScheduler(broker, [LabelScheduleSource(broker)])
    await broker.startup()
    broker.register_task(
        lambda value: seen.append(value),  # noqa: PLW0108 - taskiq renames functions
        task_name="note",
        schedule=[{"time": soon, "args": [22]}],
    )
    task = asyncio.create_task(run_scheduler_task(scheduler))
    await until(lambda: seen)
    task.cancel()
    await asyncio.wait({task})
    await broker.shutdown()

    assert seen == [22]


@pytest.mark.usefixtures("on_postgres")
async def test_two_schedulers_send_a_schedule_with_an_id_once(
    broker: LedgerBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each minute; without an id of its own each sends it."""
    now = dt.datetime(2030, 1, 1, 12, 0, 0, 500, tzinfo=dt.UTC)

    class Clock:
        @staticmethod
        def now(_: dt.tzinfo) -> dt.datetime:
            return now

    monkeypatch.setattr("viralfx.taskiq.datetime", Clock)

    @broker.task("report", schedule=[{"cron": "* * * * *", "schedule_id": "report-minutely"}])
    async def report() -> None: ...

    @broker.task("other", schedule=[{"cron": "* * * * *"}])
    async def other() -> None: ...

    for minute in (0, 1):
        now = dt.datetime(2030, 1, 1, 12, minute, 0, 500, tzinfo=dt.UTC)
        for _ in range(2):
            source = LabelScheduleSource(broker)
            scheduler = TaskiqScheduler(broker, [source])
            await source.startup()
            for scheduled in await source.get_schedules():
                assert isinstance(scheduled, ScheduledTask)
                await scheduler.on_ready(source, scheduled)
    jobs = (await (await broker.job_service()).search()).jobs
    await broker.shutdown()

    assert sorted(job.task for job in jobs) == ["other"] * 4 + ["report"] * 2


# -- running -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_postgres")
async def test_messages_are_acknowledged_without_a_receiver(broker: LedgerBroker) -> None:
    """``listen`` yields the message as it was sent; its acknowledgement completes the job."""

    @broker.task("nothing")
    async def nothing() -> None: ...

    await broker.startup()
    sent = await nothing.kiq()
    async with asyncio.timeout(SECONDS):
        message = await anext(broker.listen())
        acknowledged = message.ack()
        assert acknowledged is None
    result = await result_of(sent)
    await broker.shutdown()

    assert broker.formatter.loads(message.data).task_id == sent.task_id
    assert (result.is_err, result.return_value) == (False, None)


@pytest.mark.parametrize("variant", [TASKIQ, VIRALFX], indirect=True)
async def test_a_stop_hands_back_what_runs(
    broker: LedgerBroker, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No attempt is spent, and a middleware for retries does not count it."""
    monkeypatch.setenv("SHUTDOWN_DRAIN_TIMEOUT", "500")
    broker.add_middlewares(SimpleRetryMiddleware(default_retry_label=True))
    begun = asyncio.Event()
    cancelled = asyncio.Event()

    @broker.task
    async def endless() -> None:
        begun.set()
        try:
            await asyncio.sleep(3600)
        finally:
            cancelled.set()

    async with running(broker):
        sent = await endless.kiq()
        async with asyncio.timeout(SECONDS):
            await begun.wait()
    reader = LedgerBroker()
    job = await reader.find_job(sent.task_id)
    await reader.shutdown()

    assert cancelled.is_set()
    assert (job.state, job.attempts, job.crashes, job.error) == (JobState.WAITING, 0, 0, None)


@pytest.mark.parametrize("variant", [MEMORY, TASKIQ], indirect=True)
async def test_a_running_task_is_cancelled_on_request(
    broker: LedgerBroker, running: Running
) -> None:
    """It sees the cancellation, and its result says so; a middleware does not retry it."""
    broker.add_middlewares(SimpleRetryMiddleware(default_retry_label=True))
    begun = asyncio.Event()
    ends: list[str] = []

    @broker.task
    async def endless() -> None:
        begun.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise

    async with running(broker):
        sent = await endless.kiq()
        await asyncio.wait_for(begun.wait(), SECONDS)
        await (await broker.job_service()).cancel(sent.task_id)
        result = await result_of(sent)

    assert (result.is_err, str(result.error)) == (True, "the job was cancelled")
    assert ends == ["cancelled"]


@pytest.mark.parametrize("variant", [MEMORY], indirect=True)
async def test_a_cancelled_job_ends_with_its_thread(broker: LedgerBroker, running: Running) -> None:
    """Python cannot stop a thread, and another worker must not run the job beside it."""
    begun, cancelled = threading.Event(), threading.Event()
    ends: list[int] = []

    class Watching(TaskiqMiddleware):
        def on_error(
            self,
            message: TaskiqMessage,
            result: TaskiqResult[Any],
            exception: BaseException,
        ) -> None:
            del message, result, exception
            cancelled.set()

    broker.add_middlewares(Watching())

    @broker.task
    def work() -> None:
        begun.set()
        cancelled.wait(SECONDS)
        time.sleep(0.2)
        ends.append(1)

    async with running(broker):
        sent = await work.kiq()
        await until(begun.is_set)
        await (await broker.job_service()).cancel(sent.task_id)
        result = await result_of(sent)

    assert (str(result.error), ends) == ("the job was cancelled", [1])


@pytest.mark.parametrize("variant", [MEMORY, TASKIQ, VIRALFX], indirect=True)
async def test_the_request_of_a_message_follows_its_task(
    broker: LedgerBroker, running: Running
) -> None:
    """Correlation id and user are bound in coroutines and in threads."""

    @broker.task
    async def who() -> list[str | None]:
        return [current_correlation_id(), current_user_id()]

    @broker.task
    def who_in_a_thread() -> list[str | None]:
        return [current_correlation_id(), current_user_id()]

    async with running(broker):
        bind_correlation_id("order-17")
        bind_user_id("ada")
        results = [await result_of(await task.kiq()) for task in (who, who_in_a_thread)]

    assert [result.return_value for result in results] == [["order-17", "ada"]] * 2


async def test_shared_tasks_run(broker: LedgerBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of taskiq's shared broker belongs to every broker."""
    set_environment(monkeypatch, None)

    @async_shared_broker.task("shared:double")
    async def double(value: int) -> int:
        return value * 2

    try:
        await broker.startup()
        sent = await double.kicker().with_broker(broker).kiq(4)
        assert (await result_of(sent)).return_value == 8
        await broker.shutdown()
    finally:
        del broker.global_task_registry["shared:double"]


async def test_a_broker_starts_again(broker: LedgerBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its shutdown, which may be called twice and before any start; two in one process."""
    set_environment(monkeypatch, None)
    other = LedgerBroker()

    @broker.task
    async def add_one(value: int) -> int:
        return value + 1

    @other.task("add_one")
    async def add_two(value: int) -> int:
        return value + 2

    await broker.shutdown()
    for _ in range(2):
        async with broker, other:
            assert (await result_of(await add_one.kiq(1))).return_value == 2
            assert (await result_of(await add_two.kiq(1))).return_value == 3
        await broker.shutdown()


@pytest.mark.parametrize("starts", [True, False])
def test_a_broker_works_in_the_next_event_loop(
    broker: LedgerBroker, monkeypatch: pytest.MonkeyPatch, *, starts: bool
) -> None:
    """Also if it was not shut down in the loop before, with and without a start."""
    set_environment(monkeypatch, None)
    events: list[str] = []

    @broker.on_event(TaskiqEvents.CLIENT_STARTUP)
    def begin(_: TaskiqState) -> None:
        events.append("client_startup")

    @broker.task
    async def double(value: int) -> int:
        return value * 2

    @broker.task
    def triple(value: int) -> int:
        return value * 3

    async def use(value: int) -> list[int]:
        if starts:
            await broker.startup()
        sent = [await task.kiq(value) for task in (double, triple)]
        return [(await result_of(each)).return_value for each in sent]

    found = [asyncio.run(use(value)) for value in (1, 2, 3)]
    asyncio.run(broker.shutdown())

    assert found == [[2, 3], [4, 6], [6, 9]]
    assert events == ["client_startup"] * (3 if starts else 0)


@pytest.mark.usefixtures("on_postgres")
@pytest.mark.parametrize("starts", [True, False])
async def test_messages_are_sent_on_several_event_loops_at_once(
    migrated_database: Database, *, starts: bool
) -> None:
    """Beside the loop of the broker, or on loops that end while others use their connections."""
    if starts:
        async with taskiq_senders.broker:
            sent = await asyncio.to_thread(taskiq_senders.send_from_threads)
    else:
        command = [sys.executable, "-m", taskiq_senders.__name__]
        ran = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, timeout=40, check=False
        )
        assert ran.returncode == 0, ran.stderr
        sent = json.loads(ran.stdout)
    stored = migrated_database.execute("select id::text from viralfx_jobs")

    assert len(set(sent)) == taskiq_senders.SENDERS
    assert sorted(sent) == sorted(job_id for (job_id,) in stored)


async def test_messages_start_the_worker_of_their_process_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process that sends many messages keeps nothing of the start for each."""
    set_environment(monkeypatch, None)
    starts: list[int] = []

    class Counting(LedgerBroker):
        async def start_worker(self) -> None:
            starts.append(1)
            await super().start_worker()

    broker = Counting()

    @broker.task
    async def nothing() -> None: ...

    await broker.startup()
    for sent in [await nothing.kiq() for _ in range(3)]:
        await result_of(sent)
    await broker.shutdown()

    assert starts == [1]


@pytest.mark.usefixtures("on_postgres")
async def test_a_process_that_runs_jobs_needs_no_receiver(broker: LedgerBroker) -> None:
    """``listen`` says so where the worker of the process runs the messages itself."""
    async with assembled(broker):
        with pytest.raises(ConfigurationError, match="use no receiver of taskiq here"):
            await anext(broker.listen())


def test_invalid_labels_are_refused_at_the_declaration(broker: LedgerBroker) -> None:
    """Not when the first message is sent."""

    async def nothing() -> None: ...

    for labels, text in (
        ({"timeout": "long"}, "the label timeout must be a number: 'long'"),
        ({"rate_limit": "often"}, "'often' is not a rate"),
        ({"concurrency": 0}, "concurrency must be from 1"),
    ):
        with pytest.raises(ValueError, match=text):
            broker.register_task(nothing, **labels)


async def test_limits_are_those_of_the_task(
    broker: LedgerBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The labels have the names of the options of ``@task``, and hold."""
    set_environment(monkeypatch, None)
    at_once: list[int] = []
    running: set[int] = set()

    @broker.task("slow", concurrency=1, rate_limit="100/m")
    async def slow(number: int) -> None:
        running.add(number)
        at_once.append(len(running))
        await asyncio.sleep(0.01)
        running.remove(number)

    (declared,) = broker.declared_tasks()
    await broker.startup()
    for task in [await slow.kiq(number) for number in range(3)]:
        await result_of(task)
    await broker.shutdown()

    assert declared_task(slow) is declared
    assert declared.limit == Limit(concurrency=1, rate=Rate(100, 60.0))
    assert at_once == [1, 1, 1]


def test_a_test_of_an_application_runs_what_it_sent(
    broker: LedgerBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plugin takes brokers among its tasks, and they use its jobs."""
    set_environment(monkeypatch, None)

    @broker.on_event(TaskiqEvents.WORKER_STARTUP)
    async def begin(state: TaskiqState) -> None:
        state.begun = True

    @broker.task
    async def double(value: int, context: Context = TaskiqDepends()) -> list[object]:  # noqa: B008
        return [value * 2, context.state.begun]

    plugin = OperationsPlugin(OperationsConfig(tasks=[broker]))
    sent = asyncio.run(AsyncKicker[..., Any](double.task_name, broker, {}).kiq(21))
    (job,) = run_pending(plugin)

    assert (job.id, job.result) == (sent.task_id, [42, True])
    assert asyncio.run(result_of(sent)).return_value == [42, True]


@pytest.fixture(autouse=True)
def _no_shared_tasks() -> Iterator[None]:
    before = dict(LedgerBroker.global_task_registry)
    yield
    LedgerBroker.global_task_registry.clear()
    LedgerBroker.global_task_registry.update(before)
