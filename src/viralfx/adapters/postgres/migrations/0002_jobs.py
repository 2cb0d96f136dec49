"""Jobs, their workers, and the counters of jobs by state."""

from alembic import op

from viralfx.adapters.postgres.migrations import qualified

revision = "0002"
down_revision = "0001"

_COLUMNS = """
    id uuid PRIMARY KEY,
    queue text NOT NULL,
    task text NOT NULL,
    state text NOT NULL {state},
    payload json NOT NULL,
    key text,
    correlation_id text,
    traceparent text,
    created_at timestamptz NOT NULL,
    run_at timestamptz NOT NULL,
    asked_run_at timestamptz,
    started_at timestamptz,
    finished_at timestamptz {finished_at},
    attempts integer NOT NULL DEFAULT 0,
    crashes integer NOT NULL DEFAULT 0,
    claims integer NOT NULL DEFAULT 0,
    result json,
    error_code text,
    error_message text
"""
_UNFINISHED_STATE = "CHECK (state IN ('waiting', 'scheduled', 'active', 'failed'))"
_FINISHED_STATE = "CHECK (state IN ('completed', 'cancelled'))"
_SHOWN = """
    id, queue, task, payload, key, correlation_id, traceparent, created_at, run_at, asked_run_at,
    started_at, finished_at, attempts, crashes, claims, result, error_code, error_message
"""

_TABLES = (
    # A failed job stays here, since it may be retried. Most rows leave this table soon, so it and
    # its indexes stay small.
    f"""
    CREATE TABLE viralfx_jobs (
        {_COLUMNS.format(state=_UNFINISHED_STATE, finished_at="")},
        worker text,
        receipt bigint,
        refused_by text[]
    ) WITH (
        fillfactor = 70,
        autovacuum_vacuum_scale_factor = 0.01,
        autovacuum_vacuum_threshold = 5000,
        autovacuum_vacuum_insert_scale_factor = 0.05,
        autovacuum_analyze_scale_factor = 0.02,
        autovacuum_analyze_threshold = 1000,
        autovacuum_vacuum_cost_delay = 1
    )
    """,
    # Rows are added and, once they are old, deleted.
    f"""
    CREATE TABLE viralfx_finished_jobs (
        {_COLUMNS.format(state=_FINISHED_STATE, finished_at="NOT NULL")}
    ) WITH (
        autovacuum_vacuum_scale_factor = 0.05,
        autovacuum_vacuum_threshold = 5000,
        autovacuum_analyze_scale_factor = 0.05,
        autovacuum_analyze_threshold = 1000,
        autovacuum_vacuum_cost_delay = 1
    )
    """,
    # Tasks of due jobs that no worker knows: since when, and when a sweep last found it so.
    """
    CREATE TABLE viralfx_unknown_tasks (
        queue text NOT NULL,
        task text NOT NULL,
        since timestamptz NOT NULL,
        seen_at timestamptz NOT NULL,
        PRIMARY KEY (queue, task)
    )
    """,
    """
    CREATE TABLE viralfx_workers (
        worker text PRIMARY KEY,
        queues text[] NOT NULL,
        tasks text[],
        eligible boolean NOT NULL DEFAULT true,
        lease_until timestamptz NOT NULL
    ) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500)
    """,
    # Without an index: rows are only ever added, and merged by the sweep.
    """
    CREATE TABLE viralfx_job_counters (
        queue text NOT NULL,
        state text NOT NULL,
        count bigint NOT NULL
    ) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000)
    """,
)
_INDEXES = (
    "CREATE UNIQUE INDEX viralfx_jobs_key ON viralfx_jobs (key) WHERE key IS NOT NULL",
    """
    CREATE INDEX viralfx_jobs_waiting ON viralfx_jobs (queue, run_at, id) WHERE state = 'waiting'
    """,
    # For claims while unknown tasks wait, and for the tasks that wait: from one to the next.
    """
    CREATE INDEX viralfx_jobs_waiting_tasks ON viralfx_jobs (queue, task, run_at, id)
    WHERE state = 'waiting'
    """,
    "CREATE INDEX viralfx_jobs_scheduled ON viralfx_jobs (run_at) WHERE state = 'scheduled'",
    """
    CREATE INDEX viralfx_jobs_refused ON viralfx_jobs (run_at)
    WHERE state = 'waiting' AND refused_by IS NOT NULL
    """,
    "CREATE INDEX viralfx_jobs_active ON viralfx_jobs (worker) WHERE state = 'active'",
    "CREATE INDEX viralfx_jobs_failed ON viralfx_jobs (finished_at) WHERE state = 'failed'",
    # Without the active ones, of which there are few, so that a claim needs no entry here.
    "CREATE INDEX viralfx_jobs_pages ON viralfx_jobs (queue, state, id) WHERE state <> 'active'",
    # Not unique, so that nothing can keep a completed job from its table. The function that accepts
    # jobs keeps the keys of both tables unique.
    """
    CREATE INDEX viralfx_finished_jobs_key ON viralfx_finished_jobs (key) WHERE key IS NOT NULL
    """,
    "CREATE INDEX viralfx_finished_jobs_age ON viralfx_finished_jobs (finished_at)",
    "CREATE INDEX viralfx_finished_jobs_pages ON viralfx_finished_jobs (queue, state, id)",
)
_VIEW = f"""
CREATE VIEW viralfx_all_jobs AS
SELECT {_SHOWN}, worker, CASE state WHEN 'scheduled' THEN 'waiting' ELSE state END AS state
FROM viralfx_jobs
UNION ALL
SELECT {_SHOWN}, NULL, state FROM viralfx_finished_jobs
"""  # noqa: S608 - constants

