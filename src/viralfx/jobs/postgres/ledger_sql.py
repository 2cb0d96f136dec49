"""The SQL of the job ledger.

Each statement is one round trip and its own transaction. Its time is the time at which the server
received it. Each has parameters, so that it is planned anew for each execution.

A job that completes or is cancelled moves from ``viralfx_jobs`` to ``viralfx_finished_jobs``, so
that finished jobs do not slow down the others; ``viralfx_all_jobs`` is a view of both. Within the
ledger, a waiting job that is due later than ``SOON_SECONDS`` has the state ``scheduled``.
"""

from typing import Final

from viralfx.jobs.model import MAX_HISTORY, MAX_TRACEBACKS

SOON_SECONDS: Final = 60
"""A waiting job that is due later than this is scheduled until the sweep finds it due within this
time; longer than an outage of the sweep after which another worker takes over."""
PROMOTED_AT_ONCE: Final = 2000
"""Jobs that one statement promotes."""
MAX_SWEPT_JOBS: Final = 5000
"""Jobs that one sweep takes; the next one takes further ones."""
_SWEEP_LOCK: Final = f"{int.from_bytes(b'vfxsweep')} # 'viralfx_workers'::regclass::oid::bigint"
"""The key of an advisory lock; the ledgers of several schemas have different ones."""

JOB_TIMES: Final = ("created_at", "run_at", "asked_run_at", "started_at", "finished_at")
JOB: Final = """
    id, queue, task, state, payload, key, correlation_id, traceparent, user_id, priority,
    concurrency_key, created_at, run_at, asked_run_at, started_at, finished_at, attempts, crashes,
    claims, worker, result, error_code, error_message, history, progress, cancel_requested,
    max_attempts
"""


def _as_text(columns: str) -> str:
    """Return columns for a connection of an application, whose codecs may differ.

    Times are in the form of JSON, with any ``DateStyle`` of the connection.
    """
    texts = dict.fromkeys(("payload", "result", "history", "progress"), "{0}::text")
    times = dict.fromkeys(JOB_TIMES, "pg_catalog.to_json({0}) #>> '{{}}' AS {0}")
    names = [name.strip() for name in columns.split(",")]
    return ", ".join((texts | times).get(name, "{0}").format(name) for name in names)


# Returns the new jobs; see the function for the others. $16 limits the wait for locks; null: as the
# transaction does. It is set with the arguments, and so before the function begins.
ACCEPT: Final = f"""
SELECT {_as_text("id, created_at, run_at")} FROM viralfx_accept_jobs(
    $1::uuid[], $2::text[], $3::text[], $4::json[], $5::text[], $6::text[], $7::text[],
    $8::timestamptz[], CASE WHEN pg_catalog.set_config(
        'lock_timeout', coalesce($16::text, pg_catalog.current_setting('lock_timeout')), true
    ) IS NOT NULL THEN $15::float8 END,
    $9::integer[], $10::text[], $11::boolean[], $12::text[], $13::text[], $14::integer[]
)
"""  # noqa: S608 - constants

# The condition of the index of unique jobs: no other one may have the key of such a job.
_UNIQUE = """
unique_key IS NOT NULL AND state <> 'failed' AND NOT cancel_requested
    AND (claims = 0 OR NOT unique_while_waiting)
"""
# Another transaction may have accepted these jobs a moment ago, and with synchronous replication
# they may be on no standby yet. The row of a counter makes the commit wait until they are.
ACCEPTED_BEFORE: Final = f"""
WITH duplicates AS MATERIALIZED (
    SELECT id, unique_key FROM viralfx_jobs WHERE unique_key = ANY($3::text[]) AND {_UNIQUE}
), found AS MATERIALIZED (
    SELECT {JOB} FROM viralfx_all_jobs
    WHERE id = ANY($1::uuid[] || ARRAY(SELECT id FROM duplicates))
    UNION ALL
    SELECT {JOB} FROM viralfx_all_jobs
    WHERE key IS NOT NULL AND key = ANY($2::text[]) AND id <> ALL($1::uuid[])
), awaited AS (
    INSERT INTO viralfx_job_counters (queue, state, count)
    SELECT queue, 'waiting', 0 FROM found LIMIT 1
)
SELECT {_as_text(JOB)}, unique_key FROM found LEFT JOIN duplicates USING (id)
"""  # noqa: S608 - constants

