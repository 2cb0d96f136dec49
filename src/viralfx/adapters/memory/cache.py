"""The values of a cache in the memory of this process."""

from collections import OrderedDict
from contextlib import suppress

from viralfx.core.clock import Clock
from viralfx.core.errors import require_count, require_positive


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
            self._kept.pop(key, None)
            return None
        with suppress(KeyError):  # another thread has just deleted it
            self._kept.move_to_end(key)
        return value

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        """Store a value for ``ttl`` seconds."""
        require_positive("ttl", ttl)
        self._kept[key] = (self._clock.monotonic() + ttl, value)
        with suppress(KeyError):  # as above
            self._kept.move_to_end(key)
        if len(self._kept) > self._capacity:
            self._kept.popitem(last=False)

    async def delete(self, key: str) -> None:
        """Delete a value; does nothing if there is none."""
        self._kept.pop(key, None)
