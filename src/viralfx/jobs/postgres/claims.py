"""Workers in the ledger: their registration and leases, and their claims of due jobs."""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any, Final

import asyncpg
from asyncpg.connection import Connection

from viralfx.core.clock import Clock, SystemClock, default_rng
from viralfx.core.errors import LedgerUnavailableError
from viralfx.jobs.ledger import MAX_UNRUNNABLE, Registration, UnrunnableJobs
from viralfx.jobs.limits import Limit
from viralfx.jobs.model import HANDED_BACK, PAYLOAD, UNKNOWN_TASK, unknown_message
from viralfx.jobs.postgres import ledger_sql
from viralfx.jobs.postgres.job_changes import fetched_by_index
from viralfx.jobs.postgres.ledger_rows import Row, identifiers, interval
from viralfx.jobs.postgres.ledger_sql import RELEASED, appended
from viralfx.postgres.database import Lease, PostgresDatabase
from viralfx.postgres.errors import BAD_VALUE, refusal
from viralfx.postgres.migrations import Statements
from viralfx.postgres.retry import DedicatedConnection, RetriedSteps

_logger = logging.getLogger("viralfx.jobs")

# True if the task is known. The planner assumes that of nearly every row, because of IS NOT NULL.
# If it expected few rows, outdated statistics might lead it to sort all waiting jobs by time.
_KNOWN = "($5::text[] IS NULL OR nullif(task = ANY($5), false) IS NOT NULL)"
_NOT_REFUSED = "(refused_by IS NULL OR $2 <> ALL(refused_by))"
_NOT_PAUSED = "NOT EXISTS (SELECT FROM viralfx_paused_queues AS paused WHERE paused.queue = $1)"
# As text and as numbers, which the driver decodes faster than an identifier and two times.
_CLAIMED = """
    {0}.id::text AS id, {0}.task, {0}.payload, {0}.claims, {0}.attempts, {0}.crashes,
    {0}.correlation_id, {0}.traceparent, {0}.user_id, {0}.priority, {0}.created_at,
    {0}.max_attempts,
    date_part('epoch', {0}.run_at) AS due_at,
    date_part('epoch', {0}.started_at - {0}.run_at) AS due_since
"""
_ASSIGN = f"""
UPDATE viralfx_jobs AS job
SET state = 'active', worker = $2, receipt = $4, claims = claims + 1,
    started_at = statement_timestamp()
FROM chosen
WHERE job.id = chosen.job
RETURNING {_CLAIMED.format("job")}
"""  # noqa: S608 - constants
# A function, since planning a statement takes longer than a claim: it keeps its plans.
CLAIM: Final = f"""
SELECT mixed, again_in, {_CLAIMED.format("(claimed)")}
FROM viralfx_claim_jobs(
    $1, $2, $3::integer, $4, $5, $6, $7::text[], $8::integer[], $9::integer[], $10::float8[],
    $11::boolean[]
)
"""  # noqa: S608 - constants
# Written so that the planner uses the index of ids and not that of waiting jobs.
CLAIM_THESE: Final = f"""
WITH chosen AS MATERIALIZED (
    SELECT id AS job FROM viralfx_jobs
    WHERE id = ANY($6::uuid[]) AND {_KNOWN} AND {_NOT_REFUSED}
        AND state IS NOT DISTINCT FROM 'waiting'
        AND queue = $1 AND run_at <= statement_timestamp() AND {_NOT_PAUSED}
    ORDER BY priority DESC, run_at, id
    LIMIT $3
    FOR UPDATE SKIP LOCKED
)
{_ASSIGN}
"""  # noqa: S608 - constants

# The worker is alive and renews its lease, so no sweep would return these jobs soon.
UNDO_CLAIM: Final = f"""
UPDATE viralfx_jobs SET state = {RELEASED}, worker = NULL WHERE id = ANY(ARRAY(
    SELECT id FROM viralfx_jobs
    WHERE state = 'active' AND worker = $1 AND receipt = ANY($2::bigint[])
    FOR UPDATE SKIP LOCKED
))
"""  # noqa: S608 - constants

