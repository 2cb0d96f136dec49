"""The jobs of the drills, which take or fail until somebody says otherwise."""

import asyncio
from pathlib import Path

from viralfx import task


@task("orders.bill")
async def bill(paper: str) -> None:
    """Fail until there is a file."""
    if not Path(paper).exists():  # noqa: ASYNC240 - likewise
        raise RuntimeError("the printer is out of paper")


@task("orders.ship")
async def ship(until: str) -> None:
    """Wait for a file, where there is to be one."""
    while until and not Path(until).exists():  # noqa: ASYNC110, ASYNC240 - the test makes it
        await asyncio.sleep(1 / 50)
