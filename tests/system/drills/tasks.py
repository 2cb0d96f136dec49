"""The tasks of the drills, which wait or fail until a file exists."""

import asyncio
from pathlib import Path

from viralfx import task


@task("orders.bill")
async def bill(paper: str) -> None:
    """Fail until there is a file."""
    if not Path(paper).exists():  # noqa: ASYNC240 - the test makes it
        raise RuntimeError("the printer is out of paper")


@task("orders.ship")
async def ship(until: str) -> None:
    """Wait for a file, if its name is given."""
    while until and not Path(until).exists():  # noqa: ASYNC110, ASYNC240 - the test makes it
        await asyncio.sleep(1 / 50)