# The second parameter is some of the jobs; NULL: all.
HAND_BACK: Final = f"""
UPDATE viralfx_jobs AS job
SET state = {RELEASED}, worker = NULL,
    history = {appended(f"'{HANDED_BACK.code}'", f"'{HANDED_BACK.message}'")}
WHERE id = ANY(ARRAY(
    SELECT id FROM viralfx_jobs
    WHERE state = 'active' AND worker = $1 AND ($2::uuid[] IS NULL OR id = ANY($2))
    FOR UPDATE SKIP LOCKED
))
RETURNING id, queue, cancel_requested
"""  # noqa: S608 - constants
HELD_BY: Final = "SELECT id FROM viralfx_jobs WHERE state = 'active' AND worker = $1"
# Returns the jobs that could not be handed back; with any, the worker keeps its lease. One without
# an id stands for the worker, whose row another session locks.
DEREGISTER: Final = f"""
WITH held AS MATERIALIZED ({HELD_BY}), gone AS (
    DELETE FROM viralfx_workers WHERE worker IN (
        SELECT worker FROM viralfx_workers WHERE worker = $1 AND NOT EXISTS (SELECT FROM held)
        FOR UPDATE SKIP LOCKED
    )
    RETURNING worker
)
SELECT id::text FROM held
UNION ALL
SELECT NULL FROM viralfx_workers
WHERE worker = $1 AND NOT EXISTS (SELECT FROM held) AND NOT EXISTS (SELECT FROM gone)
"""  # noqa: S608 - constants

# Skips from task to task, and from priority to priority, so the number of jobs does not matter.
DUE: Final = """
SELECT queue, greatest(0, extract(epoch FROM run_at - statement_timestamp()))::float8 AS seconds
FROM unnest($1::text[]) AS asked (queue) CROSS JOIN LATERAL (
    WITH RECURSIVE first AS (
        (
            SELECT task, priority, run_at FROM viralfx_jobs AS job
            WHERE state = 'waiting' AND job.queue = asked.queue
            ORDER BY task, priority DESC, run_at, id LIMIT 1
        )
        UNION ALL
        SELECT following.task, following.priority, following.run_at
        FROM first CROSS JOIN LATERAL (
            (
                SELECT job.task, job.priority, job.run_at FROM viralfx_jobs AS job
                WHERE state = 'waiting' AND job.queue = asked.queue AND job.task = first.task
                    AND job.priority < first.priority
                ORDER BY job.priority DESC, job.run_at, job.id LIMIT 1
            )
            UNION ALL
            (
                SELECT job.task, job.priority, job.run_at FROM viralfx_jobs AS job
                WHERE state = 'waiting' AND job.queue = asked.queue AND job.task > first.task
                ORDER BY job.task, job.priority DESC, job.run_at, job.id LIMIT 1
            )
            LIMIT 1
        ) AS following
    )
    SELECT min(run_at) AS run_at FROM first WHERE $2::text[] IS NULL OR task = ANY($2)
) AS waiting
WHERE run_at <= statement_timestamp() + make_interval(secs => $3)
    AND queue NOT IN (SELECT paused.queue FROM viralfx_paused_queues AS paused)
"""

PAUSE: Final = """
INSERT INTO viralfx_paused_queues (queue, paused_at) VALUES ($1, statement_timestamp())
ON CONFLICT DO NOTHING
"""
RESUME: Final = """
WITH resumed AS (
    DELETE FROM viralfx_paused_queues WHERE queue = $1
)
SELECT id FROM viralfx_jobs
WHERE state = 'waiting' AND claims >= 0 AND queue = $1 AND run_at <= statement_timestamp()
ORDER BY priority DESC, run_at, id LIMIT $2
"""
# Without waiting for rows: claims lock several of them, in an order of their own.
FORGET_LIMITS: Final = """
DELETE FROM viralfx_task_limits WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM viralfx_task_limits
    WHERE expires_at < statement_timestamp() - interval '1 minute' AND last_key IS NULL
    LIMIT $1 FOR UPDATE SKIP LOCKED
))
"""

_NO_WORKER = """NOT EXISTS (
        SELECT FROM viralfx_workers AS living
        WHERE lease_until > statement_timestamp() AND {queue} = ANY(queues)
            AND (tasks IS NULL OR {task} = ANY(tasks)) {more}
    )"""
# A queue that no worker consumes tells nothing about its tasks: their jobs wait for a worker.
_UNKNOWN_TO_WORKERS = f"""EXISTS (
        SELECT FROM viralfx_workers AS consumer
        WHERE lease_until > statement_timestamp() AND {{queue}} = ANY(queues)
    ) AND {_NO_WORKER.replace("{more}", "")}"""
