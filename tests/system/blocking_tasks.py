"""Tasks that block their process in different ways, and write down each execution."""

import asyncio
import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from viralfx import JobContext, task


class Block(msgspec.Struct):
    """For how long to block, and the file that gets a line for each execution."""

    seconds: float
    path: str

    def note(self, context: JobContext) -> None:
        """Write down that an execution begins."""
        with Path(self.path).open("a") as file:
            file.write(f"{context.id}\n")

    def steps(self) -> Iterator[None]:
        """Yield until the time is over."""
        until = time.monotonic() + self.seconds
        while time.monotonic() < until:
            yield


@task("blocking.sleep")
async def sleep(block: Block, context: JobContext) -> None:
    """Sleep on the event loop."""
    block.note(context)
    time.sleep(block.seconds)  # noqa: ASYNC251 - the fault itself


@task("blocking.compute")
async def compute(block: Block, context: JobContext) -> None:
    """Compute in Python, on the event loop."""
    block.note(context)
    for _ in block.steps():
        sum(range(100))


@task("blocking.run")
async def run(block: Block, context: JobContext) -> None:
    """Wait for a child, on the event loop."""
    block.note(context)
    sleeping = f"import time; time.sleep({block.seconds})"
    subprocess.run([sys.executable, "-c", sleeping], check=True)  # noqa: ASYNC221 - the fault itself


@task("blocking.digest")
async def digest(block: Block, context: JobContext) -> None:
    """Compute in C code that gives other threads time, on the event loop."""
    block.note(context)
    data = bytes(10_000_000)
    for _ in block.steps():
        hashlib.sha256(data)


@task("blocking.hold")
async def hold(block: Block, context: JobContext) -> None:
    """Compute in one call of C code that gives no other thread time, on the event loop."""
    block.note(context)
    few = 1_000_000
    began = time.monotonic()
    sum(range(few))
    took = time.monotonic() - began
    sum(range(int(few * block.seconds / took)))


@task("blocking.thread")
def thread(block: Block, context: JobContext) -> None:
    """Sleep in a thread."""
    block.note(context)
    time.sleep(block.seconds)


@task("blocking.bystander", queue="notifications")
async def bystander(block: Block, context: JobContext) -> None:
    """Wait as a coroutine should."""
    block.note(context)
    await asyncio.sleep(block.seconds)
