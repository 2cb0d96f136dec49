"""The statements of the job ledger.

Each is complete in itself: one round trip, and no transaction but its own. The time is that at
which the server received it. Each has parameters, so that its plan is made anew for each execution.
"""

from typing import Final

JOB: Final = """
    id, queue, task, state, payload, key, correlation_id, traceparent, created_at, run_at,
    asked_run_at, started_at, finished_at, attempts, crashes, claims, worker, result, error_code,
    error_message
"""

ACCEPT: Final = """
INSERT INTO viralfx_jobs
    (id, queue, task, payload, key, correlation_id, traceparent, asked_run_at, created_at, run_at)
SELECT given.*, statement_timestamp(), greatest(given.run_at, statement_timestamp())
FROM unnest(
    $1::uuid[], $2::text[], $3::text[], $4::json[], $5::text[], $6::text[], $7::text[],
    $8::timestamptz[]
) AS given (id, queue, task, payload, key, correlation_id, traceparent, run_at)
ON CONFLICT DO NOTHING
RETURNING id, created_at, run_at
"""

ACCEPTED_BEFORE: Final = f"""
SELECT {JOB} FROM viralfx_jobs WHERE id = ANY($1::uuid[])
UNION ALL
SELECT {JOB} FROM viralfx_jobs
WHERE key IS NOT NULL AND key = ANY($2::text[]) AND id <> ALL($1::uuid[])
"""  # noqa: S608 - constants

_GIVE = """
UPDATE viralfx_jobs AS job
SET state = 'active', worker = $2, receipt = $4, claims = claims + 1,
    started_at = statement_timestamp()
FROM chosen
WHERE job.id = chosen.id
RETURNING job.id, queue, task, payload, claims, attempts, crashes, correlation_id, traceparent,
    created_at, job.run_at, started_at
"""
CLAIM: Final = f"""
WITH chosen AS MATERIALIZED (
    SELECT id FROM viralfx_jobs
    WHERE state = 'waiting' AND queue = $1 AND run_at <= statement_timestamp()
    ORDER BY run_at, id
    LIMIT $3
    FOR UPDATE SKIP LOCKED
)
{_GIVE}
"""  # noqa: S608 - constants
# Said so that the index of all that wait does not fit, but only that of the ids.
CLAIM_THESE: Final = f"""
WITH chosen AS MATERIALIZED (
    SELECT id FROM viralfx_jobs
    WHERE id = ANY($5::uuid[])
        AND state IS NOT DISTINCT FROM 'waiting'
        AND queue = $1 AND run_at <= statement_timestamp()
    ORDER BY run_at, id
    LIMIT $3
    FOR UPDATE SKIP LOCKED
)
{_GIVE}
"""  # noqa: S608 - constants

# Its worker lives and renews the lease, so nobody else would take these from it for long.
TAKE_BACK: Final = """
UPDATE viralfx_jobs SET state = 'waiting', worker = NULL
WHERE state = 'active' AND worker = $1 AND receipt = ANY($2::bigint[])
"""

# The planner has no opinion of a CASE. It would think that there are no active jobs, if there were
# none when it last looked, and compare each of the many that there are with each that is given.
SETTLE: Final = """
UPDATE viralfx_jobs AS job
SET state = given.state,
    worker = NULL,
    result = given.result,
    error_code = CASE
        WHEN given.state = 'waiting' AND given.code IS NULL THEN error_code ELSE given.code
    END,
    error_message = CASE
        WHEN given.state = 'waiting' AND given.code IS NULL THEN error_message ELSE given.message
    END,
    attempts = attempts + given.spent,
    run_at = CASE
        WHEN given.delay IS NULL THEN job.run_at
        ELSE statement_timestamp() + make_interval(secs => given.delay)
    END,
    finished_at = CASE WHEN given.state <> 'waiting' THEN statement_timestamp() END
FROM unnest(
    $1::uuid[], $2::integer[], $3::text[], $4::json[], $5::text[], $6::text[], $7::float8[],
    $8::integer[]
) AS given (id, number, state, result, code, message, delay, spent)
WHERE job.id = given.id
    AND CASE WHEN job.state = 'active' THEN job.claims = given.number ELSE false END
RETURNING job.id
"""
SETTLED_BEFORE: Final = """
SELECT job.id
FROM viralfx_jobs AS job
JOIN unnest($1::uuid[], $2::integer[], $3::text[], $4::integer[], $5::integer[])
    AS given (id, number, state, attempts, crashes) ON job.id = given.id
WHERE job.claims = given.number AND job.state = given.state
    AND job.attempts = given.attempts AND job.crashes = given.crashes
"""

