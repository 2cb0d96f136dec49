"""Servers as processes of this machine."""
# ruff: noqa: D102 - the class Host documents these methods

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import psutil
from tests.servers import reaper
from tests.servers.host import Host
from tests.servers.listening import listens
from tests.servers.ports import free_port
from tests.servers.supply import UnavailableError
from tests.servers.waiting import wait_until

MEMORY = "VIRALFX_TEST_MEMORY"
"""The variable with the folder for the data of servers; empty: on the disk."""
_MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108 - each folder in it has a random name
_PLENTY = 4 * 2**30


@cache
def account() -> tuple[int, int] | None:
    """Return the user and group that servers run as; None when it is the one of the tests.

    Postgres refuses to run as root, so root runs servers as an unprivileged user.
    """
    if os.geteuid() != 0:
        return None
    account = pwd.getpwnam("nobody")
    return account.pw_uid, account.pw_gid


def give(path: Path) -> Path:
    """Hand a file or folder to the user that servers run as."""
    if (owner := account()) is not None:
        os.chown(path, *owner)
    return path


def use_memory() -> None:
    """Keep the data of servers in memory, in this process and those that it starts.

    A new database is hundreds of small files: on a disk it takes several times the processor time.
    Without a file system in memory, or with less than 4 GiB, the data stay on the disk.
    """
    with contextlib.suppress(OSError):
        free = min(shutil.disk_usage(_MEMORY_FOLDER).free, psutil.virtual_memory().available)
        if free >= _PLENTY and os.access(_MEMORY_FOLDER, os.W_OK):
            os.environ.setdefault(MEMORY, str(_MEMORY_FOLDER))


def make_folder(*, programs: bool = False) -> Path:
    """Make a folder that belongs to the servers' user, below folders which that user may pass.

    The folders of pytest are not: they are closed to everybody else. A folder for ``programs`` is
    on the disk, since a file system in memory may not allow to run them.
    """
    place = None if programs else os.environ.get(MEMORY) or None
    folder = Path(tempfile.mkdtemp(prefix="viralfx-", dir=place))
    reaper.watch_folder(folder)
    return give(folder)


@cache
def reachable(program: Path) -> Path:
    """Return a server's program, or that of a copy of its package where servers may not go.

    Raises ``UnavailableError`` when it is part of no package.
    """
    if account() is None or all(parent.stat().st_mode & 0o001 for parent in program.parents):
        return program
    for package in program.parents:
        if package.parent.name in {"site-packages", "dist-packages"}:
            break
    else:
        raise UnavailableError(
            f"the unprivileged user that runs servers for root may not go to {program}"
        )
    folder = make_folder(programs=True)
    folder.chmod(0o711)
    shutil.copytree(package, folder / package.name, symlinks=True)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, folder / libraries.name, symlinks=True)
    return folder / program.relative_to(package.parent)


def run(command: Sequence[str | Path], *, cwd: Path, given: str = "") -> None:
    """Run a program of a server to its end, as the user of servers; ``given`` is its input."""
    user, group = account() or (None, None)
    done = subprocess.run(
        command,
        cwd=cwd,
        user=user,
        group=group,
        extra_groups=[] if user is not None else None,
        env=_environment(),
        input=given,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{command[0]}: {done.stdout}{done.stderr}"


def _environment() -> dict[str, str]:
    """Return an environment in which nothing of the caller configures a server."""
    kept = ("PATH", "LD_LIBRARY_PATH", "TMPDIR", "TZ")
    return {"LC_ALL": "C", **{name: os.environ[name] for name in kept if name in os.environ}}


class ProcessHost(Host):
    """One server as a process, in a folder of its own, in a session of its own."""

    address = "127.0.0.1"
    listen = "127.0.0.1"

    def __init__(
        self,
        program: Path,
        *,
        stop_signal: signal.Signals = signal.SIGTERM,
        close_signal: signal.Signals = signal.SIGKILL,
    ) -> None:
        self.path = make_folder()
        self.folder = str(self.path)
        self.port = free_port()
        self._program = program
        self._stop_signal, self._close_signal = stop_signal, close_signal
        self._popen: subprocess.Popen[bytes] | None = None
        self._frozen = False
        self._log = self.path / "server.log"
        self._log.touch()

    @property
    def listen_port(self) -> int:
        return self.port

    def write(self, name: str, content: bytes) -> str:
        path = self.path / name
        path.unlink(missing_ok=True)
        path.touch(mode=0o600)
        path.write_bytes(content)
        return str(give(path))

    def start(self, arguments: Sequence[str]) -> None:
        assert not self.running(), "it runs already"
        user, group = account() or (None, None)
        with self._log.open("wb") as log:
            self._popen = subprocess.Popen(
                [self._program, *arguments],
                cwd=self.path,
                user=user,
                group=group,
                extra_groups=[] if user is not None else None,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        reaper.watch(psutil.Process(self._popen.pid), self._close_signal)

    def stop(self) -> None:
        if not self._ends_by(self._stop_signal):
            self.kill()
            raise AssertionError(f"did not stop within 10 s: {self.log()}")

    def kill(self) -> None:
        if self._popen is None:
            return
        if self._popen.poll() is None:
            reaper.end(psutil.Process(self._popen.pid))
        self._popen.wait(10)

    def freeze(self) -> None:
        self._frozen = True
        first, *_ = self._family()
        first.suspend()  # before it can have another child
        family = self._family()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        wait_until(lambda: all(map(_stands, family)), seconds=5, what="frozen")

    def thaw(self) -> None:
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        self._frozen = False

    def running(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    def listens(self) -> bool:
        if self._popen is None or self._popen.poll() is not None:
            return False
        return listens(psutil.Process(self._popen.pid), self.port)

    def pids(self) -> list[int]:
        return [process.pid for process in self._family()]

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def close(self) -> None:
        if not self._ends_by(self._close_signal):
            self.kill()
        shutil.rmtree(self.path)

    def _ends_by(self, number: signal.Signals) -> bool:
        if self._popen is None:
            return True
        if self._frozen:
            self.thaw()
        self._popen.send_signal(number)
        try:
            self._popen.wait(10)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _family(self) -> list[psutil.Process]:
        # Children may have sessions of their own, so the group is not the whole family.
        if self._popen is None or self._popen.poll() is not None:
            return []
        first = psutil.Process(self._popen.pid)
        return [first, *first.children(recursive=True)]


def _stands(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_STOPPED or reaper.is_gone(process)
    except psutil.NoSuchProcess:
        return True
