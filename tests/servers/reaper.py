"""Ends servers and removes their folders when the test run died without doing so.

Runs as a process of its own. Each line of its input names a process (its id and when it was
created) or a folder; at the end of the input, which is the end of the test run, what is still
there of them goes.
"""

import atexit
import contextlib
import shutil
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import psutil


def watch(process: psutil.Process) -> None:
    """See to it that a process does not outlive this one."""
    _tell(f"{process.pid} {process.create_time()!r}")


def watch_folder(folder: Path) -> None:
    """See to it that a folder does not outlive this process."""
    _tell(f"{folder}")


def end(process: psutil.Process) -> None:
    """Kill a process with all its children, and wait until they are gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.suspend()  # so that it has no more children
        family = [process, *process.children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        deadline = time.monotonic() + 5
        while not all(map(is_gone, family)):
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes outlive SIGKILL: {family}")
            psutil.wait_procs(family[1:], timeout=0.02)


def is_gone(process: psutil.Process) -> bool:
    """Say whether a process has ended.

    One whose parent collects nobody stays a zombie, which holds nothing any more.
    """
    try:
        return process.status() in {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}
    except psutil.NoSuchProcess:
        return True


def _tell(line: str) -> None:
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
    for pid, _, created in (line.partition(" ") for line in lines if line[0] != "/"):
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(pid))
            if process.create_time() == float(created):
                end(process)
    for folder in (line for line in lines if line[0] == "/"):
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
