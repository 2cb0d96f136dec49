"""Shared by the applications of all frameworks: a task, a stage, and a request that waits."""

import asyncio
import os
import tempfile
from pathlib import Path

from viralfx import OperationsConfig, task

FOLDER = Path(os.environ.get("SCENE_FOLDER") or tempfile.gettempdir())
"""The folder of the files by which a test and its application talk."""
HOLD_SECONDS = 20.0


@task("scene.note")
async def note(text: str) -> None:
    """Write a file, so that the test sees the job run."""
    (FOLDER / "job").write_text(text)


async def leave(_budget: float) -> None:
    """Write a file, so that the test sees the last stage run."""
    (FOLDER / "left").touch()


async def hold() -> str:
    """Wait until the test releases the request."""
    (FOLDER / "held").touch()
    async with asyncio.timeout(HOLD_SECONDS):
        while not (FOLDER / "release").exists():  # noqa: ASYNC110 - another process sets it
            await asyncio.sleep(0.01)
    return "done"


def config() -> OperationsConfig:
    """Return the options of the layer."""
    return OperationsConfig(tasks=[note], close_stages={"leave": leave})
