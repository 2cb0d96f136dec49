"""A Litestar application with a health handler of the usual kind, and nothing around it."""

import time
from datetime import UTC, datetime

import msgspec
from benchmarks.peers.handlers import slow, work
from litestar import Litestar, get

_BEGAN = time.monotonic()


class Liveness(msgspec.Struct, frozen=True):
    """The fields of our own liveness answer."""

    alive: bool
    uptime: float
    timestamp: datetime


@get("/health/live")
async def live() -> Liveness:
    """Answer like a probe endpoint."""
    return Liveness(alive=True, uptime=time.monotonic() - _BEGAN, timestamp=datetime.now(UTC))


app = Litestar([live, slow, work], logging_config=None)