# Skips from queue to queue, from task to task and from priority to priority in the index.
_UNKNOWN = f"""
RECURSIVE first AS (
    (
        SELECT queue, task, priority, run_at FROM viralfx_jobs WHERE state = 'waiting'
        ORDER BY queue, task, priority DESC, run_at, id LIMIT 1
    )
    UNION ALL
    SELECT following.queue, following.task, following.priority, following.run_at
    FROM first CROSS JOIN LATERAL (
        (
            SELECT job.queue, job.task, job.priority, job.run_at FROM viralfx_jobs AS job
            WHERE state = 'waiting' AND job.queue = first.queue AND job.task = first.task
                AND job.priority < first.priority
            ORDER BY job.priority DESC, job.run_at, job.id LIMIT 1
        )
        UNION ALL
        (
            SELECT job.queue, job.task, job.priority, job.run_at FROM viralfx_jobs AS job
            WHERE state = 'waiting' AND (job.queue, job.task) > (first.queue, first.task)
            ORDER BY job.queue, job.task, job.priority DESC, job.run_at, job.id LIMIT 1
        )
        LIMIT 1
    ) AS following
), unknown AS MATERIALIZED (
    SELECT DISTINCT queue, task FROM first
    WHERE run_at <= statement_timestamp()
        AND {_UNKNOWN_TO_WORKERS.format(queue="first.queue", task="first.task")}
)
"""  # noqa: S608 - constants
# True of a job that each worker which knows its task has refused; there is such a worker.
_UNDECODABLE = f"""
refused_by IS NOT NULL AND NOT {_NO_WORKER.format(queue="job.queue", task="job.task", more="")}
    AND {
    _NO_WORKER.format(queue="job.queue", task="job.task", more="AND worker <> ALL(job.refused_by)")
}"""
UNRUNNABLE: Final = f"""
WITH {_UNKNOWN}
SELECT queue, task, '{UNKNOWN_TASK}' AS code, (
    SELECT count(*) FROM (
        SELECT FROM viralfx_jobs AS job
        WHERE state = 'waiting' AND job.run_at <= statement_timestamp()
            AND (job.queue, job.task) >= (unknown.queue, unknown.task)
            AND (job.queue, job.task) <= (unknown.queue, unknown.task)
        ORDER BY job.queue, job.task, job.priority DESC, job.run_at, job.id LIMIT $1
    ) AS counted
) AS jobs
FROM unknown
UNION ALL
SELECT queue, task, '{PAYLOAD}', count(*) FROM (
    SELECT queue, task FROM viralfx_jobs AS job
    WHERE state = 'waiting' AND run_at <= statement_timestamp() AND {_UNDECODABLE}
    LIMIT $1
) AS undecodable GROUP BY queue, task
ORDER BY queue, task
"""  # noqa: S608 - constants
_IN_TIME = "($2::timestamptz IS NULL OR statement_timestamp() < $2)"
# Time counts only while it is watched: after a gap of half the patience, in which no worker was
# alive, it begins anew. So it does once no worker consumes the queue.
WATCH_UNKNOWN: Final = f"""
WITH {_UNKNOWN}, known AS (
    DELETE FROM viralfx_unknown_tasks AS old
    WHERE {_IN_TIME} AND NOT EXISTS (
        SELECT FROM unknown WHERE unknown.queue = old.queue AND unknown.task = old.task
    )
)
INSERT INTO viralfx_unknown_tasks AS old (queue, task, since, seen_at)
SELECT queue, task, statement_timestamp(), statement_timestamp() FROM unknown WHERE {_IN_TIME}
ON CONFLICT (queue, task) DO UPDATE
SET seen_at = excluded.seen_at,
    since = CASE
        WHEN old.seen_at < statement_timestamp() - make_interval(secs => $1::float8 / 2)
        THEN excluded.since ELSE old.since
    END
RETURNING queue, task, since <= statement_timestamp() - make_interval(secs => $1::float8) AS expired
"""  # noqa: S608 - constants
_EXPIRE = """
UPDATE viralfx_jobs
SET state = 'failed', finished_at = statement_timestamp(), {error}
WHERE id = ANY(ARRAY(
    SELECT id FROM viralfx_jobs AS job
    WHERE state = 'waiting' AND run_at <= statement_timestamp() - make_interval(secs => $1::float8)
        AND {expired}
    LIMIT 1000
    FOR UPDATE SKIP LOCKED
))
RETURNING id
"""
EXPIRE_TASK: Final = _EXPIRE.format(
    error="error_code = 'unknown_task', error_message = $4",
    expired=f"queue = $2 AND task = $3 AND {_UNKNOWN_TO_WORKERS.format(queue='$2', task='$3')}",
)
EXPIRE_PAYLOADS: Final = _EXPIRE.format(
    error="error_code = 'payload'",
    expired=f"{_IN_TIME} AND {_UNDECODABLE}",
)


