"""An application whose jobs use a client that its lifespan opens.

viralfx serve --app docs.examples.signup:app
viralfx worker --app docs.examples.signup:app
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

from litestar import Litestar, post
from litestar.datastructures import State
from litestar.di import Provide
from litestar.params import JSONBody

from viralfx import JobContext, OperationsConfig, OperationsPlugin, task

logger = logging.getLogger(__name__)
recipient: ContextVar[str] = ContextVar("recipient")


class Mailer:
    def __init__(self) -> None:
        self.sent: list[str] = []

    async def send(self, to: str, text: str) -> None:
        self.sent.append(f"{to}: {text}")


@asynccontextmanager
async def mailer_of_the_application(app: Litestar) -> AsyncIterator[None]:
    app.state.mailer = Mailer()
    yield


async def provide_mailer(state: State) -> Mailer:
    mailer: Mailer = state.mailer
    return mailer


@task("signup.welcome")
async def welcome(to: str, mailer: Mailer) -> str:
    await mailer.send(to, f"welcome, {recipient.get()}")
    return to


async def name_the_recipient(
    call_next: Callable[[], Awaitable[Any]], context: JobContext, payload: Any
) -> Any:
    recipient.set(payload.partition("@")[0])
    try:
        return await call_next()
    except ConnectionError:
        logger.warning("Mail server is unreachable", extra={"attempt": context.attempt})
        raise


@post("/signup", status_code=202)
async def signup(data: JSONBody[dict[str, str]]) -> dict[str, str]:
    accepted = await plugin.jobs.submit("signup.welcome", data["email"])
    return {"job": accepted.job.id}


plugin = OperationsPlugin(OperationsConfig(task_middleware=[name_the_recipient]))
app = Litestar(
    [signup],
    lifespan=[mailer_of_the_application],
    dependencies={"mailer": Provide(provide_mailer)},
    plugins=[plugin],
)
