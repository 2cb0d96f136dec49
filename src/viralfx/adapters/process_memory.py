"""The memory check: resident memory of this process compared with its limit."""

from pathlib import Path

import psutil

from viralfx.domain.health.model import Observation, ProcessUsage, Status
from viralfx.settings.platform import memory_limits

WARN_AT = 0.75
FAIL_AT = 0.90


class ProcessMemory:
    """Health check: warns from 75 % of the limit, fails from 90 %."""

    def __init__(self, root: Path = Path("/")) -> None:
        """``root`` is where ``proc`` and ``sys`` are mounted."""
        self._root = root
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call only sets the starting point
        self._usage: ProcessUsage | None = None

    @property
    def usage(self) -> ProcessUsage:
        """Usage at the last check; measured now if there was none."""
        return self._usage or self._read()

    async def check(self) -> Observation:
        """Measure the process's memory and compare it with the limit."""
        # Takes a few milliseconds per gigabyte: the kernel walks all pages. It does not run
        # in the default executor, because an application that fills that would fail this check.
        usage = self._read()
        details = {
            "heapUsed": _megabytes(usage.heap_used),
            "heapTotal": _megabytes(usage.heap_total),
            "rss": _megabytes(usage.rss),
            "external": _megabytes(usage.external),
            "usagePercent": f"{usage.ratio:.2%}",
        }
        if usage.ratio >= FAIL_AT:
            return Observation(
                status=Status.FAIL,
                message="Memory usage is critical",
                details=details,
                code="usage_critical",
            )
        if usage.ratio >= WARN_AT:
            return Observation(
                status=Status.WARN,
                message="Memory usage is high",
                details=details,
                code="usage_high",
            )
        return Observation(status=Status.PASS, message="Memory usage is normal", details=details)

    def _read(self) -> ProcessUsage:
        memory = self._process.memory_full_info()
        self._usage = ProcessUsage(
            rss=memory.rss,
            heap_used=memory.uss,
            heap_total=memory_limit(self._root),
            cpu_percent=self._process.cpu_percent(),
        )
        return self._usage


def memory_limit(root: Path = Path("/")) -> int:
    """Return the bytes that this process may use: the minimum of its control groups and the host.

    An unreadable limit is ignored.
    """
    host = psutil.virtual_memory().total
    return min([host, *memory_limits(root)])


def _megabytes(count: int) -> str:
    return f"{round(count / 2**20)}MB"