# Every transaction adds rows of its own: a total that is updated would be a lock that every worker
# waits for until the others have committed. Deleting a failed, completed or cancelled job leaves
# its total as it is.
_COUNT = """
CREATE FUNCTION viralfx_count_{when}_jobs() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    {statement};
    RETURN NULL;
END
$$
"""
_COUNTS = {
    "inserted": """
    INSERT INTO viralfx_job_counters (queue, state, count)
    SELECT queue, state, count(*) FROM after_it GROUP BY queue, state
    """,
    "updated": """
    INSERT INTO viralfx_job_counters (queue, state, count)
    SELECT queue, state, sum(change)
    FROM (
        SELECT queue, state, 1 AS change FROM after_it
        UNION ALL
        SELECT queue, state, -1 FROM before_it
    ) AS changes
    GROUP BY queue, state
    HAVING sum(change) <> 0
    """,
    "deleted": """
    INSERT INTO viralfx_job_counters (queue, state, count)
    SELECT queue, state, -count(*) FROM before_it
    WHERE state <> 'failed' GROUP BY queue, state
    """,
    "truncated": """
    DELETE FROM viralfx_job_counters WHERE state IN ('waiting', 'scheduled', 'active')
    """,
}
_TRIGGERS = {
    ("viralfx_jobs", "INSERT"): ("inserted", "REFERENCING NEW TABLE AS after_it"),
    ("viralfx_jobs", "UPDATE"): (
        "updated",
        "REFERENCING OLD TABLE AS before_it NEW TABLE AS after_it",
    ),
    ("viralfx_jobs", "DELETE"): ("deleted", "REFERENCING OLD TABLE AS before_it"),
    ("viralfx_jobs", "TRUNCATE"): ("truncated", ""),
    ("viralfx_finished_jobs", "INSERT"): ("inserted", "REFERENCING NEW TABLE AS after_it"),
}