MOVED: Final = """
    id, queue, task, payload, key, correlation_id, traceparent, user_id, priority, concurrency_key,
    created_at, run_at, asked_run_at, started_at, crashes, claims, history, progress, max_attempts,
    finished_at, state, attempts, result, error_code, error_message
"""
KEPT: Final = """
    job.id, job.queue, job.task, job.payload, job.key, job.correlation_id, job.traceparent,
    job.user_id, job.priority, job.concurrency_key, job.created_at, job.run_at, job.asked_run_at,
    job.started_at, job.crashes, job.claims, job.history, job.progress, job.max_attempts,
    statement_timestamp()
"""
# If the parameter is true, the statement ends soon because of a job that another session locks. One
# row of FROM, so that it is evaluated before the first job is changed.
_LOCK_LIMIT = """
CROSS JOIN set_config(
    'lock_timeout',
    CASE WHEN {0}::boolean THEN '200ms' ELSE current_setting('lock_timeout') END,
    true
) AS lock_limit
"""
_GIVEN = f"""
unnest(
    $1::uuid[], $2::integer[], $3::text[], $4::json[], $5::text[], $6::text[], $7::float8[],
    $8::integer[], $9::boolean[], $10::text[], $11::json[]
) AS given (
    id, number, state, result, code, message, delay, spent, is_error, traceback, progress
)
{_LOCK_LIMIT.format("$12")}
"""
# Most settlements only complete jobs, and need less.
_GIVEN_RESULTS = f"""
unnest($1::uuid[], $2::integer[], $3::json[]) AS given (id, number, result)
{_LOCK_LIMIT.format("$4")}
"""
# In a statement of its own, since a settlement that locked all rows first would cost more.
UNLOCKED: Final = """
SELECT id::text FROM viralfx_jobs WHERE id = ANY($1::uuid[]) AND state = 'active'
FOR UPDATE SKIP LOCKED
"""
ACTIVE: Final = """
SELECT id::text, claims FROM viralfx_jobs WHERE id = ANY($1::uuid[]) AND state = 'active'
"""
# The planner has no statistics for a CASE. With a plain condition it might assume that there are no
# active jobs, as in its last statistics, and compare each active job with each given one.
_HELD = """
job.id = given.id
    AND CASE WHEN job.state = 'active' THEN job.claims = given.number ELSE false END
"""
_COMPLETE = f"""
taken AS (
    DELETE FROM viralfx_jobs AS job
    USING {{given}}
    WHERE {_HELD} {{condition}}
    RETURNING {{kept}}, 'completed', job.attempts, given.result, NULL, NULL
), moved AS (
    INSERT INTO viralfx_finished_jobs ({MOVED}) SELECT * FROM taken RETURNING id
)
"""  # noqa: S608 - constants
_KEPT_WITH_REPORT = KEPT.replace("job.progress", "coalesce(given.progress, job.progress)")


def appended(code: str, message: str, traceback: str = "NULL") -> str:
    """Return the history of ``job`` with one more execution; without a code it does not change."""
    return f"""
    CASE WHEN {code} IS NULL THEN job.history ELSE
        jsonb_set(
            CASE
                WHEN jsonb_array_length(job.history) >= {MAX_HISTORY} THEN job.history - 0
                ELSE coalesce(job.history, '[]')
            END,
            array['-{MAX_TRACEBACKS}', 'traceback'], 'null', false
        ) || jsonb_build_object(
            'number', job.claims, 'worker', job.worker, 'started_at', job.started_at,
            'ended_at', statement_timestamp(), 'code', {code}::text, 'message', {message}::text,
            'traceback', {traceback}::text
        )
    END
    """


