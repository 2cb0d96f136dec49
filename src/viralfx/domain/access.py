"""Names and rights: which caller may read, operate and stop, and submit and read which jobs."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from fnmatch import fnmatchcase


class Right(IntEnum):
    """The rights at the operations endpoints; a higher one includes the lower ones."""

    NONE = 0
    READ = 1
    """Details of checks, stacks, metrics, settings without secrets, and views of the console."""
    OPERATE = 2
    """Retry, cancel and pause jobs, and change the levels of loggers."""
    ADMIN = 3
    """Begin the stop, and change settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """A caller that a token, a session or a function of the application has identified."""

    name: str
    """The name for the audit trail, the log and the idempotency keys."""
    right: Right = Right.NONE
    submits: tuple[str, ...] = ()
    """Patterns of the tasks that it may submit to, such as ``reports.*``."""
    reads: tuple[str, ...] = ()
    """Patterns of the queues whose jobs it may read."""
    operates: tuple[str, ...] = ()
    """Patterns of the queues whose jobs it may cancel and retry, and that it may pause."""

    def may(self, right: Right) -> bool:
        """Return True if the caller has a right at the operations endpoints."""
        return self.right >= right

    def may_submit(self, task: str) -> bool:
        """Return True if the caller may submit jobs of a task."""
        return _matches(task, self.submits)

    def may_read(self, queue: str) -> bool:
        """Return True if the caller may read the jobs of a queue."""
        return self.right >= Right.READ or _matches(queue, self.reads)

    def may_operate(self, queue: str) -> bool:
        """Return True if the caller may change the jobs of a queue, or pause it."""
        return self.right >= Right.OPERATE or _matches(queue, self.operates)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


ANONYMOUS = Principal(name="anonymous")
"""A caller without a valid token or session."""
