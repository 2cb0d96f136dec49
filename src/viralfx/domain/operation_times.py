"""How long databases take: who is told of it."""

from collections.abc import Callable

OperationListener = Callable[[str, float, BaseException | None], object]
"""Is told, synchronously, of each statement or command that ended: what it did (``SELECT``), how
many seconds that took, and the error it ended with. It must neither block nor raise."""


def ignore_operation(operation: str, seconds: float, error: BaseException | None) -> None:
    """Do nothing about it."""
