"""Makes the fixtures with real servers known to all tests, and keeps tests apart."""

import logging
import os
import sys
from collections.abc import Iterator

import pytest
from tests.again import AGAIN_IF_SLOW

# Each worker and each process under test reads the same modules: whatever the environment says,
# compiling all of them each time would cost more than most tests.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

pytest_plugins = ["tests.servers.fixtures", "tests.integration.databases"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run a test twice more where something took too long: other processes can do that."""
    for item in items:
        if item.get_closest_marker("alone"):
            item.add_marker(AGAIN_IF_SLOW)


@pytest.hookimpl(tryfirst=True)
def pytest_report_to_serializable(report: object) -> None:
    """Let ``-n`` carry reports of tests that log what no encoding has."""
    if isinstance(report, pytest.TestReport):
        report.sections = [(name, _encodable(text)) for name, text in report.sections]


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Put back what a test configured: the next one may look at what is logged."""
    raising, before = logging.raiseExceptions, {log: _state(log) for log in _loggers()}
    yield
    logging.raiseExceptions = raising
    for logger in _loggers():
        level, handlers, logger.propagate, logger.disabled = before.get(logger, _UNTOUCHED)
        logger.handlers[:] = handlers
        if logger.level != level:
            logger.setLevel(level)


_State = tuple[int, list[logging.Handler], bool, bool]
_UNTOUCHED: _State = (logging.NOTSET, [], True, False)


def _state(logger: logging.Logger) -> _State:
    return logger.level, list(logger.handlers), logger.propagate, logger.disabled


def _loggers() -> list[logging.Logger]:
    """Return the loggers that ours, Litestar or a test may have configured."""
    named = logging.root.manager.loggerDict.items()
    ours = ("viralfx", "litestar", "uvicorn", "taskiq")
    found = [log for name, log in named if name.partition(".")[0] in ours]
    return [logging.getLogger(), *(log for log in found if isinstance(log, logging.Logger))]
