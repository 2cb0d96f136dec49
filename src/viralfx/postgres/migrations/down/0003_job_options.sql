-- Drops the options; waiting jobs lose theirs.

DROP FUNCTION viralfx_ops.enqueue;
DROP FUNCTION viralfx_ops.viralfx_accept_jobs;

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

DROP VIEW viralfx_ops.viralfx_all_jobs;
DROP TABLE viralfx_ops.viralfx_paused_queues, viralfx_ops.viralfx_schedules;
ALTER TABLE viralfx_ops.viralfx_jobs
    DROP COLUMN user_id,
    DROP COLUMN priority,
    DROP COLUMN concurrency_key,
    DROP COLUMN history,
    DROP COLUMN progress,
    DROP COLUMN unique_key,
    DROP COLUMN unique_while_waiting,
    DROP COLUMN cancel_requested;
ALTER TABLE viralfx_ops.viralfx_finished_jobs
    DROP COLUMN user_id,
    DROP COLUMN priority,
    DROP COLUMN concurrency_key,
    DROP COLUMN history,
    DROP COLUMN progress;

CREATE INDEX viralfx_jobs_waiting ON viralfx_ops.viralfx_jobs (queue, run_at, id)
WHERE state = 'waiting';
CREATE INDEX viralfx_jobs_waiting_tasks ON viralfx_ops.viralfx_jobs (queue, task, run_at, id)
WHERE state = 'waiting';
CREATE INDEX viralfx_jobs_active ON viralfx_ops.viralfx_jobs (worker) WHERE state = 'active';

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
