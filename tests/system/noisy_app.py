"""An application that repeatedly configures logging itself, and logs meanwhile."""

import logging
import logging.config
import os
from configparser import RawConfigParser

import structlog
from litestar import Litestar

from viralfx import task

_logger = logging.getLogger("noisy")

_AS_ALEMBIC_HAS_IT = """
[loggers]
keys = root
[handlers]
keys = console
[formatters]
keys =
[logger_root]
level = WARNING
handlers = console
[handler_console]
class = StreamHandler
args = (sys.stderr,)
"""


@task("noisy.work")
async def work(what: str) -> None:
    """Log a line."""
    _logger.info("Working on %s", what)


def make() -> Litestar:
    """Return an application without the plugin."""
    app = Litestar(on_startup=[start])
    _logger.warning("Made with %s", os.environ["API_TOKEN"])
    logging.getLogger("litestar").warning("Made at postgres://user:planted@db/shop")
    structlog.get_logger().warning("Made with structlog and %s", os.environ["API_TOKEN"])
    # This disables every existing logger.
    logging.config.dictConfig({"version": 1, "root": {"level": "ERROR"}})
    _logger.warning("Made by dictConfig")
    return app


def start() -> None:
    """Configure logging, as a migration at start-up does."""
    Litestar()
    _logger.warning("Starting with %s", os.environ["API_TOKEN"])
    parser = RawConfigParser()
    parser.read_string(_AS_ALEMBIC_HAS_IT)
    logging.config.fileConfig(parser)


made = make()