HELD: Final = """
SELECT true FROM viralfx_jobs WHERE id = $1 AND state = 'active' AND claims = $2
"""
# Between this and COMMIT it holds the job's row; a client that is cut off there must not hold it
# for as long as it takes the server to notice.
SETTLE_AND_COMMIT: Final = f"""
{SETTLE.rstrip()}, set_config('idle_in_transaction_session_timeout', '10s', true)
"""
OUTCOME: Final = """
SELECT state = 'completed' AND claims = $2 FROM viralfx_jobs WHERE id = $1 FOR UPDATE
"""

REGISTER: Final = """
INSERT INTO viralfx_workers (worker, queues, lease_until)
VALUES ($1, $2, statement_timestamp() + make_interval(secs => $3))
ON CONFLICT (worker) DO UPDATE SET queues = excluded.queues, lease_until = excluded.lease_until
RETURNING lease_until
"""
# What was given only just now may be in an answer that is under way.
REGISTER_HOLDING: Final = f"""
WITH lost AS (
    UPDATE viralfx_jobs SET state = 'waiting', worker = NULL
    WHERE state = 'active' AND worker = $1 AND id <> ALL($4::uuid[])
        AND started_at < statement_timestamp() - make_interval(secs => $3)
)
{REGISTER}
"""  # noqa: S608 - constants

LEAVE: Final = """
WITH gone AS (
    DELETE FROM viralfx_workers WHERE worker = $1
)
UPDATE viralfx_jobs SET state = 'waiting', worker = NULL
WHERE state = 'active' AND worker = $1
RETURNING id, queue
"""

# What waits unread while the server hangs is received only after that: then it is too late.
SWEEP: Final = """
WITH gone AS (
    DELETE FROM viralfx_workers WHERE worker IN (
        SELECT worker FROM viralfx_workers
        WHERE lease_until <= statement_timestamp()
            AND ($2::timestamptz IS NULL OR statement_timestamp() < $2)
        FOR UPDATE SKIP LOCKED
    )
), lost AS MATERIALIZED (
    SELECT id FROM viralfx_jobs AS job
    WHERE state = 'active' AND coalesce(worker, '') NOT IN (
        SELECT living.worker FROM viralfx_workers AS living
        WHERE lease_until > statement_timestamp()
    ) AND ($2::timestamptz IS NULL OR statement_timestamp() < $2)
    FOR UPDATE OF job SKIP LOCKED
)
UPDATE viralfx_jobs AS job
SET worker = NULL,
    crashes = crashes + 1,
    state = CASE WHEN crashes + 1 >= $1 THEN 'failed' ELSE 'waiting' END,
    finished_at = CASE WHEN crashes + 1 >= $1 THEN statement_timestamp() END,
    error_code = CASE WHEN crashes + 1 >= $1 THEN 'crashed' ELSE error_code END,
    error_message = CASE
        WHEN crashes + 1 >= $1
        THEN format('%s workers died while they ran it, %s the last', crashes + 1, worker)
        ELSE error_message
    END
FROM lost
WHERE job.id = lost.id
RETURNING job.id, queue, state
"""

FOLD: Final = """
WITH folded AS (
    DELETE FROM viralfx_job_counters
    WHERE ctid = ANY(ARRAY(
        SELECT ctid FROM viralfx_job_counters
        WHERE (SELECT count(*) FROM viralfx_job_counters) > $1
        FOR UPDATE SKIP LOCKED
    ))
    RETURNING queue, state, count
)
INSERT INTO viralfx_job_counters (queue, state, count)
SELECT queue, state, sum(count) FROM folded GROUP BY queue, state
"""

GET: Final = f"SELECT {JOB} FROM viralfx_jobs WHERE id = $1"  # noqa: S608 - constants

