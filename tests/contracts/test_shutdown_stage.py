"""The contract of ``ShutdownStage``, run against every stage.

A new stage adds a row to ``STAGES``.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tests.integration.postgres_clients import config_of
from tests.manual_clock import ManualClock
from tests.servers.fixtures import or_skip
from tests.servers.redis import RedisServer, redis_server
from tests.servers.waiting import wait_until

from viralfx import task
from viralfx.adapters.memory import FileStateStore, MemoryStateStore
from viralfx.adapters.postgres import ClosePostgres, PostgresDatabase, PostgresHealthCheck
from viralfx.adapters.redis import CloseRedis, RedisClient, RedisConfig, RedisHealthCheck
from viralfx.bootstrap import assemble
from viralfx.bootstrap.job_system import CloseBells, DrainWorker, JobSystem
from viralfx.domain.clock import Clock
from viralfx.domain.health import CheckPolicy, Observation
from viralfx.domain.monitor import HealthMonitor, StopChecking
from viralfx.domain.shutdown import ShutdownStage
from viralfx.domain.state import SavedState, SaveState
from viralfx.runner.http import HttpServer
from viralfx.runner.sockets import listen
from viralfx.runner.stages import CloseServer, DrainRequests, StopApplication, StopListening
from viralfx.settings import Settings
from viralfx.web.asgi import Receive, Scope, Send
from viralfx.web.gate import Gate
from viralfx.web.plugin import OperationsConfig, OperationsPlugin

Make = Callable[[Clock, Path, pytest.FixtureRequest], AbstractAsyncContextManager[ShutdownStage]]

STATE = SavedState(
    saved_at=datetime(2026, 1, 6, 12, tzinfo=UTC), starts=1, uptime=1.0, health="healthy"
)


class _Hanging:
    async def check(self) -> Observation:
        await asyncio.Event().wait()
        raise AssertionError


async def _application(scope: Scope, receive: Receive, send: Send) -> None:
    assert scope["type"] == "lifespan"
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


def _jobs(clock: Clock) -> JobSystem:
    @task("work")
    async def work(seconds: float) -> None:
        await clock.sleep(seconds)

    return assemble(Settings(), tasks=[work], clock=clock).jobs


@asynccontextmanager
async def _idle_jobs(clock: Clock, *_: object) -> AsyncIterator[ShutdownStage]:
    jobs = _jobs(clock)
    jobs.start()
    yield DrainWorker(jobs)


@asynccontextmanager
async def _busy_jobs(clock: Clock, *_: object) -> AsyncIterator[ShutdownStage]:
    jobs = _jobs(clock)
    jobs.start()
    await jobs.service.submit("work", 2.0)
    yield DrainWorker(jobs)


@asynccontextmanager
async def _jobs_elsewhere(clock: Clock, *_: object) -> AsyncIterator[ShutdownStage]:
    jobs = _jobs(clock)
    jobs.dismiss()
    yield DrainWorker(jobs)


@asynccontextmanager
async def _bells(clock: Clock, *_: object) -> AsyncIterator[ShutdownStage]:
    jobs = _jobs(clock)
    await jobs.service.submit("work", 2.0)
    yield CloseBells(jobs)


@asynccontextmanager
async def _memory_state(*_: object) -> AsyncIterator[ShutdownStage]:
    yield SaveState(MemoryStateStore(), lambda: STATE)


@asynccontextmanager
async def _file_state(_: Clock, folder: Path, __: object) -> AsyncIterator[ShutdownStage]:
    yield SaveState(FileStateStore(folder), lambda: STATE)


@asynccontextmanager
async def _idle_checks(clock: Clock, *_: object) -> AsyncIterator[ShutdownStage]:
    monitor = HealthMonitor(clock=clock)
    monitor.register("hanging", _Hanging(), CheckPolicy())
    yield StopChecking(monitor)


@asynccontextmanager
async def _busy_checks(clock: Clock, *_: object) -> AsyncIterator[ShutdownStage]:
    monitor = HealthMonitor(clock=clock)
    monitor.register("hanging", _Hanging(), CheckPolicy())
    monitor.start()
    await asyncio.sleep(0)
    yield StopChecking(monitor)


def _postgres(*, opened: bool = True, in_use: bool = False) -> Make:
    @asynccontextmanager
    async def made(
        clock: Clock, _: Path, request: pytest.FixtureRequest
    ) -> AsyncIterator[ShutdownStage]:
        database = PostgresDatabase(config_of(request.getfixturevalue("database")), clock=clock)
        check = PostgresHealthCheck(database, clock, timeout=2.0)

        async def use() -> None:
            async with database.acquire():
                used.set()
                await clock.sleep(2.0)

        used, using = asyncio.Event(), None
        try:
            if opened:
                await database.open()
                await check.check()
            if in_use:
                using = asyncio.create_task(use())
                await used.wait()
            yield ClosePostgres(database, check, clock)
        finally:
            database.terminate()
            await check.close()
            if using is not None:
                using.cancel()

    return made


def _http(make: Callable[[HttpServer, Gate, Clock], ShutdownStage], *, opened: bool) -> Make:
    @asynccontextmanager
    async def made(clock: Clock, *_: object) -> AsyncIterator[ShutdownStage]:
        gate = Gate(OperationsPlugin(OperationsConfig(settings=Settings())).answers, _application)
        server = HttpServer(gate, listen("PORT", "127.0.0.1", 0), lifespan=True)
        if opened:
            await server.open()
            assert await server.start_application()
        try:
            yield make(server, gate, clock)
        finally:
            await server.stop_application()
            server.close()

    return made


def _redis_client(clock: Clock, server: RedisServer) -> RedisClient:
    return RedisClient(RedisConfig(host=server.host, port=server.port), clock=clock)


@asynccontextmanager
async def _unused_redis(
    clock: Clock, _: Path, __: pytest.FixtureRequest
) -> AsyncIterator[ShutdownStage]:
    yield CloseRedis(RedisClient(RedisConfig(), clock=clock))


@asynccontextmanager
async def _used_redis(
    clock: Clock, _: Path, __: pytest.FixtureRequest
) -> AsyncIterator[ShutdownStage]:
    with or_skip(), redis_server() as server:
        client = _redis_client(clock, server)
        await client.redis.set("key", "value")
        await RedisHealthCheck(client, clock).check()
        yield CloseRedis(client)
        await client.close()


@asynccontextmanager
async def _frozen_redis(
    clock: Clock, _: Path, __: pytest.FixtureRequest
) -> AsyncIterator[ShutdownStage]:
    with or_skip(), redis_server() as server:
        client = _redis_client(clock, server)
        await client.redis.set("key", "value")
        server.freeze()
        request = asyncio.ensure_future(client.redis.get("key"))
        await asyncio.to_thread(wait_until, lambda: client.active)
        yield CloseRedis(client)
        request.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await request
        await client.close()


STAGES: dict[str, Make] = {
    "drain jobs": _idle_jobs,
    "drain busy jobs": _busy_jobs,
    "drain jobs elsewhere": _jobs_elsewhere,
    "close bells": _bells,
    "save state in memory": _memory_state,
    "save state in a file": _file_state,
    "close redis before start": _unused_redis,
    "close redis": _used_redis,
    "close frozen redis": _frozen_redis,
    "stop checking before start": _idle_checks,
    "stop checking": _busy_checks,
    "close postgres": _postgres(),
    "close postgres in use": _postgres(in_use=True),
    "close postgres before start": _postgres(opened=False),
    **{
        f"{name}{when}": _http(make, opened=opened)
        for name, make in (
            ("stop listening", lambda server, gate, _: StopListening(server, gate)),
            ("drain requests", lambda _, gate, clock: DrainRequests(gate, clock)),
            ("stop application", lambda server, _, __: StopApplication(server)),
            ("close server", lambda server, _, __: CloseServer(server)),
        )
        for when, opened in (("", True), (" before start", False))
    },
}


@pytest.fixture
def clock() -> ManualClock:
    """Return a clock that the test moves."""
    return ManualClock()


@pytest.fixture(params=list(STAGES.values()), ids=list(STAGES))
async def stage(
    request: pytest.FixtureRequest, clock: ManualClock, tmp_path: Path
) -> AsyncIterator[ShutdownStage]:
    """Return each stage in turn."""
    make: Make = request.param
    async with make(clock, tmp_path, request) as stage:
        yield stage


async def ended(task: asyncio.Task[None], clock: ManualClock, *, within: float) -> None:
    """Move the clock until the task is done; fail when it is not within the seconds."""
    began = clock.monotonic()
    async with asyncio.timeout(5.0):
        while not task.done():
            # Real threads and sockets may have the next word, so each step gives them a turn.
            await asyncio.to_thread(lambda: None)
            if clock.monotonic() - began < within:
                await clock.advance(0.25)
    assert clock.monotonic() - began <= within


async def test_ends_within_its_budget(stage: ShutdownStage, clock: ManualClock) -> None:
    """A stage with nothing in its way ends in time and without an error."""
    run = asyncio.create_task(stage.run(10.0))
    await ended(run, clock, within=10.0)

    assert run.exception() is None


async def test_running_twice_is_safe(stage: ShutdownStage, clock: ManualClock) -> None:
    """The second run has nothing to do and does it without an error."""
    for _ in range(2):
        run = asyncio.create_task(stage.run(10.0))
        await ended(run, clock, within=10.0)

        assert run.exception() is None


async def test_zero_budget_is_survived(stage: ShutdownStage, clock: ManualClock) -> None:
    """With no time at all a stage ends at once; it may raise, as it may have to give up."""
    run = asyncio.create_task(stage.run(0.0))
    await ended(run, clock, within=0.0)

    assert not run.cancelled()


@pytest.mark.parametrize("turns", [0, 1, 2, 5])
async def test_honours_cancellation(stage: ShutdownStage, clock: ManualClock, turns: int) -> None:
    """A stage that is cut at any of its first turns ends soon."""
    run = asyncio.create_task(stage.run(10.0))
    for _ in range(turns):
        await asyncio.sleep(0)
    run.cancel()
    await ended(run, clock, within=0.0)


@pytest.mark.parametrize("stage", list(STAGES.values()), ids=list(STAGES), indirect=True)
async def test_runs_again_after_a_cut(stage: ShutdownStage, clock: ManualClock) -> None:
    """A stage that was cut once does its work at the next call."""
    run = asyncio.create_task(stage.run(10.0))
    await asyncio.sleep(0)
    run.cancel()
    await ended(run, clock, within=0.0)
    again = asyncio.create_task(stage.run(10.0))
    await ended(again, clock, within=10.0)

    assert again.exception() is None
