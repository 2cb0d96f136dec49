"""An event that may be set in the midst of being set, as by a finalizer or a signal's handler.

The standard library's would wait for itself: it has a lock of its own.
"""

from queue import Empty, SimpleQueue


class Flag:
    """Is waited for by one thread, and set by any."""

    def __init__(self) -> None:
        self._sets: SimpleQueue[None] = SimpleQueue()

    def set(self) -> None:
        """Wake who waits, or who comes to wait."""
        if self._sets.empty():
            self._sets.put(None)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it is set; tell whether it was. It is not any more then."""
        try:
            self._sets.get(timeout=seconds)
        except Empty:
            return False
        return True

    def clear(self) -> None:
        """Forget that it was set."""
        while not self._sets.empty():
            self._sets.get()
