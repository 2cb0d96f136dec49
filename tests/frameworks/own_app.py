"""An application of Litestar whose module declares its tasks, before and after the plugin."""

import sys

from litestar import Litestar

from viralfx import OperationsConfig, OperationsPlugin, task


@task("own.above")
async def above(number: int) -> int:
    """Return the next number."""
    return number + 1


app = Litestar(plugins=[OperationsPlugin(OperationsConfig(jobs_api=True))], logging_config=None)


@task("own.below")
async def below(number: int) -> int:
    """Return the number before."""
    return number - 1


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app, port=int(sys.argv[1]))
