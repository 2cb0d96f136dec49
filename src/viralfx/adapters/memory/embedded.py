"""The parts of the embedded default: its cache, checks, notifier and stores of the saved state."""

import asyncio
import contextlib
import logging
import os
import threading
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec

from viralfx.domain.clock import Clock, timestamp
from viralfx.domain.doctor import Area, Finding, failed, passed
from viralfx.domain.errors import require_count, require_positive
from viralfx.domain.health.model import Observation, Status
from viralfx.domain.jobs.notifier import JobNotification, deliver_notifications
from viralfx.domain.operations import SavedState


class MemoryCacheStore:
    """Keeps at most ``capacity`` values; evicts the least recently used value first."""

    def __init__(self, clock: Clock, *, capacity: int = 1024) -> None:
        require_count("capacity", capacity)
        self._clock = clock
        self._capacity = capacity
        self._kept: OrderedDict[str, tuple[float, bytes]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    async def get(self, key: str) -> bytes | None:
        """Return the value, or None if it is unknown or has expired."""
        if (kept := self._kept.get(key)) is None:
            return None
        expires_at, value = kept
        if self._clock.monotonic() >= expires_at:
            del self._kept[key]
            return None
        self._kept.move_to_end(key)
        return value

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        """Store a value for ``ttl`` seconds."""
        require_positive("ttl", ttl)
        self._kept[key] = (self._clock.monotonic() + ttl, value)
        self._kept.move_to_end(key)
        if len(self._kept) > self._capacity:
            self._kept.popitem(last=False)

    async def delete(self, key: str) -> None:
        """Delete a value; does nothing if there is none."""
        self._kept.pop(key, None)


class MemoryDatabase:
    """Health check that stands for the database check; it always passes.

    Every count is zero, since there is neither a connection nor a pool.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def check(self) -> Observation:
        """Pass, with the same fields as the Postgres check."""
        return Observation(
            status=Status.PASS,
            message="Database is in memory: its data ends with this process",
            details={
                "adapter": "memory",
                "isConnected": True,
                "stats": {
                    "totalConnections": 0,
                    "activeConnections": 0,
                    "idleConnections": 0,
                    "waitingRequests": 0,
                    "slowQueries": 0,
                    "failedConnections": 0,
                    "lastHealthCheck": timestamp(self._clock.now()),
                },
                "poolConfig": {"min": 0, "max": 0, "timeout": 0},
            },
        )


class MemoryRedis:
    """Health check that stands for the Redis check; it always passes and counts its own calls."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._requests = 0

    async def check(self) -> Observation:
        """Pass, with the same fields as the Redis check."""
        self._requests += 1
        return Observation(
            status=Status.PASS,
            message="Redis is in memory: its data ends with this process",
            details={
                "adapter": "memory",
                "isConnected": True,
                "stats": {
                    "isConnected": True,
                    "lastHealthCheck": timestamp(self._clock.now()),
                    "failedAttempts": 0,
                    "totalRequests": self._requests,
                    "successfulRequests": self._requests,
                    "failedRequests": 0,
                },
                "config": {"host": "memory", "port": 0, "db": 0},
            },
        )


_MAX_NOTIFICATIONS = 10_000
"""For each queue; workers find the jobs of dropped notifications by polling."""


class MemoryNotifier:
    """Implements ``JobNotifier`` in process. The listeners of a queue share its notifications."""

    broadcasts = False

    def __init__(self) -> None:
        self._queues: defaultdict[str, asyncio.Queue[JobNotification]] = defaultdict(
            lambda: asyncio.Queue(_MAX_NOTIFICATIONS)
        )
        self._listeners: Counter[str] = Counter()
        self._closed = False

    async def notify(self, notification: JobNotification) -> None:
        """Queue a notification for the next free listener; drop it if the queue is full."""
        if self._closed:
            raise ConnectionError("the notifier is closed")
        waiting = self._queues[notification.queue]
        if not waiting.full():
            waiting.put_nowait(notification)

    async def listen(
        self,
        queue: str,
        on_notification: Callable[[JobNotification], Awaitable[None]],
        slots: int,
    ) -> None:
        """Receive notifications until cancelled."""
        self._listeners[queue] += 1
        try:
            await deliver_notifications(self._queues[queue], on_notification, slots)
        finally:
            self._listeners[queue] -= 1

    def is_connected(self, queue: str) -> bool:
        """Return True if a queue has a listener."""
        return not self._closed and self._listeners[queue] > 0

    async def close(self) -> None:
        """Accept no more notifications, and drop those that wait."""
        self._closed = True
        for waiting in self._queues.values():
            while not waiting.empty():
                waiting.get_nowait()


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
    """Keeps the state in ``<folder>/state.json``; each save is atomic and flushed to disk."""

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
            os.fsync(folder)  # the rename itself must survive a power failure
        finally:
            os.close(folder)


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
