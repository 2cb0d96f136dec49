"""How much is written at a time."""

import select
from collections.abc import Iterator

AT_ONCE = select.PIPE_BUF
"""Bytes of one write: a pipe takes them without mixing them with what others write into it, and
takes them at once when it says that it can be written to."""


def in_writes(lines: bytes) -> Iterator[bytes]:
    """Yield whole lines, as many at a time as go into one write; one at least."""
    start = 0
    while len(lines) - start > AT_ONCE:
        end = lines.rfind(b"\n", start, start + AT_ONCE)
        if end < 0:
            end = lines.index(b"\n", start)
        yield lines[start : end + 1]
        start = end + 1
    if start < len(lines):
        yield lines[start:]
