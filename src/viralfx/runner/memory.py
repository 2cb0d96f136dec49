"""Refuses to start where the kernel would kill the process before it could say why."""

from pathlib import Path

from viralfx.domain.errors import StartupError
from viralfx.settings.cgroups import memory_limits

LEAST = 64
"""MiB that a process needs to start, in memory and without any load."""


def require_memory(root: Path = Path("/")) -> None:
    """Raise :class:`StartupError` where a control group allows less than a start needs.

    To be called before the imports that use it up. ``root`` is where ``proc`` and ``sys`` are.
    """
    limit = min(memory_limits(root), default=None)
    if limit is not None and limit < LEAST * 2**20:
        raise StartupError(
            f"the memory limit is {limit / 2**20:.0f} MiB, and to start alone takes {LEAST} MiB;"
            " raise it to 256 MiB or more"
        )
