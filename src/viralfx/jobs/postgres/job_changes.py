"""Finds and changes jobs for operators and tasks: pages, retries, cancellations and progress.

A change of many jobs runs in steps, each a transaction of its own, so that it holds few locks and
for a short time.
"""

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from viralfx.core.errors import LedgerUnavailableError
from viralfx.core.ids import canonical_job_id, is_job_id
from viralfx.jobs.bulk import Allowance
from viralfx.jobs.ledger import BulkStep, Found, ProgressReport
from viralfx.jobs.model import (
    ANY_JOB,
    Job,
    JobFilter,
    JobNotFoundError,
    JobState,
    JobStateError,
)
from viralfx.jobs.postgres.ledger_rows import (
    Row,
    job_of_row,
    states_within,
    text,
)
from viralfx.jobs.postgres.ledger_sql import JOB, KEPT, MOVED
from viralfx.jobs.postgres.settlements import Effects
from viralfx.postgres.migrations import Statements
from viralfx.postgres.pool import PING_AFTER
from viralfx.postgres.retry import Attempt, RetriedSteps

LISTED: Final = (
    JOB.replace("history", "NULL AS history")
    .replace("payload", "'' AS payload")
    .replace("result", "NULL AS result")
)
"""The columns of a job in a list: payloads, results and histories are large."""

PAGE: Final = f"""
SELECT {LISTED} FROM viralfx_all_jobs WHERE id < $1 ORDER BY id DESC LIMIT $2
"""  # noqa: S608 - constants
# A range of the index for pages. With separate conditions on queue and state the planner might scan
# all jobs by id, assuming that the state is a common one.
_RANGE = """
    (job.queue, job.state, job.id) < (queues.queue, states.state, $1::uuid)
    AND (job.queue, job.state, job.id)
        >= (queues.queue, states.state, '00000000-0000-0000-0000-000000000000'::uuid)
"""
_LAST_OF_RANGE = "ORDER BY job.queue DESC, job.state DESC, job.id DESC LIMIT $2"
# Every queue that has jobs has counters.
_FOUND = f"""
queues AS (
    SELECT DISTINCT queue FROM viralfx_job_counters WHERE $3::text IS NULL OR queue = $3::text
), found AS (
    SELECT few.id
    FROM queues CROSS JOIN unnest($4::text[]) AS states (state)
    CROSS JOIN LATERAL (
        SELECT job.id FROM viralfx_jobs AS job
        WHERE {_RANGE} AND job.state <> 'active' {_LAST_OF_RANGE}
    ) AS few
    UNION ALL
    SELECT few.id
    FROM queues CROSS JOIN unnest($4::text[]) AS states (state)
    CROSS JOIN LATERAL (
        SELECT job.id FROM viralfx_finished_jobs AS job WHERE {_RANGE} {_LAST_OF_RANGE}
    ) AS few
    UNION ALL
    SELECT id FROM viralfx_jobs
    WHERE state = 'active' AND 'active' = ANY($4::text[])
        AND ($3::text IS NULL OR queue = $3::text) AND id < $1
), page AS MATERIALIZED (
    SELECT id FROM found ORDER BY id DESC LIMIT $2
)
"""  # noqa: S608 - constants
PAGE_OF: Final = f"""
WITH {_FOUND}
SELECT {LISTED} FROM viralfx_all_jobs
WHERE id = ANY(ARRAY(SELECT id FROM page)) ORDER BY id DESC
"""  # noqa: S608 - constants
# Also without a match the answer has a row, with the number of scanned jobs and the last of them.
_SEARCHED = f"""
SELECT last.scanned, last.last, found.*
FROM (
    SELECT count(*) AS scanned, (array_agg(id ORDER BY id))[1] AS last FROM page
) AS last LEFT JOIN LATERAL (
    SELECT {LISTED} FROM viralfx_all_jobs
    WHERE id = ANY(ARRAY(SELECT id FROM page))
        AND ($5::text IS NULL OR task = $5) AND ($6::text IS NULL OR error_code = $6)
        AND ($7::timestamptz IS NULL OR created_at < $7)
    ORDER BY id DESC LIMIT $8
) AS found ON true
ORDER BY found.id DESC
"""  # noqa: S608 - constants
SEARCH_OF: Final = f"WITH {_FOUND} {_SEARCHED}"
SEARCH: Final = f"""
WITH page AS MATERIALIZED (
    SELECT id FROM viralfx_all_jobs
    WHERE id < $1 AND $3::text IS NULL AND $4::text[] IS NOT NULL
    ORDER BY id DESC LIMIT $2
)
{_SEARCHED}
"""  # noqa: S608 - constants
LAST_SCANNED: Final = """
SELECT id FROM viralfx_all_jobs WHERE id < $1 ORDER BY id DESC OFFSET $2 LIMIT 1
"""
FIND: Final = f"""
SELECT {LISTED} FROM viralfx_all_jobs
WHERE id < $1 AND id >= $2
    AND coalesce(correlation_id, replace(id::text, '-', '')) = $3
    AND ($4::text IS NULL OR queue = $4) AND ($5::text IS NULL OR state = $5)
    AND ($6::text IS NULL OR task = $6) AND ($7::text IS NULL OR error_code = $7)
    AND ($8::timestamptz IS NULL OR created_at < $8)
ORDER BY id DESC LIMIT $9
"""  # noqa: S608 - constants

