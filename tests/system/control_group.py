"""A control group of this machine, by which the kernel limits the memory of processes."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from tests.servers.waiting import wait_until

_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


class ControlGroup:
    """A group that limits the memory of the processes in it."""

    def __init__(self, path: Path, limit: str, usage: str) -> None:
        self.path = path
        self._limit = path / limit
        self._usage = path / usage

    def limit(self, mebibytes: int) -> None:
        """Set the memory limit of all processes together."""
        self._limit.write_text(str(mebibytes * 2**20))

    def used(self) -> int:
        """Return the mebibytes that all processes take together."""
        return int(self._usage.read_text()) // 2**20

    def add(self, pid: int) -> None:
        """Move a process into the group; its memory so far counts in the previous group."""
        (self.path / "cgroup.procs").write_text(str(pid))


@contextmanager
def control_group() -> Iterator[ControlGroup]:
    """Make a group, and remove it when its processes have ended; skip without permission."""
    files = "memory.limit_in_bytes", "memory.usage_in_bytes"
    path = _V1 / f"viralfx-{uuid.uuid4().hex[:8]}"
    if not _V1.is_dir():
        path, files = _V2 / path.name, ("memory.max", "memory.current")
    try:
        path.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        if not (path / files[0]).exists():
            pytest.skip("the memory controller is not there for new control groups")
        yield ControlGroup(path, *files)
    finally:
        wait_until(lambda: _removed(path), what="the control group is empty")


def _removed(path: Path) -> bool:
    with suppress(OSError):
        os.rmdir(path)  # noqa: PTH106 - its files cannot be removed
    return not path.exists()
