-- Priorities, limits, unique jobs, progress, past attempts, paused queues and schedules.

-- The rows of existing jobs are not rewritten. The tables are locked until the end, so nothing here
-- does more than read each job once.
DROP VIEW viralfx_ops.viralfx_all_jobs;
ALTER TABLE viralfx_ops.viralfx_jobs
    ADD COLUMN user_id text,
    ADD COLUMN priority smallint NOT NULL DEFAULT 0,
    ADD COLUMN concurrency_key text,
    ADD COLUMN history jsonb,
    ADD COLUMN progress json,
    ADD COLUMN unique_key text,
    ADD COLUMN unique_while_waiting boolean NOT NULL DEFAULT false,
    ADD COLUMN cancel_requested boolean NOT NULL DEFAULT false;
ALTER TABLE viralfx_ops.viralfx_finished_jobs
    ADD COLUMN user_id text,
    ADD COLUMN priority smallint NOT NULL DEFAULT 0,
    ADD COLUMN concurrency_key text,
    ADD COLUMN history jsonb,
    ADD COLUMN progress json;

-- The next migration makes others in their place. It takes no lock that excludes readers, and they
-- are dropped here, where there is one. The previous version needs them; see ADR-0078.
DROP INDEX
    viralfx_ops.viralfx_jobs_waiting, viralfx_ops.viralfx_jobs_waiting_tasks,
    viralfx_ops.viralfx_jobs_active;

CREATE VIEW viralfx_ops.viralfx_all_jobs AS
SELECT
    id, queue, task, payload, key, correlation_id, traceparent, user_id, priority, concurrency_key,
    created_at, run_at, asked_run_at, started_at, finished_at, attempts, crashes, claims, result,
    error_code, error_message, history, progress,
    worker, cancel_requested, CASE state WHEN 'scheduled' THEN 'waiting' ELSE state END AS state
FROM viralfx_ops.viralfx_jobs
UNION ALL
SELECT
    id, queue, task, payload, key, correlation_id, traceparent, user_id, priority, concurrency_key,
    created_at, run_at, asked_run_at, started_at, finished_at, attempts, crashes, claims, result,
    error_code, error_message, history, progress,
    NULL, false, state
FROM viralfx_ops.viralfx_finished_jobs;

-- The jobs that may have no duplicate. The index decides it, since the statements of the previous
-- version know no unique jobs. A job enters the index when it is accepted and not again: a retry
-- removes its key.
CREATE UNIQUE INDEX viralfx_jobs_unique ON viralfx_ops.viralfx_jobs (unique_key)
WHERE unique_key IS NOT NULL AND state <> 'failed' AND NOT cancel_requested
    AND (claims = 0 OR NOT unique_while_waiting);

CREATE TABLE viralfx_ops.viralfx_paused_queues (
    queue text PRIMARY KEY,
    paused_at timestamptz NOT NULL
);

-- The last time of each schedule for which a job was accepted.
CREATE TABLE viralfx_ops.viralfx_schedules (
    task text PRIMARY KEY,
    cron text NOT NULL,
    timezone text NOT NULL,
    since timestamptz NOT NULL,
    last_run_at timestamptz,
    seen_at timestamptz NOT NULL
);

-- The one of 0002, with the options of jobs as further parameters: calls without them still work.
--
-- Plans for empty tables would be kept while the tables grow, hence without sequential scans. With
-- the search path of the caller, a function with the same name and exact types in one of its
-- schemas would be called in place of a built-in one that takes any type.
DROP FUNCTION viralfx_ops.viralfx_accept_jobs;
CREATE FUNCTION viralfx_ops.viralfx_accept_jobs(
    ids uuid[], queues text[], tasks text[], payloads json[], keys text[] DEFAULT NULL,
    correlation_ids text[] DEFAULT NULL, traceparents text[] DEFAULT NULL,
    run_ats timestamptz[] DEFAULT NULL, soon float8 DEFAULT 60,
    priorities integer[] DEFAULT NULL, unique_keys text[] DEFAULT NULL,
    while_waiting boolean[] DEFAULT NULL, concurrency_keys text[] DEFAULT NULL,
    user_ids text[] DEFAULT NULL
) RETURNS TABLE (id uuid, created_at timestamptz, run_at timestamptz) LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
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
            id, queue, task, payload, key, correlation_id, traceparent, asked_run_at, priority,
            unique_key, unique_while_waiting, concurrency_key, user_id, created_at, run_at, state
        )
        SELECT given.id, given.queue, given.task, given.payload, given.key, given.correlation_id,
            given.traceparent, given.run_at, coalesce(given.priority, 0), given.unique_key,
            coalesce(given.while_waiting, false), given.concurrency_key, given.user_id,
            moment, greatest(given.run_at, moment),
            CASE WHEN given.run_at > moment + make_interval(secs => soon)
                THEN 'scheduled' ELSE 'waiting' END
        FROM unnest(
            ids, queues, tasks, payloads, keys, correlation_ids, traceparents, run_ats, priorities,
            unique_keys, while_waiting, concurrency_keys, user_ids
        ) AS given (
            id, queue, task, payload, key, correlation_id, traceparent, run_at, priority,
            unique_key, while_waiting, concurrency_key, user_id
        )
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

