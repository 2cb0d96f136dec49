"""What the process uses of its machine: plain numbers that one adapter reads."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessUsage:
    """Memory in bytes and processor time at one moment.

    The names of the answers come from a runtime with a managed heap; ADR-0011 says what stands
    for each of them here.
    """

    rss: int
    """Resident set size: what counts against the limit."""
    heap_used: int
    """Unique set size: what this process alone holds and would give back by ending."""
    heap_total: int
    """The limit in force: the smallest of the control group's and the host's memory."""
    cpu_percent: float
    """Processor time since the reading before this one, in percent of one core."""

    @property
    def external(self) -> int:
        """Bytes resident but shared with other processes, such as libraries."""
        return max(0, self.rss - self.heap_used)

    @property
    def ratio(self) -> float:
        """Resident part of the limit, from 0 to 1."""
        return self.rss / self.heap_total
