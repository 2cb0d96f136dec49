"""Where state is kept without a database: in this process, or in one JSON file."""

import asyncio
import contextlib
import logging
import os
import threading
from pathlib import Path

import msgspec

from viralfx.domain.state import SavedState

_logger = logging.getLogger("viralfx.state")


class MemoryStateStore:
    """Keeps the state as long as the process lives."""

    def __init__(self) -> None:
        self._state: SavedState | None = None

    async def load(self) -> SavedState | None:
        """Return what this process saved."""
        return self._state

    async def save(self, state: SavedState) -> None:
        """Keep it."""
        self._state = state


class FileStateStore:
    """Keeps the state in ``<folder>/state.json``, replaced atomically and flushed to disk."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "state.json"
        self._lock = threading.Lock()

    async def load(self) -> SavedState | None:
        """Read the file. One that cannot be understood is set aside, never overwritten unseen."""
        return await asyncio.to_thread(self._load)

    async def save(self, state: SavedState) -> None:
        """Write a new file beside the old one, then rename: a crash leaves one or the other.

        Raises ``OSError`` when the disk refuses; the old file is then untouched.
        """
        await asyncio.to_thread(self._save_alone, state)

    def _load(self) -> SavedState | None:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            # What was saved is worth less than a service that starts.
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

    def _save_alone(self, state: SavedState) -> None:
        # A save that was cancelled writes on in its thread; the next one waits for it.
        with self._lock:
            self._save(state)

    def _save(self, state: SavedState) -> None:
        content = msgspec.json.format(msgspec.json.encode(state), indent=2) + b"\n"
        # The process id keeps two processes that share the folder by mistake from mixing files.
        new = self._path.with_name(f".state.{os.getpid()}.json")
        try:
            with new.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._path)
        finally:
            new.unlink(missing_ok=True)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself must survive a power cut
        finally:
            os.close(folder)
