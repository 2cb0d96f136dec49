"""Jobs, their workers, and the counters of what is finished."""

from alembic import op

revision = "0002"
down_revision = "0001"

_TABLES = (
    """
    CREATE TABLE viralfx_jobs (
        id uuid PRIMARY KEY,
        queue text NOT NULL,
        task text NOT NULL,
        state text NOT NULL DEFAULT 'waiting'
            CHECK (state IN ('waiting', 'active', 'completed', 'failed', 'cancelled')),
        payload json NOT NULL,
        key text,
        correlation_id text,
        traceparent text,
        created_at timestamptz NOT NULL,
        run_at timestamptz NOT NULL,
        asked_run_at timestamptz,
        started_at timestamptz,
        finished_at timestamptz,
        attempts integer NOT NULL DEFAULT 0,
        crashes integer NOT NULL DEFAULT 0,
        claims integer NOT NULL DEFAULT 0,
        worker text,
        receipt bigint,
        result json,
        error_code text,
        error_message text
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
    """
    CREATE TABLE viralfx_workers (
        worker text PRIMARY KEY,
        queues text[] NOT NULL,
        lease_until timestamptz NOT NULL
    ) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500)
    """,
    # Without an index: rows are only ever added, and folded into few by whoever sweeps.
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
    "CREATE INDEX viralfx_jobs_active ON viralfx_jobs (worker) WHERE state = 'active'",
    """
    CREATE INDEX viralfx_jobs_finished ON viralfx_jobs (finished_at) WHERE finished_at IS NOT NULL
    """,
    # Without the active ones, of which there are few, so that a claim needs no entry here.
    "CREATE INDEX viralfx_jobs_pages ON viralfx_jobs (queue, state, id) WHERE state <> 'active'",
)
_COUNTING = (
    # A row of its own for each statement: a total that is updated would be a lock that every
    # worker waits for until the others have committed.
    """
    CREATE FUNCTION viralfx_count_jobs() RETURNS trigger LANGUAGE plpgsql
    SET search_path FROM CURRENT AS $$
    BEGIN
        INSERT INTO viralfx_job_counters (queue, state, count)
        SELECT queue, state, sum(change)
        FROM (
            SELECT queue, state, 1 AS change FROM after_it
            UNION ALL
            SELECT queue, state, -1 FROM before_it
        ) AS changes
        WHERE state IN ('completed', 'failed', 'cancelled')
        GROUP BY queue, state
        HAVING sum(change) <> 0;
        RETURN NULL;
    END
    $$
    """,
    """
    CREATE TRIGGER viralfx_jobs_counted AFTER UPDATE ON viralfx_jobs
    REFERENCING OLD TABLE AS before_it NEW TABLE AS after_it
    FOR EACH STATEMENT EXECUTE FUNCTION viralfx_count_jobs()
    """,
)


def upgrade() -> None:
    """Make the tables of :class:`viralfx.adapters.postgres.job_ledger.PostgresJobLedger`."""
    for statement in (*_TABLES, *_INDEXES, *_COUNTING):
        op.execute(statement)


def downgrade() -> None:
    """Drop them, with all jobs."""
    op.execute("DROP TABLE viralfx_jobs, viralfx_workers, viralfx_job_counters")
    op.execute("DROP FUNCTION viralfx_count_jobs")
