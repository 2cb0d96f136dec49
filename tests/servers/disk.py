"""A small disk of its own for a server, which a test fills and empties."""

import os
import subprocess
from contextlib import suppress
from pathlib import Path

from tests.servers.processes import account
from tests.servers.supply import UnavailableError

_PIECE = bytes(2**20)


class Disk:
    """A file system in memory, mounted at a folder; only root can mount it."""

    def __init__(self, path: Path, mebibytes: int) -> None:
        """Mount it. Raises ``UnavailableError`` without the right to do so."""
        self.path = path
        self._filler = path / "filler"
        path.mkdir()
        user, group = account() or (os.getuid(), os.getgid())
        options = f"size={mebibytes}m,mode=0700,uid={user},gid={group}"
        self._command("mount", "-t", "tmpfs", "-o", options, "tmpfs", path)

    def fill(self) -> None:
        """Take all space that is left."""
        with suppress(OSError), self._filler.open("wb", buffering=0) as file:
            for piece in (_PIECE, _PIECE[:4096]):
                with suppress(OSError):
                    while file.write(piece):
                        pass

    def empty(self) -> None:
        """Give back what ``fill`` took."""
        self._filler.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount it; its content is gone."""
        with suppress(UnavailableError):
            self._command("umount", "--lazy", self.path)

    def _command(self, *command: str | Path) -> None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except FileNotFoundError as error:
            raise UnavailableError(str(error)) from error
        if done.returncode:
            raise UnavailableError(f"{command[0]}: {done.stderr.strip()}")
