"""How near a process is to the memory limit at which the kernel would kill it, with a child."""

import os
from pathlib import Path

from viralfx.settings.cgroups import memory_limits

_MOST = 0.95
"""The share of the limit that both may use together; what they do between two looks is the rest."""
_PRIVATE = ("Private_Clean:", "Private_Dirty:")


class Room:
    """The memory that this process and a forked child of it may use together."""

    def __init__(self, child: int) -> None:
        """``child`` is its process id."""
        self._limit = min(memory_limits(), default=None)
        self._child = child

    def is_short(self) -> bool:
        """Tell whether there is hardly any left. Without a limit there always is some."""
        if self._limit is None:
            return False
        # Of the child what it shares with nobody: new pages, and those that either wrote to.
        used = _bytes(os.getpid(), "Rss:") + _bytes(self._child, *_PRIVATE)
        return used > _MOST * self._limit


def _bytes(pid: int, *names: str) -> int:
    """Add up what the kernel says of a process's pages; nothing of one that has just ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return 0
    fields = [line.split() for line in text.splitlines()]
    return sum(1024 * int(field[1]) for field in fields if field[0] in names)
