"""An application that logs while it is loaded, after it had logging configured its own way."""

import logging
import os

from litestar import Litestar

from viralfx import task

_logger = logging.getLogger("noisy")


@task("noisy.work")
async def work(what: str) -> None:
    """Say something."""
    _logger.info("Working on %s", what)


def make() -> Litestar:
    """Return an application without the plugin."""
    app = Litestar()
    _logger.warning("Made with %s", os.environ["API_TOKEN"])
    logging.getLogger("litestar").warning("Made at postgres://user:planted@db/shop")
    return app


made = make()
