"""The contract of ``HealthCheck``, run against every adapter.

A new adapter adds a row to ``ADAPTERS``.
"""

import asyncio
import json
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from copy import deepcopy
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine
from tests.integration.postgres_clients import checked, config_of, opened
from tests.manual_clock import ManualClock
from tests.servers.fixtures import or_skip
from tests.servers.pgbouncer import POOLED, Poolers
from tests.servers.postgres import Database
from tests.servers.redis import redis_server

from viralfx.adapters.memory import MemoryDatabase, MemoryRedis
from viralfx.adapters.process_memory import ProcessMemory
from viralfx.adapters.redis import RedisClient, RedisHealthCheck
from viralfx.bootstrap import assemble
from viralfx.bootstrap.jobs import wire_jobs
from viralfx.checks import DiskCheck, HttpCheck, SqlAlchemyCheck, TcpCheck
from viralfx.core.clock import Clock, timestamp
from viralfx.domain.health.check_runner import FunctionCheck
from viralfx.domain.health.model import HealthCheck, Observation, Status
from viralfx.domain.health.monitor import HealthMonitor
from viralfx.settings import RedisSettings, Settings
from viralfx.telemetry.metrics import Metrics

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
MEGABYTES = re.compile(r"\d+MB")
PERCENT = re.compile(r"\d+\.\d\d%")

# The fields of each check in docs/operations.md: names, and JSON types or patterns of texts.
DATABASE: object = {
    "isConnected": bool,
    "stats": {
        "totalConnections": int,
        "activeConnections": int,
        "idleConnections": int,
        "failedConnections": int,
        "lastHealthCheck": TIME,
    },
    "poolConfig": {"min": int, "max": int, "timeout": int},
}
REDIS: object = {
    "isConnected": bool,
    "stats": {
        "isConnected": bool,
        "lastHealthCheck": TIME,
        "failedAttempts": int,
        "totalRequests": int,
        "successfulRequests": int,
        "failedRequests": int,
    },
    "config": {"host": str, "port": int, "db": int},
}
MEMORY: object = {
    "heapUsed": MEGABYTES,
    "heapTotal": MEGABYTES,
    "rss": MEGABYTES,
    "external": MEGABYTES,
    "usagePercent": PERCENT,
}
QUEUES: object = [
    {
        "name": str,
        "status": str,
        "metrics": {"waiting": int, "active": int, "completed": int, "failed": int},
    }
]

Make = Callable[[Clock, pytest.FixtureRequest], AbstractAsyncContextManager[HealthCheck]]


@dataclass(frozen=True)
class Adapter:
    """One implementation of the port: a healthy check, and its detail fields."""

    name: str
    make: Make
    shape: object


def plain(make: Callable[[Clock], HealthCheck]) -> Make:
    """Wrap a check that needs no opening or closing."""

    @asynccontextmanager
    async def made(clock: Clock, _: pytest.FixtureRequest) -> AsyncIterator[HealthCheck]:
        yield make(clock)

    return made


@asynccontextmanager
async def _postgres(clock: Clock, request: pytest.FixtureRequest) -> AsyncIterator[HealthCheck]:
    config = config_of(request.getfixturevalue("migrated_database"))
    async with opened(config, clock=clock) as database, checked(database, clock=clock) as check:
        yield check


def _behind(mode: str, prepared: int) -> Make:
    @asynccontextmanager
    async def made(clock: Clock, request: pytest.FixtureRequest) -> AsyncIterator[HealthCheck]:
        database: Database = request.getfixturevalue("migrated_database")
        poolers: Poolers = request.getfixturevalue("shared_pgbouncer")
        pooler = poolers(database.server, mode, max_prepared_statements=prepared)
        config = config_of(database, through=pooler, pooler=mode)
        async with opened(config, clock=clock) as pool, checked(pool, clock=clock) as check:
            yield check

    return made


