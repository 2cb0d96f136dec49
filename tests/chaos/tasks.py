"""The tasks of the chaos run: each has an effect that can be counted afterwards."""

import asyncio
import os
from pathlib import Path
from typing import TypedDict

from viralfx import JobContext, task

EFFECTS_FILE = "CHAOS_EFFECTS_FILE"
"""Environment variable: the file that stands for the world outside the database."""


class Work(TypedDict):
    """The payload of each job of the run."""

    number: int
    pause: float
    """Seconds of work."""
    failures: int
    """How many attempts fail before one does not."""


@task("chaos.transactional", transactional=True)
async def transactional(payload: Work, context: JobContext) -> int:
    """Write a row in the transaction that completes the job."""
    await context.connection.execute(
        "INSERT INTO chaos_effects (job, number) VALUES ($1, $2)", context.id, payload["number"]
    )
    await _work(payload, context)
    return payload["number"]


@task("chaos.external", queue="notifications")
async def external(payload: Work, context: JobContext) -> int:
    """Append a line to a file, which no database can roll back."""
    await _work(payload, context)
    line = f"{context.id} {payload['number']}\n"
    _append(line)
    return payload["number"]


def _append(line: str) -> None:
    with Path(os.environ[EFFECTS_FILE]).open("a", encoding="ascii") as file:
        file.write(line)


async def _work(payload: Work, context: JobContext) -> None:
    await asyncio.sleep(payload["pause"])
    if context.attempt <= payload["failures"]:
        raise ValueError(f"attempt {context.attempt} fails, as its payload demands")
