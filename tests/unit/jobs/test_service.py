"""What applications ask of jobs, and when workers are told at once."""

from collections.abc import Sequence
from datetime import timedelta

import pytest
from tests.unit.jobs.fleet import Fleet

from viralfx.adapters.codec import MsgspecCodec
from viralfx.domain.jobs.job import KeyConflictError
from viralfx.domain.jobs.service import JobService


class _Rung:
    """Keeps what was rung for."""

    def __init__(self) -> None:
        self.ids: list[str] = []

    def __call__(self, _queue: str, ids: Sequence[str]) -> None:
        self.ids.extend(ids)


def _service(fleet: Fleet, rung: _Rung) -> JobService:
    return JobService(
        ledger=fleet.ledger, tasks=fleet.tasks, codec=MsgspecCodec(), queues=["default"], ring=rung
    )


@pytest.mark.parametrize(
    ("delay", "told"), [(None, True), (-3600.0, True), (0.0, True), (3600.0, False)]
)
async def test_workers_are_told_of_what_is_due(
    fleet: Fleet, delay: float | None, *, told: bool
) -> None:
    """Of a moment that is past, too; what is for later is found when its time comes."""
    rung = _Rung()
    run_at = None if delay is None else fleet.clock.now() + timedelta(seconds=delay)
    accepted = await _service(fleet, rung).accept("note", b"1", run_at=run_at)

    assert rung.ids == ([accepted.job.id] if told else [])


async def test_workers_are_told_once_of_what_is_asked_for_twice(fleet: Fleet) -> None:
    """The same key with the same job is the first one's; with another it is a conflict."""
    rung = _Rung()
    service = _service(fleet, rung)
    first = await service.accept("note", b"1", key="key")
    again = await service.accept("note", b"1", key="key")
    with pytest.raises(KeyConflictError, match=first.job.id):
        await service.accept("note", b"2", key="key")

    assert (first.created, again.created) == (True, False)
    assert rung.ids == [first.job.id]
