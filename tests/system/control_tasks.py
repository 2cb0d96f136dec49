"""Tasks that are cancelled while they run, and write down what they see."""

import asyncio
import time
from pathlib import Path

from viralfx import JobContext, task


def note(path: str, line: str) -> None:
    """Add a line to a file."""
    with Path(path).open("a") as file:
        file.write(f"{line}\n")


@task("control.count", timeout=600.0)
async def count(path: str, context: JobContext) -> None:
    """Report a thousand times a second; note each beginning, and the time of a cancellation."""
    note(path, "began")
    number = 0
    try:
        while True:
            number += 1
            await context.report(number, 10**6, "counting")
            await asyncio.sleep(0.001)
    except asyncio.CancelledError:
        note(f"{path}.cancelled", str(time.time()))
        raise


@task("control.write", timeout=600.0, transactional=True)
async def write(text: str, context: JobContext) -> None:
    """Write to the table ``effects``, and wait."""
    await context.connection.execute("insert into effects values ($1)", text)
    await context.report(message="written")
    await asyncio.sleep(600.0)
