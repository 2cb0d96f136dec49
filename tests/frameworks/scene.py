"""Shared by the applications of all frameworks: a task, a stage, clients, a request that waits."""

import asyncio
import os
import tempfile
from pathlib import Path

from viralfx import OperationsConfig, task
from viralfx.web.layer import OperationsLayer

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


class Clients:
    """Clients that the start-up of an application opens while built-in checks run already."""

    def __init__(self) -> None:
        self._are_open = False

    async def open(self, layer: OperationsLayer) -> None:
        """Open them once the built-in checks have run."""
        async with asyncio.timeout(HOLD_SECONDS):
            while layer.operations.monitor.report().checks["memory"].checked_at is None:  # noqa: ASYNC110 - without an event
                await asyncio.sleep(0.01)
        self._are_open = True

    async def check(self) -> bool:
        """Write a file, so that the test sees whether an attempt was too early."""
        (FOLDER / ("checked" if self._are_open else "checked too early")).touch()
        return self._are_open


def config(clients: Clients | None = None) -> OperationsConfig:
    """Return the options of the layer; ``clients`` have a check."""
    checks = {} if clients is None else {"clients": clients.check}
    return OperationsConfig(tasks=[note], checks=checks, close_stages={"leave": leave})
