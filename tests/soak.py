"""Tests that repeat for endurance: once in a usual run, in full with VIRALFX_TEST_SOAK=1.

Mark such a test ``soak``: ``just soak`` selects it by that for the full number.
"""

import os

SOAK = bool(os.environ.get("VIRALFX_TEST_SOAK"))


def cycles(full: int, *, usual: int = 1) -> range:
    """Return the numbers of the cycles of this run: ``full`` of them in a soak run."""
    return range(full if SOAK else usual)