# A job whose cancellation was requested does not wait again. It stays active, without a worker, so
# that no claim takes it, until FINISH_CANCELLED moves it. With a condition on cancel_requested two
# statements would be needed, and a request between them would be lost.
RELEASED = "CASE WHEN cancel_requested THEN 'active' ELSE 'waiting' END"
_UPDATE = f"""
updated AS (
    UPDATE viralfx_jobs AS job
    SET state = CASE
            WHEN job.cancel_requested OR given.state = 'cancelled' THEN 'active'
            WHEN given.state = 'waiting' AND given.delay > {SOON_SECONDS} THEN 'scheduled'
            ELSE given.state
        END,
        cancel_requested = job.cancel_requested OR given.state = 'cancelled',
        worker = NULL,
        result = given.result,
        error_code = CASE WHEN given.is_error THEN given.code ELSE job.error_code END,
        error_message = CASE WHEN given.is_error THEN given.message ELSE job.error_message END,
        attempts = attempts + given.spent,
        refused_by = CASE
            WHEN given.state = 'waiting' AND given.code = 'payload'
            THEN array_append(job.refused_by, job.worker) ELSE job.refused_by
        END,
        run_at = CASE
            WHEN given.delay IS NULL OR job.cancel_requested
                OR (given.code = 'payload' AND job.refused_by IS NOT NULL)
            THEN job.run_at
            ELSE statement_timestamp() + make_interval(secs => given.delay)
        END,
        finished_at = CASE
            WHEN given.state = 'failed' AND NOT job.cancel_requested THEN statement_timestamp()
        END,
        history = {appended("given.code", "given.message", "given.traceback")},
        progress = coalesce(given.progress, job.progress)
    FROM {_GIVEN}
    WHERE {_HELD} AND given.state <> 'completed'
        AND NOT (job.cancel_requested AND job.worker IS NULL)
    RETURNING job.id, job.cancel_requested
)
"""  # noqa: S608 - constants
SETTLE_COMPLETED: Final = f"""
WITH {_COMPLETE.format(given=_GIVEN_RESULTS, condition="", kept=KEPT)}
SELECT id::text FROM moved
"""  # noqa: S608 - constants
SETTLE_ALL: Final = f"""
WITH {
    _COMPLETE.format(
        given=_GIVEN, condition="AND given.state = 'completed'", kept=_KEPT_WITH_REPORT
    )
}, {_UPDATE}
SELECT id, false AS cancel_requested FROM moved
UNION ALL
SELECT id, cancel_requested FROM updated
"""  # noqa: S608 - constants
SETTLE_OTHERS: Final = f"WITH {_UPDATE} SELECT id, cancel_requested FROM updated"  # noqa: S608 - constants
# A worker of the previous version hands such a job back as waiting.
_ENDING = "cancel_requested AND worker IS NULL AND state <> 'failed'"
# The second parameter is some of the jobs; NULL: any.
FINISH_CANCELLED: Final = f"""
WITH taken AS (
    DELETE FROM viralfx_jobs AS job WHERE id = ANY(ARRAY(
        SELECT id FROM viralfx_jobs
        WHERE {_ENDING} AND ($2::uuid[] IS NULL OR id = ANY($2))
        LIMIT $1
        FOR UPDATE SKIP LOCKED
    ))
    RETURNING {KEPT}, 'cancelled', attempts, result, error_code, error_message
), moved AS (
    INSERT INTO viralfx_finished_jobs ({MOVED}) SELECT * FROM taken RETURNING id
)
SELECT id FROM moved
"""  # noqa: S608 - constants
# In the order of ids, up to $1 after $2; NULL: the first ones. With a plain ORDER BY and LIMIT, the
# planner might look through all jobs by id.
_LISTED = """
WITH listed AS MATERIALIZED (SELECT id FROM viralfx_jobs WHERE {0})
SELECT id FROM listed WHERE $2::uuid IS NULL OR id > $2 ORDER BY id LIMIT $1
"""
ENDING: Final = _LISTED.format(_ENDING)
SETTLED_BEFORE: Final = """
SELECT job.id
FROM viralfx_all_jobs AS job
JOIN unnest($1::uuid[], $2::integer[], $3::text[], $4::integer[], $5::integer[])
    AS given (id, number, state, attempts, crashes) ON job.id = given.id
WHERE job.id = ANY($1::uuid[]) AND job.claims = given.number
    AND job.attempts = given.attempts AND job.crashes = given.crashes
    AND (
        job.state = given.state
        OR (given.state <> 'completed' AND (
            job.state = 'cancelled' OR (job.cancel_requested AND job.worker IS NULL)
        ))
    )
"""

