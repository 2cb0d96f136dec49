"""Accepting jobs: each once, by its id and by its key."""

from collections.abc import Mapping, Sequence
from typing import Any

from asyncpg.connection import Connection

from viralfx.adapters.postgres.cleaning import Lease
from viralfx.adapters.postgres.job_rows import draft_columns, job_of_draft, job_of_row
from viralfx.adapters.postgres.job_statements import ACCEPT, ACCEPTED_BEFORE
from viralfx.domain.jobs.job import JobDraft, LedgerUnavailableError
from viralfx.domain.jobs.ledger import Accepted

_ROUNDS = 10


async def accept(
    connection: "Lease | Connection[Any]", drafts: Sequence[JobDraft], *, again: bool
) -> Sequence[Accepted]:
    """Insert what is not there yet, and return all of it in order.

    ``again`` says that this may have been done already, unanswered. Raises ``BAD_VALUE``, and
    :class:`LedgerUnavailableError` when the jobs under the keys come and go all the time.
    """
    accepted: dict[int, Accepted] = {}
    left = dict(enumerate(drafts))
    for _ in range(_ROUNDS):
        if not left:
            return [accepted[place] for place in range(len(drafts))]
        rows = await connection.fetch(ACCEPT, *draft_columns(left.values()))
        new = {str(row["id"]): row for row in rows}
        for place, draft in left.items():
            # The first of several with one id is the one that was inserted.
            if (row := new.pop(draft.id, None)) is not None:
                accepted[place] = Accepted(job_of_draft(draft, row), created=True)
        left = {place: draft for place, draft in left.items() if place not in accepted}
        if left:
            accepted |= await _find(connection, left, again=again)
            # A key whose job was pruned in between is free after all.
            left = {place: draft for place, draft in left.items() if place not in accepted}
    raise LedgerUnavailableError("the jobs under these idempotency keys come and go")


async def _find(
    connection: "Lease | Connection[Any]", drafts: Mapping[int, JobDraft], *, again: bool
) -> dict[int, Accepted]:
    ids = [draft.id for draft in drafts.values()]
    keys = [draft.key for draft in drafts.values() if draft.key is not None]
    jobs = [job_of_row(row) for row in await connection.fetch(ACCEPTED_BEFORE, ids, keys)]
    by_id = {job.id: job for job in jobs}
    by_key = {job.key: job for job in jobs if job.key is not None}
    found = {}
    for place, draft in drafts.items():
        job = by_id.get(draft.id) if draft.key is None else by_key.get(draft.key)
        job = job or by_id.get(draft.id)
        if job is not None:
            found[place] = Accepted(job, created=again and job.id == draft.id)
    return found