_RETRIED = """
state = 'waiting', run_at = statement_timestamp(), finished_at = NULL, refused_by = NULL,
    attempts = 0, crashes = 0, cancel_requested = false, unique_key = NULL
"""
RETRY: Final = f"""
UPDATE viralfx_jobs SET {_RETRIED} WHERE id = $1 AND state = 'failed' RETURNING {JOB}
"""  # noqa: S608 - constants
# A job that is due keeps its place in the queue.
RUN: Final = f"""
UPDATE viralfx_jobs SET state = 'waiting', run_at = least(run_at, statement_timestamp())
WHERE id = $1 AND state IN ('waiting', 'scheduled') RETURNING {JOB}
"""  # noqa: S608 - constants
_CANCELLED = f"""
    RETURNING {KEPT}, 'cancelled', job.attempts, job.result, job.error_code, job.error_message
), moved AS (
    INSERT INTO viralfx_finished_jobs ({MOVED}) SELECT * FROM taken RETURNING *
)
"""  # noqa: S608 - constants
CANCEL: Final = f"""
WITH taken AS (
    DELETE FROM viralfx_jobs AS job WHERE id = $1 AND state IN ('waiting', 'scheduled')
    {_CANCELLED}
SELECT {MOVED}, NULL AS worker, false AS cancel_requested FROM moved
"""  # noqa: S608 - constants
REQUEST_CANCEL: Final = f"""
UPDATE viralfx_jobs SET cancel_requested = true WHERE id = $1 AND state = 'active' RETURNING {JOB}
"""  # noqa: S608 - constants
# Only active jobs have a worker.
CANCEL_REQUESTS: Final = """
SELECT id, claims FROM viralfx_jobs WHERE cancel_requested AND worker = $1
"""

# For a portion of a long range of an index the planner might read and sort all of it each time, in
# particular if its statistics are older than the jobs.
BY_INDEX: Final = """
SET LOCAL enable_seqscan = off;
SET LOCAL enable_bitmapscan = off;
SET LOCAL enable_sort = off;
SET LOCAL jit = off
"""
QUEUES: Final = """
SELECT DISTINCT queue FROM viralfx_job_counters WHERE $1::text IS NULL OR queue = $1 ORDER BY queue
"""
_MATCHES = """
($4::text IS NULL OR job.task = $4) AND ($5::text IS NULL OR job.error_code = $5)
    AND ($6::timestamptz IS NULL OR job.created_at < $6)
"""
# The next jobs of a queue and state by id, and those of them that match and are not being changed.
# Written so that the planner finds those by the index of ids.
_STEP = f"""
WITH scanned AS MATERIALIZED (
    SELECT job.id, {_MATCHES} AS matches FROM viralfx_jobs AS job
    WHERE job.state <> 'active'
        AND (job.queue, job.state, job.id) > ($1::text, $7::text, $2::uuid)
        AND (job.queue, job.state, job.id) < ($1::text, $7::text, $3::uuid)
    ORDER BY job.queue, job.state, job.id
    LIMIT $8
), chosen AS MATERIALIZED (
    SELECT job.id FROM viralfx_jobs AS job
    WHERE job.id = ANY(ARRAY(SELECT id FROM scanned WHERE matches))
        AND job.state IS NOT DISTINCT FROM $7
    LIMIT $9
    FOR UPDATE SKIP LOCKED
)
"""  # noqa: S608 - constants
_STEP_RESULT = """
SELECT count(*) AS changed,
    (SELECT CASE WHEN count(*) = $8 THEN (array_agg(id ORDER BY id DESC))[1] END FROM scanned)
        AS last,
"""
RETRY_STEP: Final = f"""
{_STEP}, changed AS (
    UPDATE viralfx_jobs AS job SET {_RETRIED} FROM chosen WHERE job.id = chosen.id RETURNING job.id
)
{_STEP_RESULT} (array_agg(id))[:$10] AS ids FROM changed
"""  # noqa: S608 - constants
CANCEL_STEP: Final = f"""
{_STEP}, taken AS (
    DELETE FROM viralfx_jobs AS job USING chosen WHERE job.id = chosen.id
    {_CANCELLED}
{_STEP_RESULT} NULL AS ids FROM moved
"""  # noqa: S608 - constants
REQUEST_CANCEL_STEP: Final = f"""
UPDATE viralfx_jobs SET cancel_requested = true WHERE id = ANY(ARRAY(
    SELECT id FROM viralfx_jobs AS job
    WHERE state = 'active' AND NOT cancel_requested AND job.id > $2 AND job.id < $3
        AND ($1::text IS NULL OR job.queue = $1) AND {_MATCHES}
    LIMIT $7
    FOR UPDATE SKIP LOCKED
))
"""  # noqa: S608 - constants

