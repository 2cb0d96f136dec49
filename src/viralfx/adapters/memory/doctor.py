"""The part of `viralfx doctor` for the folder of STATE_DIR."""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from viralfx.domain.doctor import Area, Finding, failed, passed

_TRIAL_CONTENT = b"\0" * 65536
"""Larger than any saved state."""


class StateFolderDoctor:
    """Writes a file to the folder, as saving does, and removes it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def check(self) -> Sequence[Finding]:
        """Write in a thread: a network file system may be slow or hang."""
        return [await asyncio.to_thread(self._write)]

    def _write(self) -> Finding:
        area, folder = Area.STATE, self._folder
        if not folder.is_dir():
            return failed(area, f"STATE_DIR: {folder} is not a folder", "create it")
        trial = folder / f".doctor.{os.getpid()}"
        try:
            try:
                with trial.open("xb") as file:
                    file.write(_TRIAL_CONTENT)
                    file.flush()
                    os.fsync(file.fileno())
            finally:
                trial.unlink(missing_ok=True)
        except OSError as error:
            found = f"STATE_DIR: {folder} cannot be written to: {error.strerror}"
            return failed(area, found, "give this user write access, and check the free space")
        return passed(area, f"STATE_DIR: {folder} can be written to")
