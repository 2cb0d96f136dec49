"""Dependencies and middleware of tasks, as an application declares them for all its code."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from litestar import Litestar
from litestar.datastructures import State
from litestar.di import Provide

from viralfx import JobContext, OperationsConfig, OperationsPlugin, task
from viralfx.bootstrap import assemble
from viralfx.core.errors import ConfigurationError
from viralfx.resilience.policy import BackoffPolicy
from viralfx.settings import Settings
from viralfx.testing import SubmittedJob, run_pending

ONCE = BackoffPolicy(attempts=1)


@dataclass
class Settled:
    """The job of one task, and the steps that were recorded on the way."""

    job: SubmittedJob
    steps: list[Any]


def plugin_with(
    function: Callable[..., Any],
    dependencies: Mapping[str, Any],
    middleware: Sequence[Any] = (),
    state: State | None = None,
) -> OperationsPlugin:
    """Return the plugin of an application with one task."""
    plugin = OperationsPlugin(
        OperationsConfig(settings=Settings(), tasks=[function], task_middleware=middleware)
    )
    Litestar(plugins=[plugin], dependencies=dict(dependencies), state=state, logging_config=None)
    return plugin


async def settle(plugin: OperationsPlugin, payload: object = 1) -> SubmittedJob:
    """Run one job of the task ``it``."""
    await plugin.jobs.submit("it", payload)
    (job,) = await run_pending(plugin)
    return job


async def test_every_kind_of_dependency_is_provided() -> None:
    """Coroutines, functions on the loop and in a thread, generators, classes; nested, cached."""
    steps: list[Any] = []
    loop_thread = threading.get_ident()

    async def first(state: State) -> str:
        return f"first {state.name}"

    def threaded() -> bool:
        return threading.get_ident() != loop_thread

    async def connection(first: str) -> AsyncIterator[str]:
        yield f"connection of {first}"
        steps.append("connection closed")

    def session(connection: str, missing: int = 7) -> Iterator[str]:
        yield f"session {missing} on {connection}"
        steps.append("session closed")

    class Repository:
        def __init__(self, session: str) -> None:
            self.session = session

    made = 0

    def once() -> int:
        nonlocal made
        made += 1
        return made

    @task("it")
    async def it(
        payload: int,
        *,
        repository: Repository,
        threaded: bool,
        once: int,
        bare: str,
        session: str,
        limit: int = 3,
    ) -> list[Any]:
        steps.append("task")
        assert repository.session is session
        return [payload, session, threaded, once, bare, limit]

    async def bare() -> str:
        return "bare"

    plugin = plugin_with(
        it,
        {
            "first": Provide(first),
            "threaded": Provide(threaded, sync_to_thread=True),
            "connection": Provide(connection),
            "session": Provide(session),
            "repository": Provide(Repository, sync_to_thread=False),
            "once": Provide(once, use_cache=True, sync_to_thread=False),
            "bare": bare,
        },
        state=State({"name": "of all"}),
    )
    jobs = [await settle(plugin), await settle(plugin)]

    wanted = [1, "session 7 on connection of first of all", True, 1, "bare", 3]
    assert [job.result for job in jobs] == [wanted, wanted]
    assert steps == ["task", "session closed", "connection closed"] * 2


@pytest.mark.parametrize("reaction", ["swallow", "raise", "replace"])
async def test_a_generator_sees_the_failure_of_the_task(reaction: str) -> None:
    """It can roll back; it cannot turn the failure into a success."""
    seen: list[BaseException] = []

    async def session() -> AsyncIterator[str]:
        try:
            yield "open"
        except ValueError as error:
            seen.append(error)
            if reaction == "raise":
                raise
            if reaction == "replace":
                raise RuntimeError("rollback failed") from error

    @task("it", retry=ONCE)
    def it(_: int, *, session: str) -> None:
        raise ValueError(f"planted with {session}")

    job = await settle(plugin_with(it, {"session": Provide(session)}))

    assert job.state == "failed"
    assert job.error is not None
    wanted = "rollback failed" if reaction == "replace" else "planted with open"
    assert job.error.message == wanted
    assert [str(error) for error in seen] == ["planted with open"]


async def test_a_clean_up_that_fails_fails_the_job() -> None:
    """Such as a commit after the task."""

    async def session() -> AsyncIterator[str]:
        yield "open"
        raise RuntimeError("commit failed")

    @task("it", retry=ONCE)
    async def it(_: int, session: str) -> str:
        return session

    job = await settle(plugin_with(it, {"session": Provide(session)}))

    assert (job.state, job.error and job.error.message) == ("failed", "commit failed")


async def test_a_timeout_reaches_the_clean_up() -> None:
    """It may still await, as a roll-back does."""
    steps: list[str] = []

    async def session() -> AsyncIterator[str]:
        try:
            yield "open"
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            steps.append("rolled back")
            raise

    @task("it", retry=ONCE, timeout=0.01)
    async def it(_: int, session: str) -> None:
        steps.append(session)
        await asyncio.Event().wait()

    job = await settle(plugin_with(it, {"session": Provide(session)}))

    assert (job.state, job.error and job.error.code) == ("failed", "timeout")
    assert steps == ["open", "rolled back"]


async def _of_request(request: object) -> object:
    return request


async def _of_nothing(sesion: object) -> object:
    return sesion


async def _of_itself(circle: object) -> object:
    return circle


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("sesion", "takes 'sesion', and the application has no dependency of that name; did you"),
        (
            "zzz",
            "it has cache, circle, database, jobs, of_nothing, of_request, redis, session. A task",
        ),
        ("of_request", "its dependency 'of_request' takes 'request', which belongs to a request"),
        ("of_nothing", "its dependency 'of_nothing' takes 'sesion', and the application has no"),
        ("circle", "its dependency 'circle' needs 'circle', which needs itself"),
    ],
)
def test_a_dependency_that_cannot_be_provided(name: str, problem: str) -> None:
    """It is an error at the start, which names the task, the parameter and what there is."""
    parameters: dict[str, Any] = {}
    exec(f"def it(payload, *, {name}): ...", parameters)  # noqa: S102
    function = task("it")(parameters["it"])

    async def session() -> str:
        return "session"

    plugin = OperationsPlugin(OperationsConfig(settings=Settings(), tasks=[function]))
    Litestar(
        plugins=[plugin],
        dependencies={
            "session": Provide(session),
            "of_request": Provide(_of_request),
            "of_nothing": Provide(_of_nothing),
            "circle": Provide(_of_itself),
        },
        logging_config=None,
    )
    with pytest.raises(ConfigurationError) as raised:
        plugin.assembly.jobs.require_dependencies()  # at the start of the application
    assert problem in str(raised.value)
    assert str(raised.value).startswith("@task('it'): ")


tenant: ContextVar[str] = ContextVar("tenant", default="no tenant")


@pytest.mark.parametrize("in_thread", [False, True])
async def test_middleware_surrounds_a_task(*, in_thread: bool) -> None:
    """The first is the outermost; it sees the error; its context variables are in the task."""
    steps: list[Any] = []

    async def outer(
        call_next: Callable[[], Awaitable[Any]], context: JobContext, payload: Any
    ) -> Any:
        tenant.set(f"tenant {payload}")
        steps.append(f"before {context.attempt}")
        try:
            return await call_next()
        except ValueError as error:
            steps.append(f"error {error}")
            raise
        finally:
            steps.append("after")

    async def inner(call_next: Callable[[], Awaitable[Any]], _: JobContext, payload: Any) -> Any:
        steps.append("inner")
        if payload == 3:
            raise ValueError("refused before")
        return f"{await call_next()}!"

    def work(payload: int, tenant_name: str) -> str:
        steps.append("task")
        if payload == 2:
            raise ValueError("planted")
        return f"{tenant.get()} {tenant_name}"

    async def coroutine(payload: int, tenant_name: str) -> str:
        await asyncio.sleep(0)
        return work(payload, tenant_name)

    async def tenant_name() -> str:
        return tenant.get()

    it = task("it", retry=ONCE)(work if in_thread else coroutine)
    plugin = plugin_with(it, {"tenant_name": Provide(tenant_name)}, [outer, inner])
    jobs = [await settle(plugin, payload) for payload in (1, 2, 3)]

    assert [job.state for job in jobs] == ["completed", "failed", "failed"]
    assert jobs[0].result == "tenant 1 tenant 1!"
    assert [job.error.message for job in jobs if job.error] == ["planted", "refused before"]
    assert steps == [
        *("before 1", "inner", "task", "after"),
        *("before 1", "inner", "task", "error planted", "after"),
        *("before 1", "inner", "error refused before", "after"),
    ]
    assert tenant.get() == "no tenant"


# -- middleware ------------------------------------------------------------------------------------


def _plain(call_next: Any, _context: Any, _payload: Any) -> Any:
    return call_next()


async def _without_payload(call_next: Any, _context: Any) -> Any:
    return await call_next()


async def _three(call_next: Any, _context: Any, _payload: Any, *, log: list[str]) -> Any:
    return log or await call_next()


class _Middleware:
    async def __call__(self, call_next: Any, _context: Any, _payload: Any) -> Any:
        return await call_next()


@pytest.mark.parametrize("middleware", [_plain, _without_payload, _Middleware, "text"])
def test_a_middleware_that_cannot_be_called_is_refused(middleware: Any) -> None:
    """Before the first job, each of which would fail."""
    with pytest.raises(TypeError, match="task_middleware takes coroutine functions such as"):
        assemble(Settings(), task_middleware=[middleware])
    assemble(Settings(), task_middleware=[_Middleware(), partial(_three, log=[])])


def test_a_configuration_of_another_form_is_refused() -> None:
    """One function in place of a list, and a list in place of the configuration."""
    config: Any = OperationsConfig
    plugin: Any = OperationsPlugin
    with pytest.raises(TypeError, match=r"^OperationsConfig.tasks takes a list, as in tasks=\[f\]"):
        config(tasks=_three)
    with pytest.raises(TypeError, match=r"^OperationsConfig.task_middleware takes a list"):
        config(task_middleware=_three)
    with pytest.raises(
        TypeError, match=r"^OperationsPlugin takes an OperationsConfig, .* not list$"
    ):
        plugin([_three])