# Only columns without an index change, so the row stays in its page. It leaves out jobs that are
# being changed, or it might wait for a settlement that waits for it: that has the last report, too.
REPORT: Final = """
UPDATE viralfx_jobs AS job SET progress = held.progress
FROM (
    SELECT job.id, given.progress
    FROM unnest($1::uuid[], $2::integer[], $3::json[]) AS given (id, number, progress)
    JOIN viralfx_jobs AS job ON job.id = given.id
        AND CASE WHEN job.state = 'active' THEN job.claims = given.number ELSE false END
    FOR UPDATE OF job SKIP LOCKED
) AS held
WHERE job.id = held.id
"""

MAX_SCANNED_JOBS = 100_000
"""Jobs that one search for a correlation id scans: tens of milliseconds if their rows are cached.
"""
MAX_SEARCH_SCANNED = 10_000
"""Jobs that one search by task or code scans, among those of its queue and state."""
_FIRST_SEARCH_SCANNED = 200
_NEXT_SEARCH_SCANNED = 2450
"""A search scans in portions: the first is enough if many jobs match."""
MAX_STEP_JOBS = 4000
"""Jobs that one step of a bulk change scans, and changes at most."""
MAX_ANNOUNCED_JOBS = 500
"""Ids of retried jobs that a step returns. A worker with more of them than free slots polls on
until the queue is empty."""
_MAX_CHANGE_ROUNDS = 10

OLDEST: Final = "00000000-0000-0000-0000-000000000000"
NEWEST: Final = "ffffffff-ffff-ffff-ffff-ffffffffffff"


async def fetched_by_index(connection: Any, statement: str, *arguments: object) -> Sequence[Row]:
    """Run a statement with the settings of ``BY_INDEX``; return its rows."""
    async with connection.transaction(isolation="read_committed"):
        await connection.execute(BY_INDEX)
        rows: Sequence[Row] = await connection.fetch(statement, *arguments)
        return rows