-- The digest is that of `unique_key_of` in Python: the text of a jsonb value sorts the names of an
-- object and drops white space, and the regular expression drops zeros at the end of fractions.
CREATE FUNCTION viralfx_ops.enqueue(
    task text, payload json DEFAULT 'null', queue text DEFAULT 'default',
    run_at timestamptz DEFAULT NULL, priority integer DEFAULT 0, key text DEFAULT NULL,
    unique_while text DEFAULT NULL, concurrency_key text DEFAULT NULL,
    correlation_id text DEFAULT NULL, traceparent text DEFAULT NULL, user_id text DEFAULT NULL,
    notify boolean DEFAULT true
) RETURNS uuid LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off AS $$
#variable_conflict use_variable
DECLARE
    now_us CONSTANT bigint = extract(epoch FROM clock_timestamp()) * 1000000;
    -- A UUID of version 7: milliseconds, and in place of the first random bits their fraction.
    job_id CONSTANT uuid = (
        lpad(to_hex(now_us / 1000), 12, '0') || '7'
        || lpad(to_hex(now_us % 1000 * 4096 / 1000), 3, '0')
        || right(replace(gen_random_uuid()::text, '-', ''), 16)
    )::uuid;
    -- Of a task whose limits hold for each key; see the migration of limits.
    key_of_none CONSTANT text = (
        SELECT '' FROM viralfx_ops.viralfx_task_limits AS known
        WHERE known.task = task AND known.key = '' AND known.last_key IS NOT NULL
    );
    digest text;
    accepted record;
    earlier record;
    wrong text;
BEGIN
    -- A time that Python does not have could be stored, but not read. A text that is too long could
    -- fit into some indexes, and into those for a later state not.
    wrong = CASE
        WHEN NOT run_at BETWEEN '0001-01-02Z' AND '9999-12-30Z'
            THEN format('run_at is out of range: %s', run_at)
        WHEN length(task) NOT BETWEEN 1 AND 200 THEN 'task must have 1 to 200 characters'
        WHEN length(queue) NOT BETWEEN 1 AND 200 THEN 'queue must have 1 to 200 characters'
        WHEN octet_length(key) NOT BETWEEN 1 AND 2000 THEN 'key must have 1 to 2000 bytes'
        WHEN priority NOT BETWEEN -100 AND 100 THEN 'priority must be from -100 to 100'
        WHEN length(concurrency_key) > 255 THEN 'concurrency_key must have at most 255 characters'
        WHEN length(correlation_id) > 255 OR length(traceparent) > 255 OR length(user_id) > 255
            THEN 'correlation_id, traceparent and user_id must have at most 255 characters'
        WHEN unique_while NOT IN ('waiting', 'unfinished')
            THEN format('unique_while must be ''waiting'' or ''unfinished'', not %L', unique_while)
    END;
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION '%', wrong USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF unique_while IS NOT NULL THEN
        digest = encode(sha256(convert_to(task || chr(10) || regexp_replace(
            payload::jsonb::text,
            '("(?:[^"\\]|\\.)*")|(\.[0-9]*[1-9])0+(?![0-9])|\.0+(?![0-9])', '\1\2', 'g'
        ), 'UTF8')), 'hex');
    END IF;
    FOR attempt IN 1..10 LOOP
        SELECT new.id, new.run_at <= new.created_at AS due INTO accepted
        FROM viralfx_ops.viralfx_accept_jobs(
            ARRAY[job_id], ARRAY[queue], ARRAY[task], ARRAY[payload], ARRAY[key],
            ARRAY[correlation_id], ARRAY[traceparent], ARRAY[run_at],
            priorities => ARRAY[priority], unique_keys => ARRAY[digest],
            while_waiting => ARRAY[unique_while = 'waiting'],
            concurrency_keys => ARRAY[coalesce(concurrency_key, key_of_none)],
            user_ids => ARRAY[user_id]
        ) AS new;
        IF FOUND THEN
            IF notify AND accepted.due THEN
                PERFORM pg_notify('viralfx_jobs.viralfx_ops', json_build_object(
                    'queue', queue, 'ids', json_build_array(job_id)
                )::text);
            END IF;
            RETURN job_id;
        END IF;
        SELECT job.id, job.key, job.task = task AND job.queue = queue
            AND job.asked_run_at IS NOT DISTINCT FROM run_at
            AND CASE WHEN job.payload::text = payload::text THEN true
                ELSE job.payload::jsonb = payload::jsonb END AS same
        INTO earlier FROM viralfx_ops.viralfx_all_jobs AS job
        WHERE job.key IS NOT NULL AND job.key = key;
        IF FOUND AND NOT earlier.same THEN
            RAISE EXCEPTION
                'the idempotency key was used for job %, which asks for something else', earlier.id
                USING ERRCODE = 'unique_violation';
        END IF;
        IF NOT FOUND THEN
            SELECT job.id INTO earlier FROM viralfx_ops.viralfx_jobs AS job
            WHERE job.unique_key = digest AND 
unique_key IS NOT NULL AND state <> 'failed' AND NOT cancel_requested
    AND (claims = 0 OR NOT unique_while_waiting)
;
        END IF;
        IF FOUND THEN
            RETURN earlier.id;
        END IF;
        -- The job that was in the way has ended, or its transaction was rolled back.
    END LOOP;
    RAISE EXCEPTION 'the jobs with this key change all the time'
        USING ERRCODE = 'serialization_failure';
END
$$;
