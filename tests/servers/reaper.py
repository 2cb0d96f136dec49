"""Ends servers and removes their folders when the test run died without doing so.

Runs as a process of its own. Each line of its input names a process (its id, the signal that ends
it, and when it was created) or a folder; at the end of the input, which is the end of the test
run, what is still there of them goes.
"""

import atexit
import contextlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path

import psutil

LOCK = threading.Lock()
"""Servers may be started by several threads at once."""


def watch(process: psutil.Process, number: signal.Signals) -> None:
    """Register a process that must not outlive this one; ``number`` is the signal that ends it."""
    _register(f"{process.pid} {number:d} {process.create_time()!r}")


def watch_folder(folder: Path) -> None:
    """Register a folder that must not outlive this process."""
    _register(f"{folder}")


def dismiss(process: psutil.Process, number: int) -> None:
    """Ask a process, frozen or not, to end; kill it when it does not."""
    for member in [process, *process.children(recursive=True)]:
        member.resume()
    process.send_signal(number)
    if not _ended([process], seconds=5):
        end(process)


def end(process: psutil.Process) -> None:
    """Kill a process with all its children, and wait until they are gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.suspend()  # so that it has no more children
        family = [process, *process.children(recursive=True)]
        # All stand before the first one goes: none takes leave of its clients when it sees that.
        for act in (psutil.Process.suspend, psutil.Process.kill):
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    act(member)
        if not _ended(family, seconds=5):
            raise RuntimeError(f"processes outlive SIGKILL: {family}")


def _ended(family: list[psutil.Process], *, seconds: float) -> bool:
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while not all(map(is_gone, family)):
        if time.monotonic() > deadline:
            return False
        pause.wait(0.005)
    return True


def is_gone(process: psutil.Process) -> bool:
    """Return whether a process has ended.

    A process whose parent does not wait for it stays a zombie, which holds no resources.
    """
    try:
        return process.status() in {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}
    except psutil.NoSuchProcess:
        return True


def _register(line: str) -> None:
    with LOCK:
        child = _child()
        assert child.stdin is not None
        child.stdin.write(f"{line}\n")
        child.stdin.flush()


@cache
def _child() -> "subprocess.Popen[str]":
    child = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        start_new_session=True,  # the terminal's Ctrl-C is not for it
        text=True,
    )
    atexit.register(child.communicate)
    return child


def main() -> None:
    """Read to the end, then end what is left."""
    lines = [line.rstrip("\n") for line in sys.stdin]
    for pid, number, created in (line.split(" ") for line in lines if line[0] != "/"):
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(pid))
            if process.create_time() == float(created):
                dismiss(process, int(number))
    for folder in (line for line in lines if line[0] == "/"):
        for disk in filter(Path.is_mount, Path(folder).iterdir() if Path(folder).exists() else ()):
            unmount = ("umount", "--lazy", disk)
            subprocess.run(unmount, check=False)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
