"""The stores of the saved state: in memory, and in a file of STATE_DIR, which `doctor` tries."""

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from viralfx.domain.doctor import Area, Finding, failed, passed
from viralfx.domain.operations import SavedState

_logger = logging.getLogger("viralfx.state")


class MemoryStateStore:
    """Keeps the state until the process ends."""

    def __init__(self) -> None:
        self._state: SavedState | None = None

    async def load(self) -> SavedState | None:
        """Return the state that this process saved."""
        return self._state

    async def save(self, state: SavedState) -> None:
        """Replace the saved state."""
        self._state = state


class FileStateStore:
    """Keeps the state in ``<folder>/state.json``; each save is atomic and flushed to disk.

    Only the user of the process can read the file. A link that another user of the folder has made
    in its place is replaced, and never written through.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "state.json"
        self._lock = threading.Lock()

    async def load(self) -> SavedState | None:
        """Read the file; a malformed file is renamed, so that the next save does not destroy it."""
        return await asyncio.to_thread(self._load)

    async def save(self, state: SavedState) -> None:
        """Write a new file and rename it, so that a crash leaves the old or the new state.

        Raises ``OSError`` if writing fails; the old file is then unchanged.
        """
        await asyncio.to_thread(self._save_locked, state)

    def _load(self) -> SavedState | None:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            # Starting without the saved state is better than not starting.
            _logger.warning("Saved state cannot be read", exc_info=error)
            return None
        try:
            return msgspec.json.decode(content, type=SavedState)
        except (msgspec.DecodeError, UnicodeDecodeError):
            aside = self._path.with_suffix(".json.unreadable")
            with contextlib.suppress(OSError):
                self._path.replace(aside)
            _logger.warning(
                "Saved state is unreadable and was set aside", extra={"file": str(aside)}
            )
            return None

    def _save_locked(self, state: SavedState) -> None:
        # A cancelled save continues in its thread; the next save waits for it.
        with self._lock:
            self._save(state)

    def _save(self, state: SavedState) -> None:
        content = msgspec.json.format(msgspec.json.encode(state), indent=2) + b"\n"
        # The process id separates the files of two processes that share the folder by mistake.
        new = self._path.with_name(f".state.{os.getpid()}.json")
        new.unlink(missing_ok=True)  # of a killed process
        try:
            with _create(new) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._path)
        finally:
            new.unlink(missing_ok=True)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself must survive a power failure
        finally:
            os.close(folder)


def _create(path: Path) -> BinaryIO:
    """Create a file that only this user can read; raises ``OSError`` if there is one, or a link."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


_TRIAL_CONTENT = b"\0" * 65536
"""Larger than any saved state."""


class StateFolderDoctor:
    """The part of `viralfx doctor` for STATE_DIR.

    Writes a file to the folder, as saving does, and removes it.
    """

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
                with _create(trial) as file:
                    file.write(_TRIAL_CONTENT)
                    file.flush()
                    os.fsync(file.fileno())
            finally:
                trial.unlink(missing_ok=True)
        except OSError as error:
            found = f"STATE_DIR: {folder} cannot be written to: {error.strerror}"
            return failed(area, found, "give this user write access, and check the free space")
        return passed(area, f"STATE_DIR: {folder} can be written to")
