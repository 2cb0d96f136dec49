"""An application whose credentials come from callables, and change."""

import asyncio
import os
from contextlib import suppress
from pathlib import Path

from litestar import Litestar, get, post

from viralfx import OperationsConfig, OperationsPlugin
from viralfx.jobs.model import JobState


async def token() -> tuple[str, str]:
    """Return the user and the token of this moment."""
    path = Path(os.environ["TOKEN_PATH"])
    return os.environ.get("TOKEN_USER", "alice"), await asyncio.to_thread(path.read_text)


async def database_token() -> str:
    """Return the password of Postgres of this moment."""
    return await asyncio.to_thread(Path(os.environ["DB_TOKEN_PATH"]).read_text)


plugin = OperationsPlugin(
    OperationsConfig(
        redis_credentials=token if "TOKEN_PATH" in os.environ else None,
        database_password=database_token if "DB_TOKEN_PATH" in os.environ else None,
    )
)


@get("/cached")
async def cached() -> dict[str, str]:
    """Read through the cache."""

    async def load() -> bytes:
        return b"loaded"

    return {"value": (await plugin.cache.get_or_load("planted", 60.0, load)).decode()}


@post("/run", status_code=200)
async def run() -> dict[str, str]:
    """Run a job, and return its state after at most ten seconds."""
    job_id = (await plugin.jobs.submit("faults.work", 0)).job.id
    with suppress(TimeoutError):
        async with asyncio.timeout(10.0):
            while (await plugin.jobs.get(job_id)).state is not JobState.COMPLETED:  # noqa: ASYNC110 - a poll
                await asyncio.sleep(0.05)
    return {"state": str((await plugin.jobs.get(job_id)).state)}


app = Litestar([cached, run], plugins=[plugin])
