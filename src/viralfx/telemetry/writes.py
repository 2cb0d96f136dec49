"""What lines are written to, and how much at a time."""

import os
import select
import stat
from collections.abc import Iterator

_OF_A_FILE = 2**17
_LINE_END = ord("\n")


class Output:
    """A file descriptor that takes lines."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._torn = False
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        # A terminal says that it can be written to when it has room for a single byte, and whoever
        # writes more waits: for ever, once somebody has pressed Ctrl-S.
        self._keeps_its_word = not os.isatty(descriptor)
        self.at_once = at_once(descriptor)
        """Bytes that go into one write."""

    def ready(self) -> bool:
        """Whether it is certain to take as much as goes into one write at once."""
        return self._keeps_its_word and bool(self._poll.poll(0))

    def wait(self, seconds: float) -> bool:
        """Wait so long until it takes something; tell whether it does."""
        return bool(self._poll.poll(seconds * 1000))

    def write(self, chunk: bytes) -> int:
        """Write everything, however long it takes; return how many lines were not taken."""
        # What was cut off in the middle of a line ends there, so that the next one is whole.
        rest = memoryview(b"\n" + chunk if self._torn else chunk)
        try:
            while rest:
                try:
                    written = os.write(self._descriptor, rest)
                except BlockingIOError:
                    # Who shares the descriptor with us made it a non-blocking one.
                    self._wait_apart(1.0)
                    continue
                self._torn = rest[written - 1] != _LINE_END
                rest = rest[written:]
        except OSError:
            return min(bytes(rest).count(b"\n"), chunk.count(b"\n"))
        return 0

    def _wait_apart(self, seconds: float) -> None:
        # With an object of its own: at the end several threads may write, and one object serves
        # one of them at a time. Not ``select``, which takes no descriptor above 1023.
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        poll.poll(seconds * 1000)


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