async def expire(
    connection: Lease, sql: Statements, patience: float, before: datetime | None
) -> Mapping[str, Sequence[str]]:
    """Fail jobs that no worker could run; see :meth:`JobLedger.expire`."""
    failed: dict[str, list[str]] = {UNKNOWN_TASK: [], PAYLOAD: []}
    for row in await fetched_by_index(connection, sql.WATCH_UNKNOWN, patience, before):
        if row["expired"]:
            queue, task = row["queue"], row["task"]
            message = unknown_message(task, patience)
            rows = await connection.fetch(sql.EXPIRE_TASK, patience, queue, task, message)
            failed[UNKNOWN_TASK] += [str(each["id"]) for each in rows]
    rows = await connection.fetch(sql.EXPIRE_PAYLOADS, patience, before)
    failed[PAYLOAD] += [str(each["id"]) for each in rows]
    return {code: ids for code, ids in failed.items() if ids}


async def unrunnable(connection: Lease, sql: Statements) -> Sequence[UnrunnableJobs]:
    """Count the due jobs that no worker can run; see :meth:`JobLedger.unrunnable`."""
    rows = await fetched_by_index(connection, sql.UNRUNNABLE, MAX_UNRUNNABLE)
    return [UnrunnableJobs(row["queue"], row["task"], row["code"], row["jobs"]) for row in rows]


SLOW_CLAIM_SECONDS = 0.02
"""A claim that takes longer may have passed over thousands of jobs of other tasks."""
IN_ORDER_SECONDS = 0.25
"""How long a worker with limited tasks claims in order before it checks which tasks wait."""

_CLOSE_SECONDS = 0.5

_rng = default_rng()


@dataclass(frozen=True, slots=True)
class Wanted:
    """The jobs that a worker wants; see :meth:`JobLedger.claim`."""

    queue: str
    worker: str
    limit: int
    tasks: Collection[str] | None
    ids: Collection[str] | None
    limits: Mapping[str, Limit]

    @property
    def unlimited(self) -> list[str] | None:
        """The names of its tasks without limits; None: every task."""
        if self.tasks is None:
            return [] if self.limits else None
        return [name for name in self.tasks if name not in self.limits]

    @property
    def limit_columns(self) -> tuple[list[Any], ...]:
        """The arguments of ``CLAIM`` that describe the limits."""
        limits = self.limits.values()
        return (
            list(self.limits),
            [each.concurrency for each in limits],
            [None if each.rate is None else each.rate.count for each in limits],
            [None if each.rate is None else each.rate.period for each in limits],
            [each.keyed for each in limits],
        )


class Claimer:
    """Claims due jobs of known tasks, in two ways.

    Usually a claim takes the jobs of a queue in order, and passes over jobs of other tasks one by
    one. A backlog of those would be read by each claim, and it keeps no limits. Therefore, before
    the first claim and after one that was slow or failed, a claim looks which tasks wait in the
    queue. As long as jobs of unknown or limited tasks do, each claim goes from task to task, over
    an index by task, and keeps the limits.

    A worker with limited tasks claims in order only while claims fill all of its free slots, and
    looks at the end of each such series: jobs of limited tasks may have arrived meanwhile.
    """

    def __init__(self, sql: Statements, clock: Clock) -> None:
        self._sql = sql
        self._clock = clock
        self._in_order: dict[str, float] = {}
        """Queues whose next claim takes the jobs in order, and when a claim looked last."""

    async def claim(
        self, connection: Lease, wanted: Wanted, receipts: list[int]
    ) -> tuple[Sequence[Row], float]:
        """Return rows of jobs, and the seconds after which the limits may allow more.

        Adds the receipt of each statement to ``receipts`` before it is sent.
        """
        if wanted.ids is not None:
            tasks = wanted.unlimited
            these = self._sql.CLAIM_THESE
            rows = await _send(connection, these, wanted, receipts, tasks, wanted.ids)
            return rows, math.inf
        began = self._clock.monotonic()
        looked_at = self._in_order.pop(wanted.queue, None)
        fresh = looked_at is not None and began - looked_at < IN_ORDER_SECONDS
        in_order = fresh if wanted.limits else looked_at is not None or wanted.tasks is None
        rows, last = await self._claim(connection, wanted, receipts, in_order=in_order)
        if in_order and wanted.limits and last is not None and len(rows) < wanted.limit:
            in_order, rest = False, replace(wanted, limit=wanted.limit - len(rows))
            more, last = await self._claim(connection, rest, receipts, in_order=False)
            rows = [*rows, *more]
        if last is None:  # the queue is paused
            return rows, math.inf
        now = self._clock.monotonic()
        full = len(rows) == wanted.limit or not wanted.limits
        if in_order:
            if looked_at is not None and full and now - began < SLOW_CLAIM_SECONDS:
                self._in_order[wanted.queue] = looked_at
        elif full and not last["mixed"]:
            self._in_order[wanted.queue] = now
        return rows, math.inf if last["again_in"] is None else last["again_in"]

    async def _claim(
        self, connection: Lease, wanted: Wanted, receipts: list[int], *, in_order: bool
    ) -> tuple[Sequence[Row], Row | None]:
        """Return rows of jobs, and the row about the claim; None for a paused queue."""
        known = wanted.unlimited if in_order else wanted.tasks
        arguments = None if known is None else list(known), in_order, *wanted.limit_columns
        send = partial(_send, connection, self._sql.CLAIM, wanted, receipts)
        try:
            rows = await send(*arguments)
        except asyncpg.FeatureNotSupportedError:
            # Another isolation level is the default of this database or user.
            async with connection.transaction(isolation="read_committed"):
                rows = await send(*arguments)
        return (rows[:-1], rows[-1]) if rows else (rows, None)


