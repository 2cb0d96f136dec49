"""An application beside which the event loop does not close, as uvloop's beside a lookup."""

import asyncio
import time
from typing import Any

from litestar import Litestar

HELD = 60.0
"""Seconds."""


async def hold() -> None:
    """Let the loop take long to close."""
    loop: Any = asyncio.get_running_loop()
    loop.close = lambda: time.sleep(HELD)


app = Litestar(on_startup=[hold])
