"""Tasks that give the process they run in trouble, and no other one."""

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
        """Whether it is this one."""
        return self.pid == os.getpid()


@task("faults.work")
async def work(seconds: float) -> int:
    """Take so long, and tell where."""
    await asyncio.sleep(seconds)
    return os.getpid()


@task("faults.until")
async def until(path: str) -> int:
    """Take until there is a file, and tell where."""
    while not Path(path).exists():  # noqa: ASYNC110, ASYNC240 - others make it
        await asyncio.sleep(1 / 50)
    return os.getpid()


@task("faults.stay")
async def stay(place: In) -> int:
    """Take for ever in one process, and no time in any other."""
    if place.here:
        await asyncio.Event().wait()
    return os.getpid()


@task("faults.insist", queue="notifications")
async def insist(place: In) -> int:
    """Take for ever in one process, whatever is done to it there."""
    while place.here:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            continue
    return os.getpid()


@task("faults.block", queue="analytics")
async def block(place: In) -> int:
    """Take one process's event loop away."""
    if place.here:
        time.sleep(600)  # noqa: ASYNC251 - that is what it is for
    return os.getpid()


@task("faults.kill")
async def kill(_: None) -> None:
    """End the process as the kernel does when there is no memory left."""
    os.kill(os.getpid(), signal.SIGKILL)
    await asyncio.Event().wait()


@task("faults.fail")
async def fail(_: None) -> None:
    """Fail each time."""
    raise RuntimeError("planted: it is no use")
