"""The handlers that the bare and the mounted Litestar application share."""

import asyncio
from datetime import UTC, datetime

import msgspec
from litestar import get

HANDLER_SECONDS = 0.02


class Work(msgspec.Struct, frozen=True, rename="camel"):
    """The response of an ordinary handler."""

    work_id: int
    state: str
    owner: str
    finished_at: datetime


@get("/work")
async def work() -> Work:
    """Answer at once."""
    return Work(work_id=42, state="finished", owner="operator", finished_at=datetime.now(UTC))


@get("/slow")
async def slow() -> Work:
    """Answer after 20 ms."""
    await asyncio.sleep(HANDLER_SECONDS)
    return Work(work_id=43, state="finished", owner="operator", finished_at=datetime.now(UTC))
