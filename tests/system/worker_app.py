"""An application for ``viralfx worker --app``, whose steps are lines of the file STEPS."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from litestar import Litestar, get
from litestar.datastructures import State
from litestar.di import Provide

from viralfx import JobContext, OperationsConfig, OperationsPlugin, task


def note(step: str) -> None:
    """Append a step."""
    with Path(os.environ["STEPS"]).open("a") as steps:
        steps.write(f"{step}\n")


class Mailer:
    """A client that the lifespan opens."""

    def __init__(self) -> None:
        self.open = True


@task("app.order")
async def order(number: int, mailer: Mailer) -> int:
    """Use the clients of the plugin, and submit another job."""
    assert mailer.open
    one = await plugin.database.execute_with_retry(lambda c: c.fetchval("SELECT 1"))
    await plugin.cache.get_or_load("order", 60.0, lambda: asyncio.sleep(0, one))
    await plugin.jobs.submit("app.follow", number + one)
    return number


@task("app.follow")
def follow(number: int, mailer: Mailer) -> bool:
    """Run in a thread."""
    note(f"follow {number}")
    return mailer.open


@task("app.long")
async def long(seconds: float, mailer: Mailer) -> bool:
    """Take a time."""
    note("long begins")
    await asyncio.sleep(seconds)
    note(f"long ends, open: {mailer.open}")
    return mailer.open


async def middleware(
    call_next: Callable[[], Awaitable[Any]], context: JobContext, payload: Any
) -> Any:
    """Note each call."""
    note(f"call {payload} {context.attempt}")
    return await call_next()


@asynccontextmanager
async def lifespan(app: Litestar) -> AsyncIterator[None]:
    """Open the mailer."""
    mailer = app.state.mailer = Mailer()
    note("lifespan begins")
    yield
    mailer.open = False
    note("lifespan ends")


async def mailer(state: State) -> Mailer:
    """Provide the mailer."""
    found: Mailer = state.mailer
    return found


@get("/orders")
async def orders() -> str:
    """Answer under ``viralfx serve`` only."""
    return "orders"


plugin = OperationsPlugin(
    OperationsConfig(tasks=[order, follow, long], task_middleware=[middleware])
)
app = Litestar(
    [orders],
    plugins=[plugin],
    lifespan=[lifespan],
    on_startup=[lambda: note("started")],
    on_shutdown=[lambda: note("stopped")],
    dependencies={"mailer": Provide(mailer)},
    logging_config=None,
)


def twice() -> Litestar:
    """Declare a task again."""

    @task("app.follow")
    async def other(_: int) -> None: ...

    return Litestar(
        plugins=[OperationsPlugin(OperationsConfig(tasks=[follow, other]))], logging_config=None
    )


def without_mailer() -> Litestar:
    """Declare a task without its dependency."""
    return Litestar(
        plugins=[OperationsPlugin(OperationsConfig(tasks=[follow]))],
        dependencies={"mail": Provide(mailer)},
        logging_config=None,
    )


def raises() -> Litestar:
    """Fail."""
    raise RuntimeError("planted in a factory")
