"""The contract of ``HealthCheck``, run against every adapter.

A new adapter adds a row to ``ADAPTERS``.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from copy import deepcopy
from dataclasses import dataclass

import pytest
from tests.integration.postgres_clients import checked, config_of, migrated, opened
from tests.manual_clock import ManualClock
from tests.servers.fixtures import or_skip
from tests.servers.redis import redis_server

from viralfx.adapters.memory import MemoryDatabase, MemoryRedis, ProcessMemory
from viralfx.adapters.redis import RedisClient, RedisConfig, RedisHealthCheck
from viralfx.bootstrap import assemble
from viralfx.bootstrap.jobs import wire_jobs
from viralfx.domain.clock import Clock, timestamp
from viralfx.domain.health import HealthCheck, Observation, Status
from viralfx.domain.monitor import HealthMonitor
from viralfx.settings import Settings
from viralfx.telemetry.metrics import Metrics

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
MEGABYTES = re.compile(r"\d+MB")
PERCENT = re.compile(r"\d+\.\d\d%")

# What the operations guide shows for each check: names, and JSON types or patterns of texts.
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
    """One implementation of the port: how to get one that is healthy, and its guide's fields."""

    name: str
    make: Make
    shape: object


def plain(make: Callable[[Clock], HealthCheck]) -> Make:
    """Wrap a check that needs nothing to be opened or closed."""

    @asynccontextmanager
    async def made(clock: Clock, _: pytest.FixtureRequest) -> AsyncIterator[HealthCheck]:
        yield make(clock)

    return made


@asynccontextmanager
async def _postgres(clock: Clock, request: pytest.FixtureRequest) -> AsyncIterator[HealthCheck]:
    config = await migrated(config_of(request.getfixturevalue("database")))
    async with opened(config, clock=clock) as database, checked(database, clock=clock) as check:
        yield check


@asynccontextmanager
async def _redis(clock: Clock, _: pytest.FixtureRequest) -> AsyncIterator[HealthCheck]:
    """Look at a real server."""
    with or_skip(), redis_server() as server:
        client = RedisClient(RedisConfig(host=server.host, port=server.port), clock=clock)
        try:
            yield RedisHealthCheck(client, clock)
        finally:
            await client.close()


_QUEUES = Settings(queues=("default", "slow"))


@asynccontextmanager
async def _postgres_queues(
    clock: Clock, request: pytest.FixtureRequest
) -> AsyncIterator[HealthCheck]:
    config = await migrated(config_of(request.getfixturevalue("database")))
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
]


@pytest.fixture(params=ADAPTERS, ids=lambda adapter: adapter.name)
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
    """Say where a JSON value lacks a field of the shape or has another type there."""
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
    """A healthy technology is not failed, and says so in one line of text."""
    observation = await check.check()

    assert isinstance(observation, Observation)
    assert isinstance(observation.status, Status)
    assert observation.status is not Status.FAIL
    assert observation.message.strip()
    assert "\n" not in observation.message


async def test_code_is_a_machine_word_and_only_for_problems(check: HealthCheck) -> None:
    """What passes has no code; what does not has one that carries no data."""
    observation = await check.check()

    if observation.status is Status.PASS:
        assert observation.code is None
    else:
        assert observation.code is not None
        assert re.fullmatch(r"[a-z][a-z_]*", observation.code)


async def test_details_are_json(check: HealthCheck) -> None:
    """Everything shown can be encoded strictly and comes back equal."""
    details = (await check.check()).details

    assert details == json.loads(json.dumps(details, allow_nan=False))


async def test_details_have_the_guides_fields(adapter: Adapter, check: HealthCheck) -> None:
    """Every field of the operations guide is there under its name, with its JSON type."""
    details = json.loads(json.dumps((await check.check()).details))

    assert misfits(adapter.shape, details) == []


async def test_last_check_is_the_clocks_time(
    adapter: Adapter, check: HealthCheck, clock: ManualClock
) -> None:
    """Where the guide shows the time of the last check, it moves with the clock."""
    await check.check()
    await clock.advance(90.0)
    details = (await check.check()).details

    if "lastHealthCheck" in str(adapter.shape):
        assert isinstance(details, dict)
        assert timestamp(clock.now()) == details["stats"]["lastHealthCheck"]


async def test_observation_does_not_change_afterwards(
    check: HealthCheck, clock: ManualClock
) -> None:
    """What was observed once is not touched by the next look."""
    first = await check.check()
    copy = deepcopy(first)
    await clock.advance(5.0)
    await check.check()

    assert copy == first


async def test_survives_cancellation(check: HealthCheck) -> None:
    """A check that is cut off at any of its first turns ends soon, and works the next time."""
    for turns in range(5):
        task = asyncio.create_task(check.check())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        async with asyncio.timeout(5.0):
            await asyncio.wait({task})

    assert (await check.check()).status is not Status.FAIL


async def test_leaves_no_task_behind(check: HealthCheck) -> None:
    """Looking a hundred times leaves nothing running."""
    await check.check()
    before = asyncio.all_tasks()
    for _ in range(100):
        await check.check()

    assert before == asyncio.all_tasks()


async def test_looking_twice_at_once_is_safe(check: HealthCheck) -> None:
    """A forced round beside somebody else's look harms neither."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(check.check()) for _ in range(10)]

    assert all(task.result().status is not Status.FAIL for task in tasks)
