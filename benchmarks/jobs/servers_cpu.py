"""The processor time of the servers. Standard library only: peers import it."""

import os
from contextlib import suppress
from pathlib import Path

SERVERS = "BENCH_SERVERS"
"""Environment variable: the ids of the servers' first processes."""

_TICK = os.sysconf("SC_CLK_TCK")


def servers_cpu_seconds() -> float:
    """Return what the servers have used, with the children that they have or had."""
    first = os.environ[SERVERS].split()
    family = [pid for parent in first for pid in (parent, *_children(parent))]
    return sum(map(_ticks, family)) / _TICK


def _children(pid: str) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()


def _ticks(pid: str) -> int:
    with suppress(FileNotFoundError, ProcessLookupError):  # it ended since
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        # After the name in parentheses, from field 3 on: own time in 14 and 15, that of children
        # who ended in 16 and 17.
        return sum(map(int, stat.rpartition(")")[2].split()[11:15]))
    return 0
