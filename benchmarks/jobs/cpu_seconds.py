"""The processor time of processes. Standard library only: peers import it."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

SERVERS = "BENCH_SERVERS"
"""Environment variable: the ids of the servers' first processes."""

_TICK = os.sysconf("SC_CLK_TCK")


def servers_cpu_seconds() -> float:
    """Return the processor time of the servers, with present and former children."""
    first = os.environ[SERVERS].split()
    return cpu_seconds(pid for parent in first for pid in (parent, *_children(parent)))


def cpu_seconds(pids: Iterable[str]) -> float:
    """Return the processor time of these processes and their former children."""
    return sum(map(_ticks, pids)) / _TICK


def _children(pid: str) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()


def _ticks(pid: str) -> int:
    with suppress(FileNotFoundError, ProcessLookupError):  # it ended since
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        # After the name in parentheses, from field 3 on: own time in 14 and 15, that of ended
        # children in 16 and 17.
        return sum(map(int, stat.rpartition(")")[2].split()[11:15]))
    return 0
