"""A task that looks at the process that runs it."""

import sys

from viralfx import task


@task("modules.list")
async def modules(prefix: str) -> list[str]:
    """Return the modules whose names begin so."""
    return sorted(name for name in sys.modules if name.startswith(prefix))