_STATES = "unnest($4::text[])"
_ONE_QUEUE = "queues AS (SELECT $3::text AS queue)"
# Their number does not matter to it, only that of the queues: it jumps from one to the next.
_ALL_QUEUES = """
queues AS (
    (SELECT queue FROM viralfx_jobs WHERE state <> 'active' ORDER BY queue LIMIT 1)
    UNION ALL
    SELECT (
        SELECT job.queue FROM viralfx_jobs AS job
        WHERE state <> 'active' AND job.queue > queues.queue AND $3::text IS NULL
        ORDER BY job.queue LIMIT 1
    )
    FROM queues WHERE queue IS NOT NULL
)
"""
# By a range of the index for pages: were queue and state compared apart, all jobs might be read
# by their ids, in the hope that the state is a common one.
_PAGE = f"""
, found AS (
    SELECT few.id
    FROM queues
    CROSS JOIN {_STATES} AS states (state)
    CROSS JOIN LATERAL (
        SELECT job.id FROM viralfx_jobs AS job
        WHERE (job.queue, job.state, job.id) < (queues.queue, states.state, $1::uuid)
            AND (job.queue, job.state, job.id)
                >= (queues.queue, states.state, '00000000-0000-0000-0000-000000000000'::uuid)
            AND job.state <> 'active'
        ORDER BY job.queue DESC, job.state DESC, job.id DESC LIMIT $2
    ) AS few
    UNION ALL
    SELECT id FROM viralfx_jobs
    WHERE state = 'active' AND 'active' = ANY($4::text[])
        AND ($3::text IS NULL OR queue = $3::text) AND id < $1
), page AS (
    SELECT id FROM found ORDER BY id DESC LIMIT $2
)
SELECT {JOB} FROM viralfx_jobs WHERE id = ANY(ARRAY(SELECT id FROM page)) ORDER BY id DESC
"""  # noqa: S608 - constants
PAGE: Final = f"""
SELECT {JOB} FROM viralfx_jobs WHERE id < $1 ORDER BY id DESC LIMIT $2
"""  # noqa: S608 - constants
PAGE_OF_QUEUE: Final = f"WITH {_ONE_QUEUE}{_PAGE}"
PAGE_OF_STATE: Final = f"WITH RECURSIVE {_ALL_QUEUES}{_PAGE}"

RETRY: Final = f"""
UPDATE viralfx_jobs
SET state = 'waiting', run_at = statement_timestamp(), finished_at = NULL, attempts = 0, crashes = 0
WHERE id = $1 AND state = 'failed'
RETURNING {JOB}
"""  # noqa: S608 - constants
CANCEL: Final = f"""
UPDATE viralfx_jobs SET state = 'cancelled', finished_at = statement_timestamp()
WHERE id = $1 AND state = 'waiting'
RETURNING {JOB}
"""  # noqa: S608 - constants

# The parameter is always 'active': a statement without any gets one plan for good, made when the
# tables were as small as on the first day.
COUNTS: Final = """
SELECT queue,
    sum(waiting) AS waiting, sum(scheduled) AS scheduled, sum(active) AS active,
    sum(completed) AS completed, sum(failed) AS failed, sum(cancelled) AS cancelled,
    coalesce(max(oldest_due), 0) AS oldest_due, sum(consumers) AS consumers
FROM (
    SELECT queue,
        count(*) FILTER (WHERE run_at <= statement_timestamp()) AS waiting,
        count(*) FILTER (WHERE run_at > statement_timestamp()) AS scheduled,
        0 AS active, 0 AS completed, 0 AS failed, 0 AS cancelled,
        greatest(extract(epoch FROM statement_timestamp() - min(run_at)), 0) AS oldest_due,
        0 AS consumers
    FROM viralfx_jobs WHERE state = 'waiting' GROUP BY queue
    UNION ALL
    SELECT queue, 0, 0, count(*), 0, 0, 0, NULL, 0
    FROM viralfx_jobs WHERE state = $1 GROUP BY queue
    UNION ALL
    SELECT queue, 0, 0, 0,
        coalesce(sum(count) FILTER (WHERE state = 'completed'), 0),
        coalesce(sum(count) FILTER (WHERE state = 'failed'), 0),
        coalesce(sum(count) FILTER (WHERE state = 'cancelled'), 0),
        NULL, 0
    FROM viralfx_job_counters GROUP BY queue
    UNION ALL
    SELECT queue, 0, 0, 0, 0, 0, 0, NULL, count(*)
    FROM viralfx_workers, unnest(queues) AS queue
    WHERE lease_until > statement_timestamp() GROUP BY queue
) AS parts
GROUP BY queue
"""

PRUNE: Final = """
DELETE FROM viralfx_jobs WHERE id = ANY(ARRAY(
    SELECT id FROM viralfx_jobs
    WHERE finished_at < statement_timestamp() - make_interval(secs => $1)
    ORDER BY finished_at
    LIMIT $2
    FOR UPDATE SKIP LOCKED
))
"""
