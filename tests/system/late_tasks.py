"""An application whose module declares its task after the plugin."""

from litestar import Litestar

from viralfx import OperationsPlugin, task

plugin = OperationsPlugin()


@task("late.chain")
async def chain(number: int) -> int:
    """Submit another job, down to zero."""
    if number:
        await plugin.jobs.submit("late.chain", number - 1)
    return number


app = Litestar(plugins=[plugin], logging_config=None)
