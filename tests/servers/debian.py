"""Programs of one file, without a service around them: found, or fetched from Debian."""

import fcntl
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from tests.servers.supply import UnavailableError

_KEPT = Path(sys.prefix) / "bin"
"""Where what was fetched is kept: it goes with the virtual environment."""


def promtool() -> Path:
    """Return Prometheus's own judge of metrics and rules. Raises ``UnavailableError``."""
    return program("promtool")


def prometheus() -> Path:
    """Return Prometheus itself. Raises ``UnavailableError``."""
    return program("prometheus")


def kustomize() -> Path:
    """Return what renders manifests. Raises ``UnavailableError``."""
    return program("kustomize")


def program(name: str) -> Path:
    """Return a program.

    Where it is not on PATH, it is taken out of Debian's package of that name, of which nothing
    else is installed. Raises ``UnavailableError`` where that cannot be.
    """
    found = _found(name)
    if isinstance(found, UnavailableError):
        raise found
    return found


@cache
def _found(name: str) -> Path | UnavailableError:
    # Looked for once: where there is no network, each time takes a while.
    if found := shutil.which(name):
        return Path(found)
    kept = _KEPT / name
    with (_KEPT / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several workers may want it at once
        if not kept.exists():
            try:
                _fetch(name, kept)
            except UnavailableError as error:
                return error
    return kept


def _fetch(name: str, kept: Path) -> None:
    if shutil.which("apt-get") is None:
        raise UnavailableError(f"{name} is not on PATH, and there is no apt-get to fetch it")
    with tempfile.TemporaryDirectory() as folder:
        download = ["apt-get", "download", "-qq", name]
        problem = _run(download, folder)
        if problem and _run(["apt-get", "update", "-qq"], folder) is None:
            problem = _run(download, folder)
        packages = list(Path(folder).glob(f"{name}_*.deb"))
        if problem or not packages:
            raise UnavailableError(f"{name} is not on PATH, and cannot be fetched: {problem}")
        problem = _run(["dpkg-deb", "--extract", str(packages[0]), "unpacked"], folder)
        taken = Path(folder, "unpacked/usr/bin", name)
        if problem or not taken.exists():
            raise UnavailableError(f"the package {name} does not hold it: {problem}")
        shutil.copy2(taken, kept)


def _run(command: list[str], folder: str) -> str | None:
    """Run a command; return what went wrong."""
    try:
        result = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=90, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return None if result.returncode == 0 else result.stderr.strip() or "it failed"