class JobChanges:
    """The part of a ledger in Postgres that finds and changes jobs by id or filter."""

    _steps: RetriedSteps
    _sql: Statements
    _effects: Effects
    _max_scanned: int

    # A client waits for these, as for accepting, so idle connections are tested early.

    async def _fetched(self, statement: str, *arguments: object) -> Sequence[Row]:
        return await self._steps.run(
            lambda attempt: attempt.connection.fetch(statement, *arguments), max_idle=PING_AFTER
        )

    async def _fetched_by_index(
        self, statement: str, *arguments: object, **options: float
    ) -> Sequence[Row]:
        return await self._steps.run(
            lambda attempt: fetched_by_index(attempt.connection, statement, *arguments), **options
        )

    async def _changed(self, statement: str, *arguments: object) -> int:
        """Run a statement; return how many rows it changed."""
        status = await self._steps.run(
            lambda attempt: attempt.connection.execute(statement, *arguments)
        )
        return int(status.split()[-1])

    async def get(self, job_id: str) -> Job | None:
        """See :class:`JobLedger`."""
        if not is_job_id(job_id):
            return None
        rows = await self._fetched(self._sql.GET, job_id)
        return job_of_row(rows[0]) if rows else None

    async def page(self, wanted: JobFilter = ANY_JOB) -> Sequence[Job]:
        """See :class:`JobLedger`."""
        before = _before(wanted)
        if before is None:
            return ()
        statement, arguments = self._sql.PAGE, [before, wanted.most]
        if wanted.queue is not None or wanted.state is not None:
            statement = self._sql.PAGE_OF
            arguments += [wanted.queue, states_within(wanted.state)]
        return [job_of_row(row) for row in await self._fetched(statement, *arguments)]

    async def find(self, correlation_id: str, wanted: JobFilter = ANY_JOB) -> Found:
        """See :class:`JobLedger`; scans at most ``max_scanned`` jobs."""
        limit, newest = wanted.most, _before(wanted)
        if newest is None:
            return Found(jobs=(), before=None)

        async def step(attempt: Attempt) -> Found:
            fetch, scanned = attempt.connection, self._max_scanned - 1
            last = await fetch.fetchval(self._sql.LAST_SCANNED, newest, scanned)
            # One more than requested, to know if there are further ones.
            rows = await fetch.fetch(
                self._sql.FIND,
                *(newest, last or OLDEST, correlation_id, wanted.queue, wanted.state),
                *(*_matching(wanted), limit + 1),
            )
            return _found(rows, limit, last)

        return await self._steps.run(step, max_idle=PING_AFTER)

    async def search(self, wanted: JobFilter) -> Found:
        """See :class:`JobLedger`; scans at most :data:`MAX_SEARCH_SCANNED` jobs."""
        limit, before = wanted.most, _before(wanted)
        narrow = wanted.queue is not None or wanted.state is not None
        statement = self._sql.SEARCH_OF if narrow else self._sql.SEARCH
        found: list[Row] = []
        scanned, portion = 0, _FIRST_SEARCH_SCANNED
        while before is not None and scanned < MAX_SEARCH_SCANNED and len(found) <= limit:
            rows = await self._fetched_by_index(
                statement,
                *(before, portion, wanted.queue, states_within(wanted.state)),
                # One more than requested, to know if there are further ones.
                *(*_matching(wanted), limit + 1 - len(found)),
                max_idle=PING_AFTER,
            )
            found += [row for row in rows if row["id"] is not None]
            before = str(rows[0]["last"]) if rows[0]["scanned"] == portion else None
            scanned, portion = scanned + portion, _NEXT_SEARCH_SCANNED
        return _found(found, limit, before)

    # -- one job -----------------------------------------------------------------------------

    async def retry(self, job_id: str) -> Job:
        """See :class:`JobLedger`."""
        # Each of these states shows that an earlier attempt of this change succeeded.
        done = {JobState.WAITING, JobState.ACTIVE, JobState.COMPLETED}
        return await self._change(job_id, {JobState.FAILED: self._sql.RETRY}, "retried", done)

    async def run(self, job_id: str) -> Job:
        """See :class:`JobLedger`."""
        # Since the change can be repeated while the job waits.
        done = {JobState.ACTIVE, JobState.COMPLETED, JobState.FAILED}
        return await self._change(job_id, {JobState.WAITING: self._sql.RUN}, "run now", done)

    async def cancel(self, job_id: str, *, running: bool = False) -> Job:
        """See :class:`JobLedger`."""
        statements = {JobState.WAITING: self._sql.CANCEL}
        if running:
            statements[JobState.ACTIVE] = self._sql.REQUEST_CANCEL
        return await self._change(job_id, statements, "cancelled", {JobState.CANCELLED})

    async def _change(
        self,
        job_id: str,
        statements: Mapping[JobState, str],
        change: str,
        done: Collection[JobState],
    ) -> Job:
        async def step(attempt: Attempt) -> Job:
            for _ in range(_MAX_CHANGE_ROUNDS):
                for statement in statements.values():
                    if (row := await attempt.connection.fetchrow(statement, job_id)) is not None:
                        return job_of_row(row)
                row = await attempt.connection.fetchrow(self._sql.GET, job_id)
                if row is None:
                    raise JobNotFoundError(f"there is no job {job_id}")
                job = job_of_row(row)
                if attempt.again and job.state in done:
                    return job
                if job.state not in statements:
                    raise JobStateError(
                        f"job {job_id} is {job.state}; only one that is"
                        f" {' or '.join(statements)} can be {change}",
                        job.state,
                    )
                # It changed its state between two statements.
            raise LedgerUnavailableError(f"job {job_id} changes its state all the time")

        if not is_job_id(job_id):
            raise JobNotFoundError(f"there is no job {job_id}")
        return await self._steps.run(step, max_idle=PING_AFTER)

    # -- many jobs ---------------------------------------------------------------------------

    async def retry_all(
        self, wanted: JobFilter, most: int | None = None
    ) -> AsyncIterator[BulkStep]:
        """See :class:`JobLedger`."""
        if wanted.state in (None, JobState.FAILED):
            allowance = Allowance(most, MAX_STEP_JOBS)
            async for step in self._change_all(self._sql.RETRY_STEP, wanted, ["failed"], allowance):
                yield step

    async def cancel_all(
        self, wanted: JobFilter, most: int | None = None
    ) -> AsyncIterator[BulkStep]:
        """See :class:`JobLedger`."""
        active, allowance = wanted.state in (None, JobState.ACTIVE), Allowance(most, MAX_STEP_JOBS)
        if active:
            yield await self._request_all(wanted, allowance)
        if wanted.state in (None, JobState.WAITING):
            # Scheduled jobs first: those that are promoted meanwhile wait when their turn comes.
            states = states_within(JobState.WAITING)[::-1]
            async for step in self._change_all(self._sql.CANCEL_STEP, wanted, states, allowance):
                yield step
            if active:
                # Those that were claimed meanwhile.
                yield await self._request_all(wanted, allowance)

    async def _change_all(
        self, statement: str, wanted: JobFilter, states: Sequence[str], allowance: Allowance
    ) -> AsyncIterator[BulkStep]:
        before = _before(wanted)
        if before is None:
            return
        more: list[Any] = [MAX_ANNOUNCED_JOBS] if statement is self._sql.RETRY_STEP else []
        for row in await self._fetched(self._sql.QUEUES, wanted.queue):
            for state in states:
                last: object = OLDEST
                while last is not None and (size := allowance.step):
                    (step,) = await self._fetched_by_index(
                        statement,
                        *(row["queue"], last, before, *_matching(wanted), state),
                        *(MAX_STEP_JOBS, size, *more),
                        max_idle=PING_AFTER,
                    )
                    last = step["last"]
                    if allowance.use(step["changed"]):
                        ids = [str(each) for each in step["ids"] or ()]
                        due = {row["queue"]: ids} if ids else {}
                        yield BulkStep(count=step["changed"], ids=due)

    async def _request_all(self, wanted: JobFilter, allowance: Allowance) -> BulkStep:
        before = _before(wanted)
        count = 0
        while before is not None and (size := allowance.step):
            changed = await self._changed(
                self._sql.REQUEST_CANCEL_STEP,
                *(wanted.queue, OLDEST, before, *_matching(wanted), size),
            )
            count += allowance.use(changed)
            if changed < size:
                break
        return BulkStep(count=count)

    # -- running jobs ------------------------------------------------------------------------

    async def cancel_requests(self, worker: str) -> Mapping[str, int]:
        """See :class:`JobLedger`."""
        rows = await self._steps.run(
            lambda attempt: attempt.connection.fetch(self._sql.CANCEL_REQUESTS, worker)
        )
        return {str(row["id"]): row["claims"] for row in rows}

    async def report(self, reports: Sequence[ProgressReport]) -> None:
        """See :class:`JobLedger`."""
        # Those of effects come with the completion.
        stored = [each for each in reports if each.claim.id not in self._effects.unchangeable]
        if not stored:
            return
        columns = (
            [each.claim.id for each in stored],
            [each.claim.number for each in stored],
            [each.progress.decode() for each in stored],
        )
        await self._steps.run(
            lambda attempt: attempt.connection.execute(self._sql.REPORT, *columns)
        )


def _before(wanted: JobFilter) -> str | None:
    return NEWEST if wanted.before is None else canonical_job_id(wanted.before)


def _found(rows: Sequence[Row], limit: int, last: object) -> Found:
    jobs = tuple(job_of_row(row) for row in rows[:limit])
    if len(rows) > limit:
        return Found(jobs=jobs, before=jobs[-1].id)
    return Found(jobs=jobs, before=None if last is None else str(last))


def _matching(wanted: JobFilter) -> tuple[str | None, str | None, datetime | None]:
    return text(wanted.task), text(wanted.code), wanted.created_before
