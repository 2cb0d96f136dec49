"""Examines the folder of saved state before a deployment."""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from viralfx.domain.diagnosis import Area, Finding, failed, passed

_ENOUGH = b"\0" * 65536
"""Bytes that a saved state does not exceed by far."""


class StateFolderExamination:
    """Writes a file to the folder as saving would, and removes it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def examine(self) -> Sequence[Finding]:
        """Look once. In a thread: a network's file system may take its time, or all of it."""
        return [await asyncio.to_thread(self._write)]

    def _write(self) -> Finding:
        area, folder = Area.STATE, self._folder
        if not folder.is_dir():
            return failed(area, f"STATE_DIR: {folder} is not a folder", "create it")
        trial = folder / f".doctor.{os.getpid()}"
        try:
            try:
                with trial.open("xb") as file:
                    file.write(_ENOUGH)
                    file.flush()
                    os.fsync(file.fileno())
            finally:
                trial.unlink(missing_ok=True)
        except OSError as error:
            found = f"STATE_DIR: {folder} cannot be written to: {error.strerror}"
            return failed(area, found, "let this user write there, and look at the space left")
        return passed(area, f"STATE_DIR: {folder} can be written to")
