"""A task that looks at the process that runs it."""

import os
import sys

from viralfx import task


@task("modules.list")
async def modules(prefix: str) -> list[str]:
    """Return the modules whose names begin so."""
    return sorted(name for name in sys.modules if name.startswith(prefix))


@task("modules.betray")
async def betray(name: str) -> None:
    """Fail with what nobody should see."""
    raise RuntimeError(f"{os.environ[name]} at postgres://user:planted@db/shop")


@task("modules.betray_all")
async def betray_all(names: list[str]) -> None:
    """Fail with more of it."""
    raise ConnectionError(f"cannot reach {[os.environ[name] for name in names]}")
