"""Accepting jobs: durable when it returns, in one step for all who ask at the same time."""

import asyncio
from collections.abc import Sequence

import pytest
from tests.unit.jobs.fleet import Fleet, ShakyLedger

from viralfx.adapters.codec import MsgspecCodec
from viralfx.domain.jobs.codec import PayloadError
from viralfx.domain.jobs.job import JobDraft, KeyConflictError, LedgerUnavailableError
from viralfx.domain.jobs.ledger import Accepted
from viralfx.domain.jobs.service import JobService


@pytest.fixture
def rung() -> list[str]:
    """Return the ids that were rung."""
    return []


def service_of(fleet: Fleet, rung: list[str]) -> JobService:
    """Return what accepts jobs."""
    return JobService(
        ledger=fleet.ledger,
        tasks=fleet.tasks,
        codec=MsgspecCodec(),
        queues=["default"],
        ring=lambda _, ids: rung.extend(ids),
    )


async def test_concurrent_requests_share_a_step(fleet: Fleet, rung: list[str]) -> None:
    """Each has its own job, and each is rung for."""
    service = service_of(fleet, rung)
    fleet.ledger.seconds = {"accept": 0.01}
    accepted = await asyncio.gather(
        *(service.accept("note", str(number).encode()) for number in range(500))
    )

    assert fleet.ledger.count("accept") == 3
    assert [each.job.payload for each in accepted] == [str(n).encode() for n in range(500)]
    assert rung == [each.job.id for each in accepted]


async def test_one_key_asked_for_at_once_is_one_job(fleet: Fleet, rung: list[str]) -> None:
    """The second is told of the first one's, and one that asks for something else is refused."""
    service = service_of(fleet, rung)
    asked = [service.accept("note", payload, key="key") for payload in (b"1", b"1", b"2")]
    first, second, third = await asyncio.gather(*asked, return_exceptions=True)

    assert isinstance(first, Accepted)
    assert isinstance(second, Accepted)
    assert isinstance(third, KeyConflictError)
    assert (first.created, second.created) == (True, False)
    assert rung == [first.job.id] == [second.job.id]


async def test_one_that_the_ledger_refuses_harms_no_other(fleet: Fleet, rung: list[str]) -> None:
    """Though they came together."""

    class Fussy(ShakyLedger):
        async def accept(self, drafts: Sequence[JobDraft]) -> Sequence[Accepted]:
            if any(draft.payload == b"7" for draft in drafts):
                raise PayloadError("not storable")
            return await super().accept(drafts)

    fleet.ledger = Fussy(fleet.kept)
    service = service_of(fleet, rung)
    asked = [service.accept("note", str(number).encode()) for number in range(20)]
    answers = await asyncio.gather(*asked, return_exceptions=True)

    assert isinstance(answers[7], PayloadError)
    assert sum(isinstance(answer, Accepted) for answer in answers) == 19
    assert len(await fleet.kept.page(limit=100)) == 19


async def test_an_outage_reaches_all_who_ask_and_is_not_tried_again(
    fleet: Fleet, rung: list[str]
) -> None:
    """Whoever asked knows what to do."""
    service = service_of(fleet, rung)
    fleet.ledger.away = frozenset({"accept"})
    asked = [service.accept("note", b"1") for _ in range(20)]
    answers = await asyncio.gather(*asked, return_exceptions=True)

    assert {type(answer) for answer in answers} == {LedgerUnavailableError}
    assert fleet.ledger.count("accept") == 1
    assert rung == []


async def test_who_stops_waiting_leaves_the_others(fleet: Fleet, rung: list[str]) -> None:
    """A request that was cut, for example."""
    service = service_of(fleet, rung)
    fleet.ledger.seconds = {"accept": 1.0}
    asked = [asyncio.create_task(service.accept("note", b"1")) for _ in range(3)]
    await asyncio.sleep(0.5)
    asked[0].cancel()
    await asyncio.wait(asked)

    assert asked[0].cancelled()
    assert all(task.result().created for task in asked[1:])
