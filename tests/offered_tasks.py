"""Tasks for clients of the jobs API, for TASK_MODULES: none harms the process."""

from typing import Annotated, Any, Literal

import msgspec

from viralfx import JobContext, task


class Order(msgspec.Struct, forbid_unknown_fields=True):
    """A payload with limits."""

    number: Annotated[str, msgspec.Meta(min_length=1, max_length=20)]
    size: Literal["small", "large"] | None = None
    tags: list[str] = []


@task("offered.order", queue="analytics")
async def order(payload: Order) -> str:
    """Return the number."""
    return payload.number


@task("offered.nothing")
async def nothing(_: None) -> None:
    """Do nothing."""


@task("offered.webhook", queue="notifications")
async def webhook(order: str, context: JobContext) -> str:
    """Submit the built-in task for a client."""
    url = "https://hooks.example/in"
    message: dict[str, Any] = {"url": url, "type": "order.shipped", "data": {"order": order}}
    accepted = await context.submit("notifications.webhook", message, key=context.id)
    return accepted.job.id


@task("withheld.note", queue="notifications", api=False)
async def note(text: str) -> str:
    """Return the text; clients may not submit it."""
    return text
