"""Tests that repeat for endurance: once in a usual run, in full with VIRALFX_TEST_SOAK=1.

Mark such a test ``soak``: ``just soak`` selects it by that for the full number. A test that has no
short form, because a shorter one shows the same behaviour, is :func:`only_in_soak`.
"""

import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest

SOAK = bool(os.environ.get("VIRALFX_TEST_SOAK"))

Test = TypeVar("Test", bound=Callable[..., Any])
Record = Callable[[str, object], None]
"""The fixture ``record_property``: `just endurance` publishes the figures of a soak run."""


def cycles(full: int, *, usual: int = 1) -> range:
    """Return the numbers of the cycles of this run: ``full`` of them in a soak run."""
    return range(full if SOAK else usual)


def spread(seconds: Sequence[float]) -> str:
    """Return the figures of measured times, for ``record_property``."""
    low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
    return f"{low:.2f} to {high:.2f} s, median {middle:.2f} s, {len(seconds)} times"


def only_in_soak(test: Test) -> Test:
    """Mark a test ``soak``, and skip it in a usual run."""
    skipped = pytest.mark.skipif(not SOAK, reason="runs in `just soak`")
    marked: Test = pytest.mark.soak(skipped(test))
    return marked