HELD: Final = """
SELECT current_setting('transaction_isolation')
FROM viralfx_jobs WHERE id = $1 AND state = 'active' AND claims = $2
"""
# Between this and COMMIT the transaction locks the job's row; the timeout releases it if the client
# is disconnected in between.
SETTLE_AND_COMMIT: Final = f"""
WITH {
    _COMPLETE.format(
        given='''
unnest($1::uuid[], $2::integer[], $3::json[], $4::json[]) AS given (id, number, result, progress)
''',
        condition="",
        kept=_KEPT_WITH_REPORT,
    )
}
SELECT id, set_config('idle_in_transaction_session_timeout', '10s', true) FROM moved
"""  # noqa: S608 - constants
# Waits until a transaction that completes the job has ended.
AWAIT_CHANGE: Final = "SELECT FROM viralfx_jobs WHERE id = $1 FOR UPDATE"
COMPLETED_BY: Final = """
SELECT true FROM viralfx_finished_jobs WHERE id = $1 AND claims = $2 AND state = 'completed'
"""

REGISTER: Final = """
INSERT INTO viralfx_workers AS mine (worker, queues, lease_until, tasks, eligible)
VALUES ($1, $2, statement_timestamp() + make_interval(secs => $3), $4, $5)
ON CONFLICT (worker) DO UPDATE
SET queues = excluded.queues, lease_until = excluded.lease_until, tasks = excluded.tasks,
    eligible = excluded.eligible
RETURNING lease_until,
    1 + (
        SELECT count(*) FROM viralfx_workers AS other
        WHERE other.worker <> mine.worker AND other.lease_until > statement_timestamp()
            AND other.queues && mine.queues
    ) AS workers,
    mine.eligible AND NOT EXISTS (
        SELECT FROM viralfx_workers AS other
        WHERE other.worker COLLATE "C" < mine.worker COLLATE "C" AND other.eligible
            AND other.lease_until > statement_timestamp()
    ) AS leader,
    coalesce((
        SELECT extract(epoch FROM other.lease_until - statement_timestamp())::float8
        FROM viralfx_workers AS other
        WHERE other.worker <> mine.worker AND other.eligible
            AND other.lease_until > statement_timestamp()
        ORDER BY other.worker COLLATE "C" LIMIT 1
    ), 'infinity') AS leader_for
"""
# With a grace, excludes jobs that were claimed a moment ago: their response may be in flight.
REGISTER_HOLDING: Final = f"""
WITH lost AS (
    UPDATE viralfx_jobs SET state = {RELEASED}, worker = NULL WHERE id = ANY(ARRAY(
        SELECT id FROM viralfx_jobs
        WHERE state = 'active' AND worker = $1 AND id <> ALL($6::uuid[])
            AND ($7::float8 <= 0 OR started_at < statement_timestamp() - make_interval(secs => $7))
        FOR UPDATE SKIP LOCKED
    ))
)
{REGISTER}
"""  # noqa: S608 - constants

_FOLDED = """
folded AS (
    DELETE FROM viralfx_job_counters
    WHERE ctid = ANY(ARRAY(
        SELECT ctid FROM viralfx_job_counters
        WHERE (SELECT count(*) FROM viralfx_job_counters) > {most}
        FOR UPDATE SKIP LOCKED
    ))
    RETURNING queue, state, count
)
"""
_SUMS = """
INSERT INTO viralfx_job_counters (queue, state, count)
SELECT queue, state, sum(count) FROM folded GROUP BY queue, state
"""
FOLD: Final = f"WITH {_FOLDED.format(most='$1')} {_SUMS}"

