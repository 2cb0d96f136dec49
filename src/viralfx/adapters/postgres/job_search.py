"""Looking for the jobs of a conversation, without an index of whose each job is.

One would cost every job, when it is accepted and again at each change, more than a search is worth
that people make now and then. So a bounded number of rows is read by the jobs' ids, the newest
first, which are in the order of time.
"""

from typing import Any, Final

from asyncpg.connection import Connection

from viralfx.adapters.postgres.cleaning import Lease
from viralfx.adapters.postgres.job_rows import identifier, job_of_row
from viralfx.adapters.postgres.job_statements import JOB
from viralfx.domain.jobs.job import JobState
from viralfx.domain.jobs.ledger import Found

MOST_LOOKED_AT = 100_000
"""Jobs that one search looks at: tens of milliseconds, where their rows are in memory."""

_OLDEST = "00000000-0000-0000-0000-000000000000"

LAST_LOOKED_AT: Final = """
SELECT id FROM viralfx_jobs WHERE id < $1 ORDER BY id DESC OFFSET $2 LIMIT 1
"""
FIND: Final = f"""
SELECT {JOB} FROM viralfx_jobs
WHERE id < $1 AND id >= $2
    AND coalesce(correlation_id, replace(id::text, '-', '')) = $3
    AND ($4::text IS NULL OR queue = $4) AND ($5::text IS NULL OR state = $5)
ORDER BY id DESC LIMIT $6
"""  # noqa: S608 - constants


async def find(
    connection: "Lease | Connection[Any]",
    correlation_id: str,
    *,
    queue: str | None,
    state: JobState | None,
    before: str,
    limit: int,
    most: int,
) -> Found:
    """Return the jobs among the ``most`` newest before an id, and where to go on."""
    newest = identifier(before)
    if newest is None:
        return Found(jobs=(), before=None)
    last = await connection.fetchval(LAST_LOOKED_AT, newest, most - 1)
    # One more than asked for: whether there are others.
    arguments = newest, last or _OLDEST, correlation_id, queue, state, limit + 1
    rows = await connection.fetch(FIND, *arguments)
    jobs = tuple(job_of_row(row) for row in rows[:limit])
    if len(rows) > limit:
        return Found(jobs=jobs, before=jobs[-1].id)
    return Found(jobs=jobs, before=None if last is None else str(last))