@asynccontextmanager
async def _redis(clock: Clock, _: pytest.FixtureRequest) -> AsyncIterator[HealthCheck]:
    """Check a real server."""
    with or_skip(), redis_server() as server:
        client = RedisClient(RedisSettings(host=server.host, port=server.port), clock=clock)
        try:
            yield RedisHealthCheck(client, clock)
        finally:
            await client.close()


_QUEUES = Settings(queues=("default", "slow"))


@asynccontextmanager
async def _postgres_queues(
    clock: Clock, request: pytest.FixtureRequest
) -> AsyncIterator[HealthCheck]:
    config = config_of(request.getfixturevalue("migrated_database"))
    async with opened(config, clock=clock) as database:
        monitor = HealthMonitor(clock=clock)
        jobs = wire_jobs(
            _QUEUES,
            clock,
            monitor,
            database=database,
            redis=None,
            functions=(),
            metrics=Metrics(),
            instance="here",
        )
        yield jobs.check


@asynccontextmanager
async def _engine(_: Clock, request: pytest.FixtureRequest) -> AsyncIterator[HealthCheck]:
    database: Database = request.getfixturevalue("database")
    engine = create_async_engine(database.url.replace("://", "+asyncpg://", 1))
    try:
        yield SqlAlchemyCheck(engine)
    finally:
        await engine.dispose()


@asynccontextmanager
async def _plain_engine(_: Clock, request: pytest.FixtureRequest) -> AsyncIterator[HealthCheck]:
    folder: Path = request.getfixturevalue("tmp_path")
    engine = create_engine(f"sqlite:///{folder / 'shop.db'}")
    try:
        yield SqlAlchemyCheck(engine)
    finally:
        engine.dispose()


class HttpServer(ThreadingHTTPServer):
    """A server for clients that come at the same time."""

    request_queue_size = 100


@asynccontextmanager
async def _http(_: Clock, __: pytest.FixtureRequest) -> AsyncIterator[HealthCheck]:
    # In a thread, since tasks of a server in this event loop would count as those of the check.
    with HttpServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            yield HttpCheck(f"http://127.0.0.1:{server.server_port}/README.md")
        finally:
            server.shutdown()
            serving.join()


@asynccontextmanager
async def _tcp(_: Clock, __: pytest.FixtureRequest) -> AsyncIterator[HealthCheck]:
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as listening:
        yield TcpCheck("localhost", listening.getsockname()[1])


async def _works() -> bool:
    return True


ENGINE: object = {"dialect": str, "pool": {"inUse": int, "limit": int}}

ADAPTERS = [
    Adapter("memory database", plain(MemoryDatabase), DATABASE),
    Adapter("postgres", _postgres, DATABASE),
    Adapter("memory redis", plain(MemoryRedis), REDIS),
    Adapter("process memory", plain(lambda _: ProcessMemory()), MEMORY),
    Adapter("redis", _redis, REDIS),
    Adapter(
        "memory queues", plain(lambda clock: assemble(_QUEUES, clock=clock).jobs.check), QUEUES
    ),
    Adapter("postgres queues", _postgres_queues, QUEUES),
    Adapter("asynchronous engine", _engine, ENGINE),
    Adapter("plain engine", _plain_engine, ENGINE),
    Adapter("http", _http, {"host": str, "status": int}),
    Adapter("tcp", _tcp, {"host": str, "port": int}),
    Adapter(
        "disk",
        plain(lambda _: DiskCheck("/", 0.000001)),
        {"path": str, "totalBytes": int, "freeBytes": int},
    ),
    Adapter("coroutine function", plain(lambda _: FunctionCheck("shop", _works)), {}),
    Adapter("plain function", plain(lambda _: FunctionCheck("shop", lambda: None)), {}),
]


POOLERS = [
    Adapter(f"pgbouncer {mode} {number}", _behind(mode, number), DATABASE)
    for mode, number in POOLED
]


@pytest.fixture(
    params=[
        *(pytest.param(one, id=one.name) for one in ADAPTERS),
        *(pytest.param(one, id=one.name, marks=pytest.mark.soak) for one in POOLERS),
    ]
)
def adapter(request: pytest.FixtureRequest) -> Adapter:
    """Return each adapter in turn."""
    chosen: Adapter = request.param
    return chosen


