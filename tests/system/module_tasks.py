"""Tasks that inspect the process that runs them."""

import importlib
import os
import sys

from viralfx import task


@task("modules.list")
async def modules(prefix: str) -> list[str]:
    """Return the loaded modules whose names begin with ``prefix``."""
    return sorted(name for name in sys.modules if name.startswith(prefix))


@task("modules.import_all")
async def import_all(names: list[str]) -> list[str]:
    """Import modules and return their ``__name__``."""
    return [importlib.import_module(name).__name__ for name in names]


@task("modules.betray")
async def betray(name: str) -> None:
    """Fail with an error that holds a secret."""
    raise RuntimeError(f"{os.environ[name]} at postgres://user:planted@db/shop")


@task("modules.betray_all")
async def betray_all(names: list[str]) -> None:
    """Fail with an error that holds several secrets."""
    raise ConnectionError(f"cannot reach {[os.environ[name] for name in names]}")