_LOST = """
state = 'active' AND coalesce(worker, '') NOT IN (
        SELECT living.worker FROM viralfx_workers AS living
        WHERE lease_until > statement_timestamp()
    ) AND NOT (cancel_requested AND worker IS NULL)
"""
# A server that hung receives the statement late; after $2 the sweep must not happen. Of two sweeps
# at once, one does nothing but fold the counters. The last row, without an id, stands for jobs that
# FINISH_CANCELLED has to move, such as those that a blocked worker released. Without any, a sweep
# does not cost that statement.
SWEEP: Final = f"""
WITH {_FOLDED.format(most="$3")}, sums AS ({_SUMS}), turn AS MATERIALIZED (
    SELECT pg_try_advisory_xact_lock({_SWEEP_LOCK})
        AND ($2::timestamptz IS NULL OR statement_timestamp() < $2) AS mine
), gone AS (
    DELETE FROM viralfx_workers WHERE worker IN (
        SELECT worker FROM viralfx_workers
        WHERE lease_until <= statement_timestamp() AND (SELECT mine FROM turn)
        FOR UPDATE SKIP LOCKED
    )
), lost AS MATERIALIZED (
    SELECT id FROM viralfx_jobs AS job
    WHERE {_LOST} AND (SELECT mine FROM turn) AND ($4::uuid[] IS NULL OR id = ANY($4))
    LIMIT {MAX_SWEPT_JOBS}
    FOR UPDATE OF job SKIP LOCKED
), swept AS (
    UPDATE viralfx_jobs AS job
    SET worker = NULL,
        crashes = crashes + 1,
        state = CASE
            WHEN cancel_requested THEN 'active'
            WHEN crashes + 1 >= $1 THEN 'failed'
            ELSE 'waiting'
        END,
        history = {appended("'crashed'", "format('the lease of worker %s ran out', job.worker)")},
        finished_at = CASE
            WHEN crashes + 1 >= $1 AND NOT cancel_requested THEN statement_timestamp()
        END,
        error_code = CASE
            WHEN crashes + 1 >= $1 AND NOT cancel_requested THEN 'crashed' ELSE error_code
        END,
        error_message = CASE
            WHEN crashes + 1 >= $1 AND NOT cancel_requested
            THEN format(
                'the lease of %s %s ran out while they ran it; the last was %s', crashes + 1,
                CASE crashes WHEN 0 THEN 'worker' ELSE 'workers' END, worker
            )
            ELSE error_message
        END
    WHERE id = ANY(ARRAY(SELECT id FROM lost))
    RETURNING id, queue, state
)
SELECT id, queue, state FROM swept
UNION ALL
SELECT NULL, NULL, 'active' WHERE EXISTS (SELECT FROM viralfx_jobs WHERE {_ENDING})
"""  # noqa: S608 - constants
LOST: Final = _LISTED.format(_LOST)

_SOON = "state = 'scheduled' AND run_at <= statement_timestamp() + make_interval(secs => $1)"
# Their due time is near; those that are due come first. $3: some of them; NULL: any.
PROMOTE: Final = f"""
UPDATE viralfx_jobs SET state = 'waiting' WHERE id = ANY(ARRAY(
    SELECT id FROM viralfx_jobs
    WHERE {_SOON} AND ($3::uuid[] IS NULL OR id = ANY($3))
    ORDER BY run_at
    LIMIT $2
    FOR UPDATE SKIP LOCKED
))
RETURNING id
"""  # noqa: S608 - constants
# In the same order, after $3; NULL: the first ones.
SOON: Final = f"""
SELECT id FROM viralfx_jobs
WHERE {_SOON} AND (
    $3::uuid IS NULL OR (run_at, id) > (SELECT run_at, id FROM viralfx_jobs WHERE id = $3)
)
ORDER BY run_at, id LIMIT $2
"""  # noqa: S608 - constants

GET: Final = f"SELECT {JOB} FROM viralfx_all_jobs WHERE id = $1"  # noqa: S608 - constants

