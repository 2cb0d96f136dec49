"""The type of a payload follows from the task's function; checked by mypy, never run."""

from collections.abc import Callable, Coroutine
from typing import Any, Literal, TypedDict, assert_type

from pydantic import BaseModel

from viralfx import JobContext, task
from viralfx.jobs.ledger import Accepted
from viralfx.jobs.service import JobService


class Guest(TypedDict):
    """A payload."""

    name: str
    age: int


class Order(BaseModel):
    """A payload of Pydantic."""

    number: int


class Rush(Order):
    """A payload of a kind of its own."""


class Mailer:
    """A dependency."""


@task("typed.greet")
async def greet(name: str) -> int:
    """Take a text."""
    return len(name)


@task("typed.blocking")
def blocking(name: str | None) -> int:
    """Run in a thread."""
    return len(name or "")


@task("typed.welcome")
async def welcome(guest: Guest, context: JobContext) -> None:
    """Take a context, and submit another job."""
    await context.submit(greet, guest["name"], key=context.id)
    await context.submit(greet, guest["age"])  # type: ignore[arg-type]
    await context.submit(greet, "Ada", connection=None)  # type: ignore[call-overload]


@task("typed.context_first")
async def context_first(context: JobContext, payload: str) -> None:
    """Take the context first."""


@task("typed.mail")
async def mail(orders: list[Order], mailer: Mailer, *, context: JobContext) -> None:
    """Take dependencies."""


@task("typed.tidy")
async def tidy(_: None) -> None:
    """Take no payload."""


@task("typed.any")
async def anything(payload: Any, context: JobContext) -> None:
    """Take any payload."""


@task("typed.level")
async def level(payload: Literal["low", "high"], mailer: Mailer) -> None:
    """Take one of two texts."""


async def check(jobs: JobService, named: str, unknown: Callable[..., Any]) -> None:
    """Assert the types."""
    await assert_type(greet("Ada"), Coroutine[Any, Any, int])
    assert_type(blocking("Ada"), int)
    assert_type(await jobs.submit(greet, "Ada", key="1", priority=3), Accepted)
    assert_type(await jobs.submit_many(greet, ["Ada"]), list[Accepted])

    await jobs.submit(task=blocking, payload=None)
    await jobs.submit(welcome, {"name": "Ada", "age": 36})
    await jobs.submit(context_first, "Ada")
    await jobs.submit(mail, [Order(number=1), Rush(number=2)])
    await jobs.submit(mail, [])
    await jobs.submit(tidy, None)
    await jobs.submit(anything, 3)
    await jobs.submit(level, "low")
    await jobs.submit(named, {"any": [1]})
    await jobs.submit(unknown, 3)
    await jobs.submit_many(welcome, [{"name": "Ada", "age": 36}])
    await jobs.submit_many(greet, (str(number) for number in range(3)))
    await jobs.submit_many(named, [1, "Ada"])


async def refuse(jobs: JobService) -> None:
    """Find each wrong payload."""
    await jobs.submit(greet, 3)  # type: ignore[arg-type]
    await jobs.submit(blocking, b"Ada")  # type: ignore[arg-type]
    await jobs.submit(welcome, {"name": "Ada"})  # type: ignore[arg-type]
    await jobs.submit(context_first, 3)  # type: ignore[arg-type]
    await jobs.submit(mail, Order(number=1))  # type: ignore[arg-type]
    await jobs.submit(tidy, "Ada")  # type: ignore[misc]  # it cannot infer the type
    await jobs.submit(level, "middle")  # type: ignore[arg-type]
    await jobs.submit_many(greet, [3])  # type: ignore[list-item]
    await jobs.submit_many(welcome, [{"name": "Ada"}])  # type: ignore[list-item]
    await jobs.submit(greet)  # type: ignore[call-overload]  # the payload is missing
    await jobs.submit(3, 3)  # type: ignore[call-overload]  # it is no task
    await jobs.submit(greet, "Ada", keys="1")  # type: ignore[call-overload]  # nor an option
    await jobs.submit_many(greet, ["Ada"], key="1")  # type: ignore[call-overload]
