"""Runs the tests of jobs in virtual time: hours pass in milliseconds, in the right order."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import pytest
from tests.unit.jobs.fleet import Fleet
from tests.virtual_time import VirtualTimeLoop


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run the tests of this folder on loops of virtual time."""
    return {"virtual time": VirtualTimeLoop}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of a fleet: together they take three times as long as all others."""
    for item in items:
        if "fleet" in getattr(item, "fixturenames", ()):
            item.add_marker("fleet")


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    """Return a ledger and a notifier without workers; workers that are left are stopped."""
    fleet = Fleet()
    yield fleet
    await fleet.stop()
