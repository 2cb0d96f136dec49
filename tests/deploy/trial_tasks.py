"""A task for the containers of the trial, where this file is put."""

import asyncio
import socket
from typing import TypedDict

from viralfx import task


class Piece(TypedDict):
    """A piece of work."""

    seconds: float


@task("trial.work")
async def work(payload: Piece) -> str:
    """Take some time; return which container did it."""
    await asyncio.sleep(payload["seconds"])
    return socket.gethostname()
