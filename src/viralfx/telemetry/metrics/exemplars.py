"""Exemplars: the trace of one measurement among many, so that a slow one can be looked into."""

from collections.abc import Callable

Exemplar = Callable[[], dict[str, str] | None]
"""Names the trace of what is being measured, if it is recorded; called at the measurement."""


def no_exemplar() -> None:
    """Name none: nothing is traced."""
