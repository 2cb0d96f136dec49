"""Accepting jobs: durable on return, with one ledger call for concurrent requests."""

import asyncio
from collections.abc import Sequence

import pytest
from tests.unit.jobs.fleet import FaultyLedger, Fleet

from viralfx.adapters.codec import MsgspecCodec
from viralfx.core.errors import LedgerUnavailableError
from viralfx.jobs.codec import PayloadError
from viralfx.jobs.ledger import Accepted, Check
from viralfx.jobs.model import JobDraft, JobFilter, KeyConflictError
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


async def test_a_refused_draft_does_not_affect_concurrent_ones(
    fleet: Fleet, announced: list[str]
) -> None:
    """They share the batch that the ledger refuses."""

    class Fussy(FaultyLedger):
        async def accept(
            self, drafts: Sequence[JobDraft], *, check: Check | None = None
        ) -> Sequence[Accepted]:
            if any(draft.payload == b"7" for draft in drafts):
                raise PayloadError("not storable")
            return await super().accept(drafts, check=check)

    fleet.ledger = Fussy(fleet.memory_ledger)
    service = service_of(fleet, announced)
    asked = [service.accept("note", str(number).encode()) for number in range(20)]
    answers = await asyncio.gather(*asked, return_exceptions=True)

    assert isinstance(answers[7], PayloadError)
    assert sum(isinstance(answer, Accepted) for answer in answers) == 19
    assert len(await fleet.memory_ledger.page(JobFilter(limit=100))) == 19


async def test_an_outage_fails_all_concurrent_requests_without_retry(
    fleet: Fleet, announced: list[str]
) -> None:
    """Each caller gets the error."""
    service = service_of(fleet, announced)
    fleet.ledger.unavailable = frozenset({"accept"})
    asked = [service.accept("note", b"1") for _ in range(20)]
    answers = await asyncio.gather(*asked, return_exceptions=True)

    assert {type(answer) for answer in answers} == {LedgerUnavailableError}
    assert fleet.ledger.count("accept") == 1
    assert announced == []


async def test_a_cancelled_request_does_not_affect_the_others(
    fleet: Fleet, announced: list[str]
) -> None:
    """Its client may have disconnected."""
    service = service_of(fleet, announced)
    fleet.ledger.seconds = {"accept": 1.0}
    asked = [asyncio.create_task(service.accept("note", b"1")) for _ in range(3)]
    await asyncio.sleep(0.5)
    asked[0].cancel()
    await asyncio.wait(asked)

    assert asked[0].cancelled()
    assert all(task.result().created for task in asked[1:])
