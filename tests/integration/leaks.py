"""Detects open files and tasks that a test leaves behind."""

import asyncio

import psutil
from tests.servers.waiting import until


class LeakCheck:
    """Remembers the open files and the tasks of this process."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._files, self._tasks = self._process.num_fds(), asyncio.all_tasks()

    async def assert_none(self) -> None:
        """Wait until no additional file or task is left; fail after a timeout."""
        try:
            await until(lambda: not self._more())
        except TimeoutError:
            raise AssertionError(f"left behind: {self._more()}") from None

    def _more(self) -> str:
        files = self._process.num_fds() - self._files
        tasks = asyncio.all_tasks() - self._tasks
        return f"{files} files, {tasks}" if files > 0 or tasks else ""
