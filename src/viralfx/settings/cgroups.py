"""What the machine's control groups set for this process, read with the standard library alone."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def memory_limits(root: Path = Path("/")) -> Iterator[int]:
    """Yield the bytes that each control group of this process allows it, those without left out.

    Understands cgroup v2 (``memory.max``), v1 (``memory.limit_in_bytes``) and the hybrid layout,
    with and without a cgroup namespace. A limit that cannot be read counts as none.
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