async def _send(
    connection: Lease, statement: str, wanted: Wanted, receipts: list[int], *more: Any
) -> Sequence[Row]:
    receipts.append(_rng.getrandbits(63))
    rows: Sequence[Row] = await connection.fetch(
        statement, wanted.queue, wanted.worker, wanted.limit, receipts[-1], *more
    )
    return rows


async def register(
    steps: RetriedSteps,
    sql: Statements,
    worker: str,
    queues: Collection[str],
    lease: float,
    *,
    holding: Collection[str] | None,
    tasks: Collection[str] | None,
    eligible: bool,
    grace: float | None,
) -> Registration:
    """Register a worker, or renew its lease; see :class:`JobLedger`."""
    known = None if tasks is None else sorted(set(tasks))
    mine = worker, sorted(set(queues)), interval(lease), known, eligible
    renew = partial(_fetched, steps, sql.REGISTER, *mine)
    if holding is None:
        return await renew()
    released = identifiers(holding), interval(lease if grace is None else grace)
    try:
        return await _fetched(steps, sql.REGISTER_HOLDING, *mine, *released)
    except (*BAD_VALUE, LedgerUnavailableError) as error:
        if (refused := refusal(error)) is None:
            raise
        # A job that may not be released must not end the lease of the others.
        _logger.exception("Release of jobs refused by the ledger", extra={"code": refused.code})
        return await renew()


async def _fetched(steps: RetriedSteps, statement: str, *arguments: object) -> Registration:
    rows = await steps.run(lambda attempt: attempt.connection.fetch(statement, *arguments))
    return Registration(**rows[0])


class PostgresLeaseStore:
    """Renews leases over a connection of its own; see :class:`LeaseStore` for the contract.

    It shares only settings with the pool, so neither a busy pool nor a blocked event loop delays a
    renewal.
    """

    def __init__(self, database: PostgresDatabase, *, timeout: float = 8.0) -> None:
        """Prepare it; nothing is connected before the first call.

        ``timeout``: seconds for a call.
        """
        self._connector = database.connector
        self._connection = DedicatedConnection(self._connect, database.config.settings.max_lifetime)
        steps = RetriedSteps(
            self._connection.acquire,
            timeout=timeout,
            clock=SystemClock(),
            listener=database.retries,
        )
        sql = Statements(database.config.settings.schema, ledger_sql)
        self._register = partial(register, steps, sql)

    async def _connect(self) -> "Connection[Any]":
        # Not through the database: its listeners belong to the event loop of the pool.
        return await self._connector.connect(purpose="heartbeat")

    async def register(
        self,
        worker: str,
        queues: Collection[str],
        lease: float,
        holding: Collection[str] | None = None,
        *,
        tasks: Collection[str] | None = None,
        eligible: bool = True,
        grace: float | None = None,
    ) -> Registration:
        """See :class:`LeaseStore`."""
        return await self._register(
            worker, queues, lease, holding=holding, tasks=tasks, eligible=eligible, grace=grace
        )

    async def close(self) -> None:
        """See :class:`LeaseStore`."""
        await self._connection.close(_CLOSE_SECONDS)
