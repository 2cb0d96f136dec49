"""A bare Litestar application with a typical health handler."""

import time
from datetime import UTC, datetime

import msgspec
from benchmarks.peers.handlers import slow, work
from litestar import Litestar, get

_BEGAN = time.monotonic()


class Liveness(msgspec.Struct, frozen=True):
    """The fields of the liveness response."""

    alive: bool
    uptime: float
    timestamp: datetime


@get("/health/live")
async def live() -> Liveness:
    """Answer like a probe endpoint."""
    return Liveness(alive=True, uptime=time.monotonic() - _BEGAN, timestamp=datetime.now(UTC))


app = Litestar([live, slow, work], logging_config=None)
