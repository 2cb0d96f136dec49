"""Names and rights: which caller may read, operate and stop, and submit and read which jobs."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum
from fnmatch import fnmatchcase

from viralfx.core.keys import NamedKey


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
    """A caller that a token, a session or a function of the application has identified.

    Raises ``TypeError`` if ``right`` is no :class:`Right`, or patterns are a text: each character
    of ``"reports.*"`` would be a pattern, and ``*`` matches every name.
    """

    name: str
    """The name for the audit trail, the log and the idempotency keys."""
    right: Right = Right.NONE
    submits: tuple[str, ...] = ()
    """Patterns of the tasks that it may submit to, such as ``reports.*``."""
    reads: tuple[str, ...] = ()
    """Patterns of the queues whose jobs it may read."""
    operates: tuple[str, ...] = ()
    """Patterns of the queues whose jobs it may cancel and retry, and that it may pause."""
    shares_keys: bool = False
    """True: its idempotency keys are also those of the application, and belong to no name."""

    def __post_init__(self) -> None:
        """Refuse values of other types, which would give more rights or fail later."""
        if not isinstance(self.right, Right):
            raise TypeError(f"right is a Right, such as Right.READ, not {self.right!r}")
        for name in ("submits", "reads", "operates"):
            patterns = getattr(self, name)
            if not isinstance(patterns, tuple) or not all(isinstance(one, str) for one in patterns):
                raise TypeError(f"{name} is a tuple of patterns, not {patterns!r}")

    def may(self, right: Right) -> bool:
        """Return True if the caller has a right at the operations endpoints."""
        return self.right >= right

    @property
    def reads_all(self) -> bool:
        """True if the caller may read the jobs of every queue."""
        return self.right >= Right.READ or "*" in self.reads

    @property
    def operates_all(self) -> bool:
        """True if the caller may change the jobs of every queue."""
        return self.right >= Right.OPERATE or "*" in self.operates

    def joined(self, other: "Principal") -> "Principal":
        """Return a caller of this name that has the rights of both."""
        return replace(
            self,
            right=max(self.right, other.right),
            submits=(*self.submits, *other.submits),
            reads=(*self.reads, *other.reads),
            operates=(*self.operates, *other.operates),
        )

    def key(self, text: str | None) -> str | NamedKey | None:
        """Return the idempotency key that the caller means by a text."""
        return text if text is None or self.shares_keys else NamedKey(self.name, text)

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


ANONYMOUS = Principal(name="anonymous", shares_keys=True)
"""A caller without a valid token or session."""
