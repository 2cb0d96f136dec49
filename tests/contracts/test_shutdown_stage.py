"""The contract of ``ShutdownStage``, run against every stage.

A new stage adds a row to ``STAGES``.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
from tests.integration.postgres_clients import config_of
from tests.manual_clock import ManualClock
from tests.servers.fixtures import or_skip
from tests.servers.redis import RedisServer, redis_server
from tests.servers.waiting import wait_until

from viralfx import task
from viralfx.adapters.memory import FileStateStore, MemoryAuditStore, MemoryStateStore
from viralfx.adapters.postgres import PostgresHealthCheck, close_postgres
from viralfx.adapters.redis import RedisClient, RedisHealthCheck, close_redis
from viralfx.bootstrap import assemble
from viralfx.bootstrap.jobs import JobRuntime
from viralfx.core.clock import Clock
from viralfx.domain.audit import Action, AuditEntry, AuditEvent, AuditTrail
from viralfx.domain.health.model import CheckPolicy, Observation
from viralfx.domain.health.monitor import HealthMonitor
from viralfx.domain.operations import SavedState, save_state
from viralfx.domain.shutdown import StageFunction
from viralfx.postgres import PostgresDatabase
from viralfx.runner.process import drain_requests, stop_application, stop_listening
from viralfx.server.http_server import AnyServer, HttpServer, UvicornServer, listen
from viralfx.server.interface import Receive, Scope, Send
from viralfx.server.lifespan import ApplicationLifespan
from viralfx.settings import RedisSettings, Settings
from viralfx.web.gate import Gate
from viralfx.web.layer import OperationsConfig
from viralfx.web.plugin import OperationsPlugin

Make = Callable[[Clock, Path, pytest.FixtureRequest], AbstractAsyncContextManager[StageFunction]]

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


def _jobs(clock: Clock) -> JobRuntime:
    @task("work")
    async def work(seconds: float) -> None:
        await clock.sleep(seconds)

    return assemble(Settings(), tasks=[work], clock=clock).jobs


@asynccontextmanager
async def _idle_jobs(clock: Clock, *_: object) -> AsyncIterator[StageFunction]:
    jobs = _jobs(clock)
    jobs.start()
    yield jobs.drain


@asynccontextmanager
async def _busy_jobs(clock: Clock, *_: object) -> AsyncIterator[StageFunction]:
    jobs = _jobs(clock)
    jobs.start()
    await jobs.service.submit("work", 2.0)
    yield jobs.drain


@asynccontextmanager
async def _jobs_elsewhere(clock: Clock, *_: object) -> AsyncIterator[StageFunction]:
    jobs = _jobs(clock)
    jobs.disable_worker()
    yield jobs.drain


@asynccontextmanager
async def _notifications(clock: Clock, *_: object) -> AsyncIterator[StageFunction]:
    jobs = _jobs(clock)
    await jobs.service.submit("work", 2.0)
    yield jobs.close_notifier


@asynccontextmanager
async def _memory_state(*_: object) -> AsyncIterator[StageFunction]:
    store = MemoryStateStore()
    yield lambda _: save_state(store, lambda: STATE)


@asynccontextmanager
async def _file_state(_: Clock, folder: Path, __: object) -> AsyncIterator[StageFunction]:
    store = FileStateStore(folder)
    yield lambda _: save_state(store, lambda: STATE)


@asynccontextmanager
async def _idle_checks(clock: Clock, *_: object) -> AsyncIterator[StageFunction]:
    monitor = HealthMonitor(clock=clock)
    monitor.register("hanging", _Hanging(), CheckPolicy())
    yield lambda _: monitor.stop()


@asynccontextmanager
async def _busy_checks(clock: Clock, *_: object) -> AsyncIterator[StageFunction]:
    monitor = HealthMonitor(clock=clock)
    monitor.register("hanging", _Hanging(), CheckPolicy())
    monitor.start()
    await asyncio.sleep(0)
    yield lambda _: monitor.stop()


class _HangingAuditStore(MemoryAuditStore):
    async def write(self, events: Sequence[AuditEvent]) -> None:
        await asyncio.Event().wait()
        raise AssertionError(events)


def _audit(store: Callable[[Clock], MemoryAuditStore], *, opened: bool = True) -> Make:
    @asynccontextmanager
    async def made(clock: Clock, *_: object) -> AsyncIterator[StageFunction]:
        trail = AuditTrail(store(clock), clock=clock)
        trail.record(AuditEntry(action=Action.STOP, actor="management"))
        if opened:
            await trail.open()
        yield trail.close

    return made


def _postgres(*, opened: bool = True, in_use: bool = False) -> Make:
    @asynccontextmanager
    async def made(
        clock: Clock, _: Path, request: pytest.FixtureRequest
    ) -> AsyncIterator[StageFunction]:
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
            yield partial(close_postgres, database, check, clock)
        finally:
            database.terminate()
            await check.close()
            if using is not None:
                using.cancel()

    return made


def _http(
    make: Callable[[AnyServer, Gate, Clock], StageFunction],
    *,
    opened: bool,
    kind: type[AnyServer],
) -> Make:
    @asynccontextmanager
    async def made(clock: Clock, *_: object) -> AsyncIterator[StageFunction]:
        gate = Gate(OperationsPlugin(OperationsConfig(settings=Settings())).endpoints, _application)
        server = kind(gate, listen("PORT", "127.0.0.1", 0), lifespan=True)
        if opened:
            await server.open()
            assert await _lifespan_of(server).start()
        try:
            yield make(server, gate, clock)
        finally:
            await _lifespan_of(server).stop()
            await server.close()

    return made


def _lifespan_of(server: AnyServer) -> ApplicationLifespan:
    assert server.application is not None
    return server.application


def _redis_client(clock: Clock, server: RedisServer) -> RedisClient:
    return RedisClient(RedisSettings(host=server.host, port=server.port), clock=clock)


@asynccontextmanager
async def _unused_redis(
    clock: Clock, _: Path, __: pytest.FixtureRequest
) -> AsyncIterator[StageFunction]:
    yield partial(close_redis, RedisClient(RedisSettings(), clock=clock))


@asynccontextmanager
async def _used_redis(
    clock: Clock, _: Path, __: pytest.FixtureRequest
) -> AsyncIterator[StageFunction]:
    with or_skip(), redis_server() as server:
        client = _redis_client(clock, server)
        await client.redis.set("key", "value")
        await RedisHealthCheck(client, clock).check()
        yield partial(close_redis, client)
        await client.close()


@asynccontextmanager
async def _frozen_redis(
    clock: Clock, _: Path, __: pytest.FixtureRequest
) -> AsyncIterator[StageFunction]:
    with or_skip(), redis_server() as server:
        client = _redis_client(clock, server)
        await client.redis.set("key", "value")
        server.freeze()
        request = asyncio.ensure_future(client.redis.get("key"))
        await asyncio.to_thread(wait_until, lambda: client.active)
        yield partial(close_redis, client)
        request.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await request
        await client.close()


STAGES: dict[str, Make] = {
    "drain jobs": _idle_jobs,
    "drain busy jobs": _busy_jobs,
    "drain jobs elsewhere": _jobs_elsewhere,
    "close notifications": _notifications,
    "save state in memory": _memory_state,
    "save state in a file": _file_state,
    "close redis before start": _unused_redis,
    "close redis": _used_redis,
    "close frozen redis": _frozen_redis,
    "stop checking before start": _idle_checks,
    "stop checking": _busy_checks,
    "store audit events": _audit(MemoryAuditStore),
    "store audit events before start": _audit(MemoryAuditStore, opened=False),
    "store audit events in a store that hangs": _audit(_HangingAuditStore),
    "close postgres": _postgres(),
    "close postgres in use": _postgres(in_use=True),
    "close postgres before start": _postgres(opened=False),
    **{
        f"{name}{by}{when}": _http(make, opened=opened, kind=kind)
        for by, kind in (("", HttpServer), (" by uvicorn alone", UvicornServer))
        for name, make in (
            ("stop listening", lambda server, gate, _: lambda _: stop_listening(server, gate)),
            ("drain requests", partial(partial, drain_requests)),
            (
                "stop application",
                lambda server, _, __: lambda _: stop_application(_lifespan_of(server)),
            ),
            ("close server", lambda server, _, __: lambda _: server.close()),
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
) -> AsyncIterator[StageFunction]:
    """Return each stage in turn."""
    make: Make = request.param
    async with make(clock, tmp_path, request) as stage:
        yield stage


async def ended(task: asyncio.Task[None], clock: ManualClock, *, within: float) -> None:
    """Advance the clock until the task is done; fail if it takes longer than the seconds."""
    began = clock.monotonic()
    async with asyncio.timeout(5.0):
        while not task.done():
            # Real threads and sockets may act next, so each step yields to them.
            await asyncio.to_thread(lambda: None)
            if clock.monotonic() - began < within:
                await clock.advance(0.25)
    assert clock.monotonic() - began <= within


async def test_ends_within_its_budget(stage: StageFunction, clock: ManualClock) -> None:
    """An unhindered stage ends in time and without an error."""
    run = asyncio.create_task(stage(10.0))
    await ended(run, clock, within=10.0)

    assert run.exception() is None


async def test_running_twice_is_safe(stage: StageFunction, clock: ManualClock) -> None:
    """The second run does nothing and raises nothing."""
    for _ in range(2):
        run = asyncio.create_task(stage(10.0))
        await ended(run, clock, within=10.0)

        assert run.exception() is None


async def test_zero_budget_is_survived(stage: StageFunction, clock: ManualClock) -> None:
    """The stage ends at once; it may raise because it has to give up."""
    run = asyncio.create_task(stage(0.0))
    await ended(run, clock, within=0.0)

    assert not run.cancelled()


@pytest.mark.parametrize("turns", [0, 1, 2, 5])
async def test_honours_cancellation(stage: StageFunction, clock: ManualClock, turns: int) -> None:
    """Cancelled at any of its first awaits, a stage ends soon."""
    run = asyncio.create_task(stage(10.0))
    for _ in range(turns):
        await asyncio.sleep(0)
    run.cancel()
    await ended(run, clock, within=0.0)


@pytest.mark.parametrize("stage", list(STAGES.values()), ids=list(STAGES), indirect=True)
async def test_runs_again_after_a_cancellation(stage: StageFunction, clock: ManualClock) -> None:
    """It does its work at the next call."""
    run = asyncio.create_task(stage(10.0))
    await asyncio.sleep(0)
    run.cancel()
    await ended(run, clock, within=0.0)
    again = asyncio.create_task(stage(10.0))
    await ended(again, clock, within=10.0)

    assert again.exception() is None
