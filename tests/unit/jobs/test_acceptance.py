"""Accepting jobs: durable on return, with one ledger call for concurrent requests."""

import asyncio

import pytest
from tests.unit.jobs.fleet import Fleet

from viralfx.adapters.codec import MsgspecCodec
from viralfx.jobs.ledger import Accepted
from viralfx.jobs.model import KeyConflictError
from viralfx.jobs.service import JobService


@pytest.fixture
def announced() -> list[str]:
    """Return the ids that were announced."""
    return []


def service_of(fleet: Fleet, announced: list[str]) -> JobService:
    """Return a service with the fleet's ledger."""
    return JobService(
        ledger=fleet.ledger,
        tasks=fleet.tasks,
        codec=MsgspecCodec(),
        queues=["default"],
        notify=lambda _, ids, __: announced.extend(ids),
    )


async def test_concurrent_requests_share_a_ledger_call(fleet: Fleet, announced: list[str]) -> None:
    """Each request gets its own job, and each job is announced."""
    service = service_of(fleet, announced)
    fleet.ledger.seconds = {"accept": 0.01}
    accepted = await asyncio.gather(
        *(service.accept("note", str(number).encode()) for number in range(500))
    )

    assert fleet.ledger.count("accept") == 3
    assert [each.job.payload for each in accepted] == [str(n).encode() for n in range(500)]
    assert announced == [each.job.id for each in accepted]


async def test_concurrent_requests_with_one_key_get_one_job(
    fleet: Fleet, announced: list[str]
) -> None:
    """A request with another payload is refused."""
    service = service_of(fleet, announced)
    asked = [service.accept("note", payload, key="key") for payload in (b"1", b"1", b"2")]
    first, second, third = await asyncio.gather(*asked, return_exceptions=True)

    assert isinstance(first, Accepted)
    assert isinstance(second, Accepted)
    assert isinstance(third, KeyConflictError)
    assert (first.created, second.created) == (True, False)
    assert announced == [first.job.id] == [second.job.id]
