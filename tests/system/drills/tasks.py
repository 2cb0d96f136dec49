"""The job of the drills, which takes until somebody says so."""

import asyncio
from pathlib import Path

from viralfx import task


@task("orders.ship")
async def ship(until: str) -> None:
    """Wait for a file, where there is to be one."""
    while until and not Path(until).exists():  # noqa: ASYNC110, ASYNC240 - the test makes it
        await asyncio.sleep(1 / 50)
