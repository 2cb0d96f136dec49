-- Jobs, their workers, and the counters of jobs by state.

-- A failed job stays here, since it may be retried. Most rows leave this table soon, so it and its
-- indexes stay small.
CREATE TABLE viralfx_ops.viralfx_jobs (
    id uuid PRIMARY KEY,
    queue text NOT NULL,
    task text NOT NULL,
    state text NOT NULL CHECK (state IN ('waiting', 'scheduled', 'active', 'failed')),
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
    result json,
    error_code text,
    error_message text,
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
);

-- Rows are added and, once they are old, deleted.
CREATE TABLE viralfx_ops.viralfx_finished_jobs (
    id uuid PRIMARY KEY,
    queue text NOT NULL,
    task text NOT NULL,
    state text NOT NULL CHECK (state IN ('completed', 'cancelled')),
    payload json NOT NULL,
    key text,
    correlation_id text,
    traceparent text,
    created_at timestamptz NOT NULL,
    run_at timestamptz NOT NULL,
    asked_run_at timestamptz,
    started_at timestamptz,
    finished_at timestamptz NOT NULL,
    attempts integer NOT NULL DEFAULT 0,
    crashes integer NOT NULL DEFAULT 0,
    claims integer NOT NULL DEFAULT 0,
    result json,
    error_code text,
    error_message text
) WITH (
    autovacuum_vacuum_scale_factor = 0.05,
    autovacuum_vacuum_threshold = 5000,
    autovacuum_analyze_scale_factor = 0.05,
    autovacuum_analyze_threshold = 1000,
    autovacuum_vacuum_cost_delay = 1
);

-- Tasks of due jobs that no worker knows: since when, and when a sweep last found it so.
CREATE TABLE viralfx_ops.viralfx_unknown_tasks (
    queue text NOT NULL,
    task text NOT NULL,
    since timestamptz NOT NULL,
    seen_at timestamptz NOT NULL,
    PRIMARY KEY (queue, task)
);

CREATE TABLE viralfx_ops.viralfx_workers (
    worker text PRIMARY KEY,
    queues text[] NOT NULL,
    tasks text[],
    eligible boolean NOT NULL DEFAULT true,
    lease_until timestamptz NOT NULL
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);