# Reads the index of waiting jobs from the ends of each priority: the first job, and those that are
# due soon. The parameter is always 'waiting'. A statement without parameters would keep its first
# plan, made while the tables were small.
COUNTS: Final = """
WITH counted AS MATERIALIZED (
    SELECT queue, count(*) AS counters,
        coalesce(sum(count) FILTER (WHERE state = 'waiting'), 0) AS waiting,
        coalesce(sum(count) FILTER (WHERE state = 'scheduled'), 0) AS scheduled,
        coalesce(sum(count) FILTER (WHERE state = 'active'), 0) AS active,
        coalesce(sum(count) FILTER (WHERE state = 'completed'), 0) AS completed,
        coalesce(sum(count) FILTER (WHERE state = 'failed'), 0) AS failed,
        coalesce(sum(count) FILTER (WHERE state = 'cancelled'), 0) AS cancelled
    FROM viralfx_job_counters GROUP BY queue
), overdue AS MATERIALIZED (
    SELECT queue, count(*) AS overdue, min(run_at) AS run_at
    FROM viralfx_jobs
    WHERE state = 'scheduled' AND run_at <= statement_timestamp() GROUP BY queue
)
SELECT queue,
    sum(waiting) AS waiting, sum(scheduled) AS scheduled, sum(active) AS active,
    sum(completed) AS completed, sum(failed) AS failed, sum(cancelled) AS cancelled,
    greatest(extract(epoch FROM statement_timestamp() - min(run_at)), 0) AS oldest_due,
    sum(consumers) AS consumers, sum(counters) AS counters, sum(overdue) AS overdue,
    sum(blocked) AS blocked, sum(paused) > 0 AS paused
FROM (
    SELECT counted.queue, waiting - soon.count AS waiting, scheduled + soon.count AS scheduled,
        active, completed, failed, cancelled, soon.run_at, 0 AS consumers, counters, 0 AS overdue,
        0 AS blocked, 0 AS paused
    FROM counted
    CROSS JOIN LATERAL (
        WITH RECURSIVE levels AS (
            (
                SELECT job.priority, job.run_at FROM viralfx_jobs AS job
                WHERE job.state = $1 AND job.claims >= 0 AND job.queue = counted.queue
                ORDER BY job.priority DESC, job.run_at, job.id LIMIT 1
            )
            UNION ALL
            SELECT lower.priority, lower.run_at FROM levels CROSS JOIN LATERAL (
                SELECT job.priority, job.run_at FROM viralfx_jobs AS job
                WHERE job.state = $1 AND job.claims >= 0 AND job.queue = counted.queue
                    AND job.priority < levels.priority
                ORDER BY job.priority DESC, job.run_at, job.id LIMIT 1
            ) AS lower
        )
        SELECT min(levels.run_at) AS run_at, coalesce(sum(later.count), 0) AS count
        FROM levels CROSS JOIN LATERAL (
            SELECT count(*) FROM (
                SELECT FROM viralfx_jobs AS job
                WHERE job.state = $1 AND job.claims >= 0 AND job.queue = counted.queue
                    AND job.priority = levels.priority AND job.run_at > statement_timestamp()
                -- Selects the index by due time.
                ORDER BY job.run_at, job.id
            ) AS later
        ) AS later
    ) AS soon
    UNION ALL
    SELECT queue, overdue, -overdue, 0, 0, 0, 0, run_at, 0, 0, overdue, 0, 0 FROM overdue
    UNION ALL
    SELECT queue, 0, 0, 0, 0, 0, 0, NULL, count(*), 0, 0,
        count(*) FILTER (WHERE NOT eligible), 0
    FROM viralfx_workers, unnest(queues) AS queue
    WHERE lease_until > statement_timestamp() GROUP BY queue
    UNION ALL
    SELECT queue, 0, 0, 0, 0, 0, 0, NULL, 0, 0, 0, 0, 1 FROM viralfx_paused_queues
) AS parts
GROUP BY queue
"""

# By the place of the locked rows: a search by id in a large index would take longer than the rest.
# From $3 on: until a vacuum the index keeps the rows of earlier batches, and a scan from its begin
# reads over all of them. So does the planner for a bound that it can evaluate: hence the subquery.
_PRUNE = """
WITH pruned AS (
    DELETE FROM {table} WHERE ctid = ANY(ARRAY(
        SELECT ctid FROM {table}
        WHERE finished_at < statement_timestamp() - make_interval(secs => $1)
            AND finished_at >= (SELECT coalesce($3::timestamptz, '-infinity')) {condition}
        ORDER BY finished_at
        LIMIT $2
        FOR UPDATE SKIP LOCKED
    ))
    RETURNING finished_at
)
SELECT count(*) AS jobs, max(finished_at) AS last FROM pruned
"""
PRUNE: Final = _PRUNE.format(table="viralfx_finished_jobs", condition="")
PRUNE_FAILED: Final = _PRUNE.format(table="viralfx_jobs", condition="AND state = 'failed'")
