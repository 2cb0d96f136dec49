"""Registers the fixtures with real servers, and isolates tests from each other."""

import gc
import logging
import os
import signal
import sys
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path

import pytest

# Each worker and each process under test reads the same modules. Compiling them each time would
# cost more than most tests, so the environment must not disable bytecode.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

pytest_plugins = ["tests.servers.fixtures", "tests.integration.databases"]


_LONG = (
    *("deploy/test_podman.py", "deploy/test_trial.py", "deploy/test_image.py"),
    *("browser/test_site.py", "observability/test_dashboard.py", "system/test_chaos.py"),
    *("edge/test_attacks.py", "system/test_culprits.py", "console/test_views.py"),
    *("edge/test_held.py", "system/test_rolling_update.py", "system/test_database_faults.py"),
    *("integration/test_postgres_failover.py", "deploy/test_extras.py"),
    *("integration/test_redis_variables.py", "system/test_process_diagnostics.py"),
    *("integration/test_redis_sentinel.py", "system/test_units.py"),
    *("integration/test_postgres_notifier.py", "system/test_schemathesis.py"),
    *("integration/test_postgres_switchover.py", "frameworks/test_middleware.py"),
    *("integration/test_doctor_redis.py", "web/test_jobs.py", "edge/test_unread.py"),
    *("integration/test_stream_notifier.py", "deploy/test_manifests_notice.py"),
    *("console/test_faults.py", "system/test_litestar_command.py"),
    *("process/test_log_writer.py", "system/test_drills_process.py", "frameworks/test_servers.py"),
)
"""The files that take longest, then those that mostly wait in turn with those that compute.

Several waiting files at a time would leave the cores idle.
"""
_SLOW = (
    *("browser", "observability", "system", "console", "deploy", "edge", "frameworks"),
    *("integration", "process", "simulation"),
)
"""The layers with slow tests, the slowest first."""
_EACH_PYTHON = ("contracts", "process")
_EACH_FUNCTION = ("web",)
"""The layers of which the other Python runs all tests, and each test function once."""


@cache
def _layer(file: Path) -> str:
    return file.relative_to(Path(__file__).parent).parts[0]


@cache
def _turn(file: Path) -> tuple[int, int]:
    name, layer = file.relative_to(Path(__file__).parent).as_posix(), _layer(file)
    return (
        _LONG.index(name) if name in _LONG else len(_LONG),
        _SLOW.index(layer) if layer in _SLOW else len(_SLOW),
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Exclude the objects that pytest collects from garbage collections.

    Each process of a run collects all tests, and those objects live until its end. Almost half of
    the time of the collection would go into looking for garbage among them.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run long files and slow layers first, and mark the tests that both Python versions run.

    At the end one long file would run while the other workers of the run have nothing left to do.
    """
    items.sort(key=lambda item: _turn(item.path))
    functions: set[str] = set()
    for item in items:
        layer, function = _layer(item.path), item.nodeid.partition("[")[0]
        if layer in _EACH_PYTHON or (layer in _EACH_FUNCTION and function not in functions):
            item.add_marker("each_python")
        functions.add(function)


@pytest.hookimpl(tryfirst=True)
def pytest_report_to_serializable(report: object) -> None:
    """Make reports serializable for ``-n`` if a test logs characters that UTF-8 cannot encode."""
    if isinstance(report, pytest.TestReport):
        report.sections = [(name, _encodable(text)) for name, text in report.sections]


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


@pytest.fixture
def default_sighup() -> Iterator[None]:
    """Let child processes receive SIGHUP, also where the tests run under ``nohup``."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Restore the logging configuration after a test."""
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
    """Return the loggers that the service, Litestar or a test may have configured."""
    named = logging.root.manager.loggerDict.items()
    roots = ("viralfx", "litestar", "uvicorn", "taskiq")
    found = [log for name, log in named if name.partition(".")[0] in roots]
    return [logging.getLogger(), *(log for log in found if isinstance(log, logging.Logger))]