-- Without an index: rows are only ever added, and merged by the sweep.
CREATE TABLE viralfx_ops.viralfx_job_counters (
    queue text NOT NULL,
    state text NOT NULL,
    count bigint NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

CREATE UNIQUE INDEX viralfx_jobs_key ON viralfx_ops.viralfx_jobs (key) WHERE key IS NOT NULL;
CREATE INDEX viralfx_jobs_waiting ON viralfx_ops.viralfx_jobs (queue, run_at, id)
WHERE state = 'waiting';
-- For claims while unknown tasks wait, and for the tasks that wait: from one to the next.
CREATE INDEX viralfx_jobs_waiting_tasks ON viralfx_ops.viralfx_jobs (queue, task, run_at, id)
WHERE state = 'waiting';
CREATE INDEX viralfx_jobs_scheduled ON viralfx_ops.viralfx_jobs (run_at) WHERE state = 'scheduled';
CREATE INDEX viralfx_jobs_refused ON viralfx_ops.viralfx_jobs (run_at)
WHERE state = 'waiting' AND refused_by IS NOT NULL;
CREATE INDEX viralfx_jobs_active ON viralfx_ops.viralfx_jobs (worker) WHERE state = 'active';
CREATE INDEX viralfx_jobs_failed ON viralfx_ops.viralfx_jobs (finished_at) WHERE state = 'failed';
-- Without the active ones, of which there are few, so that a claim needs no entry here.
CREATE INDEX viralfx_jobs_pages ON viralfx_ops.viralfx_jobs (queue, state, id)
WHERE state <> 'active';
-- Not unique, so that nothing can keep a completed job from its table. The function that accepts
-- jobs keeps the keys of both tables unique.
CREATE INDEX viralfx_finished_jobs_key ON viralfx_ops.viralfx_finished_jobs (key)
WHERE key IS NOT NULL;
CREATE INDEX viralfx_finished_jobs_age ON viralfx_ops.viralfx_finished_jobs (finished_at);
CREATE INDEX viralfx_finished_jobs_pages ON viralfx_ops.viralfx_finished_jobs (queue, state, id);

CREATE VIEW viralfx_ops.viralfx_all_jobs AS
SELECT
    id, queue, task, payload, key, correlation_id, traceparent, created_at, run_at, asked_run_at,
    started_at, finished_at, attempts, crashes, claims, result, error_code, error_message,
    worker, CASE state WHEN 'scheduled' THEN 'waiting' ELSE state END AS state
FROM viralfx_ops.viralfx_jobs
UNION ALL
SELECT
    id, queue, task, payload, key, correlation_id, traceparent, created_at, run_at, asked_run_at,
    started_at, finished_at, attempts, crashes, claims, result, error_code, error_message,
    NULL, state
FROM viralfx_ops.viralfx_finished_jobs;

-- Public: programs in other languages accept jobs with it, too (docs/jobs.md).
--
-- Two statements, since a job may move between the tables meanwhile. If the first one inserts a
-- draft, an earlier job with its key was moved by a transaction that has ended, and under READ
-- COMMITTED the second one sees it. Plans for empty tables would be kept while the tables grow,
-- so sequential scans are off.
CREATE FUNCTION viralfx_ops.viralfx_accept_jobs(
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
        INSERT INTO viralfx_ops.viralfx_jobs (
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

    finished = ARRAY(SELECT job.id FROM viralfx_ops.viralfx_finished_jobs AS job WHERE job.id = ANY(added));
    IF added_keys IS NOT NULL THEN
        finished = finished || ARRAY(
            SELECT job.id FROM viralfx_ops.viralfx_jobs AS job
            WHERE job.id = ANY(added) AND job.key = ANY(ARRAY(
                SELECT known.key FROM viralfx_ops.viralfx_finished_jobs AS known
                WHERE known.key IS NOT NULL AND known.key = ANY(added_keys)
            ))
        );
    END IF;
    IF finished <> '{}' THEN
        DELETE FROM viralfx_ops.viralfx_jobs AS job WHERE job.id = ANY(finished);
    END IF;
    RETURN QUERY
        SELECT given.id, moment, given.run_at
        FROM unnest(added, added_run_ats) AS given (id, run_at)
        WHERE given.id <> ALL(finished);
END
$$;

-- Every transaction adds rows of its own: a total that is updated would be a lock that every worker
-- waits for until the others have committed. Deleting a failed, completed or cancelled job leaves
-- its total as it is.
CREATE FUNCTION viralfx_ops.viralfx_count_inserted_jobs() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO viralfx_ops.viralfx_job_counters (queue, state, count)
    SELECT queue, state, count(*) FROM after_it GROUP BY queue, state;
    RETURN NULL;
END
$$;

CREATE FUNCTION viralfx_ops.viralfx_count_updated_jobs() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO viralfx_ops.viralfx_job_counters (queue, state, count)
    SELECT queue, state, sum(change)
    FROM (
        SELECT queue, state, 1 AS change FROM after_it
        UNION ALL
        SELECT queue, state, -1 FROM before_it
    ) AS changes
    GROUP BY queue, state
    HAVING sum(change) <> 0;
    RETURN NULL;
END
$$;

CREATE FUNCTION viralfx_ops.viralfx_count_deleted_jobs() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO viralfx_ops.viralfx_job_counters (queue, state, count)
    SELECT queue, state, -count(*) FROM before_it
    WHERE state <> 'failed' GROUP BY queue, state;
    RETURN NULL;
END
$$;

CREATE FUNCTION viralfx_ops.viralfx_count_truncated_jobs() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM viralfx_ops.viralfx_job_counters WHERE state IN ('waiting', 'scheduled', 'active');
    RETURN NULL;
END
$$;

CREATE TRIGGER viralfx_jobs_inserted AFTER INSERT ON viralfx_ops.viralfx_jobs
    REFERENCING NEW TABLE AS after_it
    FOR EACH STATEMENT EXECUTE FUNCTION viralfx_ops.viralfx_count_inserted_jobs();
CREATE TRIGGER viralfx_jobs_updated AFTER UPDATE ON viralfx_ops.viralfx_jobs
    REFERENCING OLD TABLE AS before_it NEW TABLE AS after_it
    FOR EACH STATEMENT EXECUTE FUNCTION viralfx_ops.viralfx_count_updated_jobs();
CREATE TRIGGER viralfx_jobs_deleted AFTER DELETE ON viralfx_ops.viralfx_jobs
    REFERENCING OLD TABLE AS before_it
    FOR EACH STATEMENT EXECUTE FUNCTION viralfx_ops.viralfx_count_deleted_jobs();
CREATE TRIGGER viralfx_jobs_truncated AFTER TRUNCATE ON viralfx_ops.viralfx_jobs
    FOR EACH STATEMENT EXECUTE FUNCTION viralfx_ops.viralfx_count_truncated_jobs();
CREATE TRIGGER viralfx_finished_jobs_inserted AFTER INSERT ON viralfx_ops.viralfx_finished_jobs
    REFERENCING NEW TABLE AS after_it
    FOR EACH STATEMENT EXECUTE FUNCTION viralfx_ops.viralfx_count_inserted_jobs();
