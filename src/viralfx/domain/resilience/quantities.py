"""Numbers that a caller configures: refused where they are written, saying what is allowed."""

import math


def require_count(name: str, value: object) -> None:
    """Raise ``TypeError`` unless ``value`` is a whole number, ``ValueError`` if it is below one."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")


def require_not_negative(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value`` is zero or more and finite."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be zero or more and finite, got {value!r}")


def require_positive(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value`` is more than zero and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be more than zero and finite, got {value!r}")
