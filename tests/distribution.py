"""The distribution of test files to the processes of ``pytest -n``.

xdist repeats a test whose process was killed: in a new process, without an end. A new process that
gets one test waits for a second one, or for its shutdown, and xdist sends neither. Here such a
test has failed, the other tests of its file run, and the gate decides whether to repeat it.
"""

from typing import Any

from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]


class FileScheduling(LoadFileScheduling):  # type: ignore[misc]  # xdist has no types
    """Sends each file to one process, as ``--dist=loadfile``, and outlives killed processes."""

    def schedule(self) -> None:
        """Distribute the files, or what is left of them to the processes that came later."""
        came_later = self.collection is not None
        super().schedule()
        if came_later:
            for node in self.nodes:
                self._reschedule(node)

    def remove_node(self, node: Any) -> str | None:
        """Take the work of a process that ended; return the test that ended it, if one did."""
        left: dict[str, dict[str, bool]] = {
            file: tests
            for file, tests in self.assigned_work.pop(node).items()
            if not all(tests.values())
        }
        if not left:
            return None
        first = next(iter(left.values()))
        culprit = next(test for test, is_done in first.items() if not is_done)
        first[culprit] = True
        for file, tests in left.items():
            if not all(tests.values()):
                self.workqueue[file] = tests
        for other in self.assigned_work:
            self._reschedule(other)
        return culprit