# Public: programs in other languages accept jobs with it, too (docs/jobs.md).
#
# Two statements, since a job may move between the tables meanwhile. If the first one inserts a
# draft, an earlier job with its key was moved by a transaction that has ended, and under READ
# COMMITTED the second one sees it. Plans for empty tables would be kept while the tables grow,
# so sequential scans are off.
ACCEPT = """
CREATE FUNCTION viralfx_accept_jobs(
    ids uuid[], queues text[], tasks text[], payloads json[], keys text[] DEFAULT NULL,
    correlation_ids text[] DEFAULT NULL, traceparents text[] DEFAULT NULL,
    run_ats timestamptz[] DEFAULT NULL, soon float8 DEFAULT 60
) RETURNS TABLE (id uuid, created_at timestamptz, run_at timestamptz) LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
    moment CONSTANT timestamptz = statement_timestamp();
    added uuid[];
    added_keys text[];
    added_run_ats timestamptz[];
    finished uuid[];
BEGIN
    IF array_remove(keys, NULL) <> '{}'
        AND current_setting('transaction_isolation') <> 'read committed'
    THEN
        RAISE EXCEPTION 'jobs with an idempotency key are accepted under READ COMMITTED only'
            USING ERRCODE = 'feature_not_supported', HINT =
            'Begin the transaction with this isolation level, or accept the jobs after it.';
    END IF;
    WITH accepted AS (
        INSERT INTO viralfx_jobs (
            id, queue, task, payload, key, correlation_id, traceparent, asked_run_at, created_at,
            run_at, state
        )
        SELECT given.*, moment, greatest(given.run_at, moment),
            CASE WHEN given.run_at > moment + make_interval(secs => soon)
                THEN 'scheduled' ELSE 'waiting' END
        FROM unnest(
            ids, queues, tasks, payloads, keys, correlation_ids, traceparents, run_ats
        ) AS given (id, queue, task, payload, key, correlation_id, traceparent, run_at)
        ON CONFLICT DO NOTHING
        RETURNING id, key, run_at
    )
    SELECT array_agg(id), array_agg(key) FILTER (WHERE key IS NOT NULL), array_agg(run_at)
    INTO added, added_keys, added_run_ats FROM accepted;

    finished = ARRAY(SELECT job.id FROM viralfx_finished_jobs AS job WHERE job.id = ANY(added));
    IF added_keys IS NOT NULL THEN
        finished = finished || ARRAY(
            SELECT job.id FROM viralfx_jobs AS job
            WHERE job.id = ANY(added) AND job.key = ANY(ARRAY(
                SELECT known.key FROM viralfx_finished_jobs AS known
                WHERE known.key IS NOT NULL AND known.key = ANY(added_keys)
            ))
        );
    END IF;
    IF finished <> '{}' THEN
        DELETE FROM viralfx_jobs AS job WHERE job.id = ANY(finished);
    END IF;
    RETURN QUERY
        SELECT given.id, moment, given.run_at
        FROM unnest(added, added_run_ats) AS given (id, run_at)
        WHERE given.id <> ALL(finished);
END
$$
"""


def upgrade() -> None:
    """Make the tables of :class:`viralfx.adapters.postgres.ledger.PostgresJobLedger`."""
    for statement in (*_TABLES, *_INDEXES, _VIEW, ACCEPT):
        _execute(statement)
    for when, statement in _COUNTS.items():
        _execute(_COUNT.format(when=when, statement=statement.strip()))
    for (table, change), (when, tables) in _TRIGGERS.items():
        _execute(
            f"CREATE TRIGGER {table}_{when} AFTER {change} ON {table} {tables}"
            f" FOR EACH STATEMENT EXECUTE FUNCTION viralfx_count_{when}_jobs()"
        )


def downgrade() -> None:
    """Drop them, with all jobs."""
    _execute("DROP FUNCTION viralfx_accept_jobs")
    _execute("DROP VIEW viralfx_all_jobs")
    _execute(
        "DROP TABLE viralfx_jobs, viralfx_finished_jobs, viralfx_workers, viralfx_job_counters,"
        " viralfx_unknown_tasks"
    )
    for when in _COUNTS:
        _execute(f"DROP FUNCTION viralfx_count_{when}_jobs")


def _execute(statement: str) -> None:
    op.execute(qualified(statement, op.get_context().opts["version_table_schema"]))
