"""Jobs in virtual time: hours pass in milliseconds, in the order in which they would."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import pytest
from tests.unit.jobs.fleet import Fleet
from tests.virtual_time import VirtualTimeLoop


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Have the tests of this folder run on loops of virtual time."""
    return {"virtual time": VirtualTimeLoop}


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    """Return a ledger, a bell and no workers yet; those that are left are stopped at the end."""
    fleet = Fleet()
    yield fleet
    await fleet.stop()