@pytest.fixture
def clock() -> ManualClock:
    """Return a clock that the test moves."""
    return ManualClock()


@pytest.fixture
async def check(
    adapter: Adapter, clock: ManualClock, request: pytest.FixtureRequest
) -> AsyncIterator[HealthCheck]:
    """Return the adapter's check, opened."""
    async with adapter.make(clock, request) as check:
        yield check


def misfits(shape: object, value: object, path: str = "details") -> list[str]:
    """Return the paths at which a JSON value deviates from the shape."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return [f"{path} is no object"]
        return [
            problem
            for key, inner in shape.items()
            for problem in (
                misfits(inner, value[key], f"{path}.{key}")
                if key in value
                else [f"{path}.{key} is missing"]
            )
        ]
    if isinstance(shape, list):
        if not isinstance(value, list) or not value:
            return [f"{path} is no list of anything"]
        return [p for item in value for p in misfits(shape[0], item, f"{path}[]")]
    if isinstance(shape, re.Pattern):
        fits = isinstance(value, str) and shape.fullmatch(value) is not None
        return [] if fits else [f"{path} is {value!r}"]
    # The exact type, because True is an int too.
    return [] if type(value) is shape else [f"{path} is {value!r}"]


async def test_observation_is_complete(check: HealthCheck) -> None:
    """A healthy technology does not fail and has a one-line message."""
    observation = await check.check()

    assert isinstance(observation, Observation)
    assert isinstance(observation.status, Status)
    assert observation.status is not Status.FAIL
    assert observation.message.strip()
    assert "\n" not in observation.message


async def test_code_is_a_machine_word_and_only_for_problems(check: HealthCheck) -> None:
    """A passing check has no code; other codes carry no data."""
    observation = await check.check()

    if observation.status is Status.PASS:
        assert observation.code is None
    else:
        assert observation.code is not None
        assert re.fullmatch(r"[a-z][a-z_]*", observation.code)


async def test_details_are_json(check: HealthCheck) -> None:
    """They are encoded strictly and compare equal after decoding."""
    details = (await check.check()).details

    assert details == json.loads(json.dumps(details, allow_nan=False))


async def test_details_have_the_documented_fields(adapter: Adapter, check: HealthCheck) -> None:
    """Each with its name and JSON type in docs/operations.md."""
    details = json.loads(json.dumps((await check.check()).details))

    assert misfits(adapter.shape, details) == []


async def test_last_check_follows_the_clock(
    adapter: Adapter, check: HealthCheck, clock: ManualClock
) -> None:
    """For checks whose documented details have that time."""
    await check.check()
    await clock.advance(90.0)
    details = (await check.check()).details

    if "lastHealthCheck" in str(adapter.shape):
        assert isinstance(details, dict)
        assert timestamp(clock.now()) == details["stats"]["lastHealthCheck"]


async def test_observation_does_not_change_afterwards(
    check: HealthCheck, clock: ManualClock
) -> None:
    """The next check does not modify an earlier observation."""
    first = await check.check()
    copy = deepcopy(first)
    await clock.advance(5.0)
    await check.check()

    assert copy == first


async def test_survives_cancellation(check: HealthCheck) -> None:
    """Cancelled at any of its first awaits, a check ends soon and works the next time."""
    for turns in range(5):
        task = asyncio.create_task(check.check())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        async with asyncio.timeout(5.0):
            await asyncio.wait({task})

    assert (await check.check()).status is not Status.FAIL


async def test_leaks_no_task(check: HealthCheck) -> None:
    """Not in a hundred checks."""
    await check.check()
    before = asyncio.all_tasks()
    for _ in range(100):
        await check.check()

    assert before == asyncio.all_tasks()


async def test_concurrent_checks_are_safe(check: HealthCheck) -> None:
    """For example a forced round beside a scheduled check."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(check.check()) for _ in range(10)]

    assert all(task.result().status is not Status.FAIL for task in tasks)
