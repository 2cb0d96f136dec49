"""Tasks that cause a fault in one process, and only there."""

import asyncio
import os
import signal
import time
from pathlib import Path

import msgspec

from viralfx import task


class In(msgspec.Struct, forbid_unknown_fields=True):
    """Names a process."""

    pid: int

    @property
    def here(self) -> bool:
        """Return whether this is the named process."""
        return self.pid == os.getpid()


@task("faults.work")
async def work(seconds: float) -> int:
    """Sleep, and return the id of the process."""
    await asyncio.sleep(seconds)
    return os.getpid()


@task("faults.until")
async def until(path: str) -> int:
    """Wait for a file, and return the id of the process."""
    while not Path(path).exists():  # noqa: ASYNC110, ASYNC240 - the test makes it
        await asyncio.sleep(1 / 50)
    return os.getpid()


@task("faults.stay")
async def stay(place: In) -> int:
    """Never end in one process; end at once in all others."""
    if place.here:
        await asyncio.Event().wait()
    return os.getpid()


@task("faults.insist", queue="notifications")
async def insist(place: In) -> int:
    """Never end in one process, and ignore cancellation there."""
    while place.here:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            continue
    return os.getpid()


@task("faults.block", queue="analytics")
async def block(place: In) -> int:
    """Block the event loop of one process."""
    if place.here:
        time.sleep(600)  # noqa: ASYNC251 - the fault itself
    return os.getpid()


@task("faults.kill")
async def kill(_: None) -> None:
    """Kill the process, as the kernel does without free memory."""
    os.kill(os.getpid(), signal.SIGKILL)
    await asyncio.Event().wait()


@task("faults.fail")
async def fail(_: None) -> None:
    """Fail each time."""
    raise RuntimeError("planted: it is no use")
