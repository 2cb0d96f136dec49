"""The endpoints that show the inside of the process, through the gate and the documented routes."""

import asyncio
import os
import platform
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from datetime import datetime
from importlib.metadata import version
from typing import Any, cast

import pytest
from httpx import ASGITransport, AsyncClient
from litestar import Litestar
from litestar.testing import AsyncTestClient
from tests.servers.waiting import until, wait_until

from viralfx import OperationsConfig, OperationsPlugin
from viralfx.bootstrap import assemble
from viralfx.core.errors import ConfigurationError
from viralfx.settings import Secret, Settings, read_settings
from viralfx.telemetry import stacks_of_tasks, stacks_of_threads

SETTINGS = Settings(management_token=Secret("planted"), revision="9f2c1aa")
BEARER = {"Authorization": "Bearer planted"}


@asynccontextmanager
async def client_of(kind: str) -> AsyncIterator[AsyncClient]:
    """Yield a client of an application behind a gate, or of the routes alone."""
    plugin = OperationsPlugin(OperationsConfig(settings=SETTINGS))
    app = Litestar(plugins=[plugin], logging_config=None)
    transport = ASGITransport(app=cast("Any", app))
    # Not a test client of Litestar, whose application has an event loop of its own.
    async with (
        app.lifespan() if kind == "gate" else nullcontext(),
        AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        yield client


KINDS = pytest.mark.parametrize("kind", ["gate", "routes"])


@pytest.mark.each_python
@KINDS
async def test_info_has_build_and_adapters(kind: str) -> None:
    """Version, commit, start, Python, and the technology behind each port."""
    async with client_of(kind) as client:
        before = (await client.get("/health/live")).json()
        response = await client.get("/health/info")
    info = response.json()

    assert (response.status_code, response.headers["cache-control"]) == (200, "no-store")
    began = datetime.fromisoformat(info.pop("startedAt"))
    assert began <= datetime.fromisoformat(before["timestamp"])
    assert str(os.getpid()) in info.pop("instance")
    assert info == {
        "version": version("viralfx"),
        "commit": "9f2c1aa",
        "python": platform.python_version(),
        "environment": "development",
        "role": "api",
        "adapters": dict.fromkeys(
            ("database", "cache", "jobs", "notifications", "state", "fleet", "audit"), "memory"
        ),
    }


@pytest.mark.parametrize(
    ("environ", "others"),
    [
        ({"DATABASE_URL": "postgresql://db/shop"}, {"cache": "memory"}),
        ({"REDIS_HOST": "cache"}, {"cache": "redis"}),
        (
            {"DATABASE_URL": "postgresql://db/shop", "REDIS_HOST": "cache", "STATE_DIR": "."},
            {"cache": "redis", "notifications": "taskiq", "state": "file"},
        ),
    ],
    ids=["Postgres", "Redis", "both"],
)
async def test_adapters_are_those_of_the_settings(
    environ: dict[str, str], others: dict[str, str]
) -> None:
    """Each port by its name."""
    operations = assemble(read_settings(environ)).operations

    most = "postgres" if "DATABASE_URL" in environ else "memory"
    ports = dict.fromkeys(
        ("database", "cache", "jobs", "notifications", "state", "fleet", "audit"), most
    )
    assert operations.adapters == {**ports, **others}
    assert operations.revision is None


async def test_info_may_need_the_token() -> None:
    """As the details of checks."""
    settings = Settings(management_token=Secret("planted"), health_details="authorized")
    plugin = OperationsPlugin(OperationsConfig(settings=settings))
    async with AsyncTestClient(Litestar(plugins=[plugin], logging_config=None)) as client:
        answers = [await client.get("/health/info", headers=each) for each in ({}, BEARER)]

    assert [each.status_code for each in answers] == [401, 200]


class Shop:
    """A task that waits, with a value that no stack may show."""

    def __init__(self) -> None:
        self.began = False
        self.leave = asyncio.Event()

    async def outer(self, password: str) -> None:
        """Wait for another coroutine."""
        await self.inner(password)

    async def inner(self, password: str) -> None:
        """Wait."""
        self.began = bool(password)
        await self.leave.wait()


@pytest.mark.each_python
@KINDS
async def test_tasks_have_their_stacks(kind: str) -> None:
    """Of each task all coroutines, of each thread all functions, and no value."""
    shop, left, began = Shop(), threading.Event(), threading.Event()

    def wait_in_thread(password: str) -> None:
        assert password
        began.set()
        left.wait()

    thread = threading.Thread(target=wait_in_thread, args=("hunter2",), name="shop-thread")
    task = asyncio.create_task(shop.outer("hunter2"), name="shop-task")
    thread.start()
    wait_until(began.is_set, what="the thread waits")
    await until(lambda: shop.began)
    try:
        async with client_of(kind) as client:
            response = await client.get("/health/tasks", headers=BEARER)
    finally:
        shop.leave.set()
        left.set()
        thread.join()
        await task

    assert (response.status_code, response.headers["cache-control"]) == (200, "no-store")
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    stacks = response.text.split("\n\n")
    (shown,) = [each for each in stacks if each.startswith("Task 'shop-task' (most recent call")]
    assert [line.rpartition(" in ")[2] for line in shown.splitlines()[1:]] == [
        "Event.wait",
        "Shop.inner",
        "Shop.outer",
    ]
    assert f'  File "{__file__}", line ' in shown
    (shown,) = [each for each in stacks if " [shop-thread] (most recent call first):" in each]
    assert "test_tasks_have_their_stacks.<locals>.wait_in_thread" in shown
    assert [each for each in stacks if " [MainThread] " in each]
    assert "hunter2" not in response.text


async def test_the_number_of_stacks_has_a_limit() -> None:
    """The text takes time of the event loop; the number of all tasks is shown."""
    leave = asyncio.Event()
    tasks = [asyncio.create_task(leave.wait(), name=f"waiting-{n}") for n in range(1100)]
    text = stacks_of_tasks(asyncio.get_running_loop())
    leave.set()
    await asyncio.gather(*tasks)

    assert text.startswith("Tasks: 1101\n")
    assert text.count(" (most recent call first):\n") == 1000
    assert text.endswith("\n\n... and 101 more\n")


def test_the_innermost_frames_are_shown() -> None:
    """Thirty of each stack."""

    def deeper(left: int) -> str:
        return deeper(left - 1) if left else stacks_of_threads()

    (own,) = [each for each in deeper(40).split("\n\n") if " [MainThread] " in each]
    lines = [line.rpartition(".")[2] for line in own.splitlines()[1:]]

    assert len(lines) == 30
    assert lines[1:] == ["deeper"] * 29


@pytest.mark.parametrize(
    ("token", "headers", "status"),
    [(None, BEARER, 403), ("planted", {}, 401), ("planted", {"Authorization": "Bearer x"}, 401)],
)
async def test_stacks_need_the_token(
    token: str | None, headers: dict[str, str], status: int
) -> None:
    """Also while HEALTH_DETAILS is ``always``."""
    settings = Settings(management_token=None if token is None else Secret(token))
    plugin = OperationsPlugin(OperationsConfig(settings=settings))
    async with AsyncTestClient(Litestar(plugins=[plugin], logging_config=None)) as client:
        refused = await client.get("/health/tasks", headers=headers)
        method = await client.post("/health/tasks", headers=headers)

    assert (refused.status_code, method.status_code) == (status, 405)
    assert method.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("name", ["info", "tasks"])
def test_a_check_cannot_have_their_names(name: str) -> None:
    """Its own endpoint would be hidden."""

    def check() -> bool:
        return True

    with pytest.raises(ConfigurationError, match=f"'{name}' cannot be a check's name"):
        OperationsPlugin(OperationsConfig(settings=SETTINGS, checks={name: check}))
