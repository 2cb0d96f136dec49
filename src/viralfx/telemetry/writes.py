"""How much is written at a time."""

import os
import select
import stat
from collections.abc import Iterator

_OF_A_FILE = 2**17


def at_once(descriptor: int) -> int:
    """Return how many bytes go into one write.

    A pipe takes as many without mixing them with what others write into it, and takes them at once
    when it says that it can be written to. A file takes any number so, and each write costs it.
    """
    try:
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
    except OSError:
        is_file = False
    return _OF_A_FILE if is_file else select.PIPE_BUF


def in_writes(lines: bytes, most: int) -> Iterator[bytes]:
    """Yield whole lines, of ``most`` bytes or one line at a time."""
    start = 0
    while len(lines) - start > most:
        end = lines.rfind(b"\n", start, start + most)
        if end < 0:
            end = lines.index(b"\n", start)
        yield lines[start : end + 1]
        start = end + 1
    if start < len(lines):
        yield lines[start:]
