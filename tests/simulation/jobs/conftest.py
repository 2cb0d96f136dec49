"""The fixtures and the virtual time of the unit tests of jobs."""

from tests.unit.jobs.conftest import fleet, pytest_asyncio_loop_factories

__all__ = ["fleet", "pytest_asyncio_loop_factories"]
