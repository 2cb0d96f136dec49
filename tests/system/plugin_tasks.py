"""A task that uses a plugin, and no application of it."""

from viralfx import OperationsPlugin, task


@task("plugin.chain")
async def chain(number: int) -> None:
    """Submit another job."""
    await plugin.jobs.submit("plugin.chain", number + 1)


plugin = OperationsPlugin()
