"""Changes of many jobs: how many a step may change, and how many were changed."""

from dataclasses import dataclass

from viralfx.core.errors import LedgerUnavailableError


@dataclass(frozen=True, slots=True)
class BulkCount:
    """The result of a change of many jobs."""

    count: int
    """How many jobs it changed."""
    more: bool = False
    """True if it ended at its most jobs, so that others may be left."""


def cut_off(count: int, error: LedgerUnavailableError) -> LedgerUnavailableError:
    """Return the error of a change of many jobs that ended after ``count`` of them."""
    changed = "1 job was" if count == 1 else f"{count} jobs were"
    return LedgerUnavailableError(f"{changed} changed; then {error}", error.code)


class Allowance:
    """The jobs that the steps of one change may still change: ``most`` in all, ``step`` at once."""

    def __init__(self, most: int | None, step: int) -> None:
        """``most`` None: any number."""
        self._left = most
        self._step = step

    @property
    def step(self) -> int:
        """How many jobs the next step may change; zero at the end."""
        return self._step if self._left is None else min(self._step, self._left)

    def use(self, changed: int) -> int:
        """Count the jobs that a step has changed; return their number."""
        if self._left is not None:
            self._left -= changed
        return changed
