"""Prometheus's own judge of metrics and rules: found, or fetched where it can be."""

import fcntl
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from tests.servers.supply import UnavailableError

_KEPT = Path(sys.prefix) / "bin" / "promtool"
"""Where a fetched one is kept: it goes with the virtual environment."""


def promtool() -> Path:
    """Return the program.

    Where it is not on PATH, it is taken out of Debian's package of that name, of which nothing
    else is installed and no service is started. Raises ``UnavailableError`` where that cannot be.
    """
    found = _found()
    if isinstance(found, UnavailableError):
        raise found
    return found


@cache
def _found() -> Path | UnavailableError:
    # Looked for once: where there is no network, each time takes a while.
    if found := shutil.which("promtool"):
        return Path(found)
    with (_KEPT.parent / ".promtool.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several workers may want it at once
        if not _KEPT.exists():
            try:
                _fetch()
            except UnavailableError as error:
                return error
    return _KEPT


def _fetch() -> None:
    if shutil.which("apt-get") is None:
        raise UnavailableError("promtool is not on PATH, and there is no apt-get to fetch it")
    with tempfile.TemporaryDirectory() as folder:
        download = ["apt-get", "download", "-qq", "promtool"]
        problem = _run(download, folder)
        if problem and _run(["apt-get", "update", "-qq"], folder) is None:
            problem = _run(download, folder)
        packages = list(Path(folder).glob("promtool_*.deb"))
        if problem or not packages:
            raise UnavailableError(f"promtool is not on PATH, and cannot be fetched: {problem}")
        problem = _run(["dpkg-deb", "--extract", str(packages[0]), "unpacked"], folder)
        taken = Path(folder, "unpacked/usr/bin/promtool")
        if problem or not taken.exists():
            raise UnavailableError(f"the package promtool does not hold it: {problem}")
        shutil.copy2(taken, _KEPT)


def _run(command: list[str], folder: str) -> str | None:
    """Run a command; return what went wrong."""
    try:
        result = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=90, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return None if result.returncode == 0 else result.stderr.strip() or "it failed"
