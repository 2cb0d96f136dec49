"""The platform of the process: the memory limit of its control groups, and variables that it sets.

Imports only the standard library, so that the limit is checked before large imports.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from viralfx.core.errors import StartupError


def memory_limits(root: Path = Path("/")) -> Iterator[int]:
    """Yield the limit in bytes of each control group of this process that has one.

    Understands cgroup v2 (``memory.max``), v1 (``memory.limit_in_bytes``) and the hybrid layout,
    with and without a cgroup namespace. An unreadable limit is skipped.
    """
    try:
        # A group's name may be any bytes.
        text = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return
    for line in text.splitlines():
        if line.count(":") < 2:  # noqa: PLR2004 - hierarchy, controllers, path
            continue
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _limits_up(root / "sys/fs/cgroup", path, "memory.max")
        elif "memory" in controllers.split(","):
            yield from _limits_up(root / "sys/fs/cgroup/memory", path, "memory.limit_in_bytes")


def _limits_up(mount: Path, path: str, file: str) -> Iterator[int]:
    # A parent's limit holds for its children too. Without a cgroup namespace ``path`` may not
    # exist below the mount; the mount's own file then is the container's.
    relative = PurePosixPath(path.lstrip("/"))
    for folder in (relative, *relative.parents):
        try:
            text = (mount / folder / file).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        # "max" is no limit, and so is version 1's rounded-down maximum of a signed 64-bit number.
        if text.isdecimal() and 0 < int(text) < 2**60:
            yield int(text)


MIN_MEMORY_MIB = 64
"""A process without load and on memory adapters needs this much to start."""


def require_memory(root: Path = Path("/")) -> None:
    """Raise :class:`StartupError` if a control group allows less than a start needs.

    Call it before large imports. ``root`` is the parent of ``proc`` and ``sys``.
    """
    limit = min(memory_limits(root), default=None)
    if limit is not None and limit < MIN_MEMORY_MIB * 2**20:
        raise StartupError(
            f"the memory limit is {limit / 2**20:.0f} MiB, but a start needs {MIN_MEMORY_MIB} MiB;"
            " raise it to 256 MiB or more"
        )


KUBERNETES = "KUBERNETES_SERVICE_HOST"
"""The variable that Kubernetes sets in every container of a pod, and that nothing turns off."""
NAMES = frozenset({KUBERNETES, "K_REVISION"})
"""Names that a platform sets; some resemble a setting, as Cloud Run's K_REVISION does."""

_SERVICE_LINK = re.compile(
    r"\w+_SERVICE_HOST|\w+_SERVICE_PORT(_\w+)?|\w+_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?"
)


def is_service_link(name: str, value: str) -> bool:
    """Return True if Kubernetes injected the variable for a Service of that name."""
    injected_port = name.endswith("_PORT") and value.startswith(("tcp://", "udp://", "sctp://"))
    return injected_port or _SERVICE_LINK.fullmatch(name) is not None


POD_READINESS_DELAY = 3.0
"""Default of SHUTDOWN_READINESS_DELAY in Kubernetes, in seconds. Proxies follow the removal of a
pod from its Service within a second or two."""


def readiness_delay(room: float) -> float:
    """Return the default in a pod, where the other budgets leave ``room`` seconds for it."""
    return max(0.0, min(POD_READINESS_DELAY, room))
