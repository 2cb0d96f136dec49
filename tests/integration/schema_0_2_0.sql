-- The schema of version 0.2.0, as its Alembic left it: `pg_dump --schema-only --no-owner` of Postgres 15
-- after `viralfx migrate` of commit d8d2567, without comments and settings.

SET check_function_bodies = false;

CREATE SCHEMA viralfx_ops;

CREATE FUNCTION viralfx_ops.enqueue(task text, payload jsonb DEFAULT 'null'::jsonb, queue text DEFAULT 'default'::text, run_at timestamp with time zone DEFAULT NULL::timestamp with time zone, priority integer DEFAULT 0, key text DEFAULT NULL::text, unique_while text DEFAULT NULL::text, concurrency_key text DEFAULT NULL::text, correlation_id text DEFAULT NULL::text, traceparent text DEFAULT NULL::text, user_id text DEFAULT NULL::text, notify boolean DEFAULT true, max_attempts integer DEFAULT NULL::integer) RETURNS uuid
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET plan_cache_mode TO 'force_generic_plan'
    SET enable_seqscan TO 'off'
    AS $$
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
        SELECT '' FROM "viralfx_ops".viralfx_task_limits AS known
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
        WHEN max_attempts NOT BETWEEN 1 AND 10000 THEN 'max_attempts must be from 1 to 10000'
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
            payload::text,
            '("(?:[^"\\]|\\.)*")|(\.[0-9]*[1-9])0+(?![0-9])|\.0+(?![0-9])', '\1\2', 'g'
        ), 'UTF8')), 'hex');
    END IF;
    FOR attempt IN 1..10 LOOP
        SELECT new.id, new.run_at <= new.created_at AS due INTO accepted
        FROM "viralfx_ops".viralfx_accept_jobs(
            ARRAY[job_id], ARRAY[queue], ARRAY[task], ARRAY[payload::json], ARRAY[key],
            ARRAY[correlation_id], ARRAY[traceparent], ARRAY[run_at],
            priorities => ARRAY[priority], unique_keys => ARRAY[digest],
            while_waiting => ARRAY[unique_while = 'waiting'],
            concurrency_keys => ARRAY[coalesce(concurrency_key, key_of_none)],
            user_ids => ARRAY[user_id], max_attempts => ARRAY[max_attempts]
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
                ELSE job.payload::jsonb = payload END AS same
        INTO earlier FROM "viralfx_ops".viralfx_all_jobs AS job
        WHERE job.key IS NOT NULL AND job.key = key;
        IF FOUND AND NOT earlier.same THEN
            RAISE EXCEPTION
                'the idempotency key was used for job %, which asks for something else', earlier.id
                USING ERRCODE = 'unique_violation';
        END IF;
        IF NOT FOUND THEN
            SELECT job.id INTO earlier FROM "viralfx_ops".viralfx_jobs AS job
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

CREATE FUNCTION viralfx_ops.viralfx_accept_jobs(ids uuid[], queues text[], tasks text[], payloads json[], keys text[] DEFAULT NULL::text[], correlation_ids text[] DEFAULT NULL::text[], traceparents text[] DEFAULT NULL::text[], run_ats timestamp with time zone[] DEFAULT NULL::timestamp with time zone[], soon double precision DEFAULT 60, priorities integer[] DEFAULT NULL::integer[], unique_keys text[] DEFAULT NULL::text[], while_waiting boolean[] DEFAULT NULL::boolean[], concurrency_keys text[] DEFAULT NULL::text[], user_ids text[] DEFAULT NULL::text[], max_attempts integer[] DEFAULT NULL::integer[]) RETURNS TABLE(id uuid, created_at timestamp with time zone, run_at timestamp with time zone)
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET plan_cache_mode TO 'force_generic_plan'
    SET enable_seqscan TO 'off'
    AS $$
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
        INSERT INTO "viralfx_ops".viralfx_jobs (
            id, queue, task, payload, key, correlation_id, traceparent, asked_run_at, priority,
            unique_key, unique_while_waiting, concurrency_key, user_id, max_attempts, created_at,
            run_at, state
        )
        SELECT given.id, given.queue, given.task, given.payload, given.key, given.correlation_id,
            given.traceparent, given.run_at, coalesce(given.priority, 0), given.unique_key,
            coalesce(given.while_waiting, false), given.concurrency_key, given.user_id,
            given.max_attempts, moment, greatest(given.run_at, moment),
            CASE WHEN given.run_at > moment + make_interval(secs => soon)
                THEN 'scheduled' ELSE 'waiting' END
        FROM unnest(
            ids, queues, tasks, payloads, keys, correlation_ids, traceparents, run_ats, priorities,
            unique_keys, while_waiting, concurrency_keys, user_ids, max_attempts
        ) AS given (
            id, queue, task, payload, key, correlation_id, traceparent, run_at, priority,
            unique_key, while_waiting, concurrency_key, user_id, max_attempts
        )
        ON CONFLICT DO NOTHING
        RETURNING id, key, run_at
    )
    SELECT array_agg(id), array_agg(key) FILTER (WHERE key IS NOT NULL), array_agg(run_at)
    INTO added, added_keys, added_run_ats FROM accepted;

    finished = ARRAY(SELECT job.id FROM "viralfx_ops".viralfx_finished_jobs AS job WHERE job.id = ANY(added));
    IF added_keys IS NOT NULL THEN
        finished = finished || ARRAY(
            SELECT job.id FROM "viralfx_ops".viralfx_jobs AS job
            WHERE job.id = ANY(added) AND job.key = ANY(ARRAY(
                SELECT known.key FROM "viralfx_ops".viralfx_finished_jobs AS known
                WHERE known.key IS NOT NULL AND known.key = ANY(added_keys)
            ))
        );
    END IF;
    IF finished <> '{}' THEN
        DELETE FROM "viralfx_ops".viralfx_jobs AS job WHERE job.id = ANY(finished);
    END IF;
    RETURN QUERY
        SELECT given.id, moment, given.run_at
        FROM unnest(added, added_run_ats) AS given (id, run_at)
        WHERE given.id <> ALL(finished);
END
$$;

CREATE FUNCTION viralfx_ops.viralfx_choose_by_key(of_queue text, by_worker text, of_task text, of_priority integer, until timestamp with time zone, want integer, concurrency integer, rate integer, period double precision, OUT ids uuid[], OUT again_in double precision) RETURNS record
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
#variable_conflict use_column
DECLARE
    most_keys CONSTANT integer = 256;
    started_after text;
    looked boolean;
    -- The keys that were visited; how many more jobs each may start, less than none if it has no
    -- job in `ids`; and the seconds until it may start others.
    keys text[];
    lefts integer[];
    waits float8[];
    batch record;
    added uuid[];
    share integer;
    part integer;
BEGIN
    SELECT last_key, looked_at BETWEEN clock_timestamp() - interval '50 ms' AND clock_timestamp()
    INTO started_after, looked FROM "viralfx_ops".viralfx_task_limits WHERE task = of_task AND key = '';
    FOR pass IN 1..2 LOOP
        IF pass = 2 OR looked IS NOT TRUE THEN
            added = ARRAY(
                SELECT id FROM (
                    SELECT id, concurrency_key FROM "viralfx_ops".viralfx_jobs
                    WHERE state = 'waiting' AND queue = of_queue AND task = of_task AND priority = of_priority AND run_at <= until
                    ORDER BY run_at, id LIMIT want + 50
                ) AS head
                WHERE concurrency_key IS NULL
            );
            EXIT WHEN pass = 2 AND added = '{}';
            IF added <> '{}' THEN
                UPDATE "viralfx_ops".viralfx_jobs SET concurrency_key = '' WHERE id = ANY(ARRAY(
                    SELECT id FROM "viralfx_ops".viralfx_jobs
                    WHERE id = ANY(added) AND state IS NOT DISTINCT FROM 'waiting'
                    FOR UPDATE SKIP LOCKED
                ));
            END IF;
        END IF;
        ids = '{}';
        keys = '{}';
        lefts = '{}';
        waits = '{}';
        FOR turn IN 1..2 LOOP
            EXIT WHEN cardinality(ids) >= want OR cardinality(keys) >= most_keys;
            EXIT WHEN turn = 2 AND started_after IS NULL;
            FOR batch IN
                WITH RECURSIVE found AS (
                    SELECT CASE turn WHEN 1 THEN started_after END AS after, want AS size,
                        cardinality(ids) AS taken, cardinality(keys) AS visited,
                        NULL::uuid[] AS ids, NULL::text[] AS keys, NULL::integer[] AS lefts,
                        NULL::float8[] AS waits
                    UNION ALL
                    SELECT piece.keys[cardinality(piece.keys)], 2 * cardinality(piece.keys),
                        taken + startable, visited + cardinality(piece.keys), piece.ids, piece.keys,
                        piece.lefts, piece.waits
                    FROM found CROSS JOIN LATERAL (
                        SELECT count(*) FILTER (WHERE allowed > 0)::integer AS startable,
                            array_agg(id) FILTER (WHERE allowed > 0) AS ids, array_agg(key) AS keys,
                            array_agg(greatest(allowed, 0) - 1) AS lefts, array_agg(wait) AS waits
                        FROM (
                            SELECT key, id,
                                CASE WHEN run_at <= until THEN least(want, free.places, past.starts)
                                    ELSE 0 END AS allowed,
                                CASE WHEN run_at > until THEN 'infinity'
                                    WHEN concurrency IS NULL
                                        OR past.starts <= greatest(free.places, 0)
                                    THEN past.wait ELSE 1 END AS wait
                            FROM (
                                SELECT DISTINCT ON (key) key, run_at, id FROM (
                                    SELECT job.concurrency_key AS key, job.run_at, job.id
                                    FROM "viralfx_ops".viralfx_jobs AS job
                                    WHERE state = 'waiting' AND queue = of_queue AND task = of_task AND priority = of_priority AND (refused_by IS NULL OR by_worker <> ALL(refused_by))
                                        AND job.concurrency_key IS NOT NULL
                                        AND (job.concurrency_key, job.run_at) > (
                                            coalesce(found.after, ''), CASE WHEN found.after IS NULL
                                                THEN timestamptz '-infinity' ELSE 'infinity' END
                                        )
                                    ORDER BY job.concurrency_key, job.run_at, job.id
                                    LIMIT least(size, want - taken, most_keys - visited)
                                ) AS waiting
                                WHERE turn = 1 OR key <= started_after
                                ORDER BY key, run_at, id
                            ) AS following CROSS JOIN LATERAL (
                                SELECT concurrency - count(*)::integer AS places FROM (
                                    SELECT FROM "viralfx_ops".viralfx_jobs AS job
                                    WHERE state = 'active' AND task = of_task
                                        AND job.concurrency_key = following.key
                                        AND concurrency IS NOT NULL
                                    LIMIT concurrency
                                ) AS active
                            ) AS free LEFT JOIN LATERAL (
                                SELECT left_over.allowed AS starts, left_over.wait
                                FROM "viralfx_ops".viralfx_rate_left(of_task, '=' || following.key, rate, period)
                                    AS left_over
                                WHERE rate IS NOT NULL
                                OFFSET 0  -- Or it would be called without a rate, too.
                            ) AS past ON true
                        ) AS each
                    ) AS piece
                    WHERE taken < want AND visited < most_keys AND piece.keys IS NOT NULL
                )
                SELECT found.ids, found.keys, found.lefts, found.waits FROM found
                WHERE found.keys IS NOT NULL
            LOOP
                ids = ids || batch.ids;
                keys = keys || batch.keys;
                lefts = lefts || batch.lefts;
                waits = waits || batch.waits;
            END LOOP;
        END LOOP;
        EXIT WHEN cardinality(ids) >= want OR looked IS NOT TRUE;
    END LOOP;
    IF keys <> '{}' AND (ids <> '{}' OR cardinality(keys) >= most_keys) THEN
        INSERT INTO "viralfx_ops".viralfx_task_limits AS known (task, key, last_key, looked_at)
        VALUES (of_task, '', keys[cardinality(keys)], clock_timestamp())
        ON CONFLICT (task, key) DO UPDATE SET last_key = excluded.last_key, looked_at = CASE
            WHEN cardinality(ids) < want THEN NULL
            WHEN looked THEN known.looked_at ELSE excluded.looked_at
        END;
    END IF;
    LOOP
        share = want - cardinality(ids);
        EXIT WHEN share <= 0 OR NOT coalesce(0 < ANY(lefts), false);
        share = greatest(1, share / (SELECT count(*) FROM unnest(lefts) AS left_over
            WHERE left_over > 0));
        FOR place IN 1..cardinality(keys) LOOP
            part = least(share, coalesce(lefts[place], 0), want - cardinality(ids));
            CONTINUE WHEN part <= 0;
            added = ARRAY(
                SELECT id FROM "viralfx_ops".viralfx_jobs
                WHERE state = 'waiting' AND queue = of_queue AND task = of_task AND priority = of_priority AND concurrency_key = keys[place] AND run_at <= until
                    AND id <> ALL(ids) AND (refused_by IS NULL OR by_worker <> ALL(refused_by))
                ORDER BY run_at, id LIMIT part
            );
            ids = ids || added;
            -- NULL: it has no more jobs.
            lefts[place] = CASE WHEN cardinality(added) = part THEN lefts[place] - part END;
        END LOOP;
    END LOOP;
    again_in = CASE WHEN cardinality(ids) < want THEN least(
        'infinity',
        -- Other keys may have something left.
        CASE WHEN cardinality(keys) >= most_keys THEN CASE ids WHEN '{}' THEN 1 ELSE 0.25 END END,
        (
            SELECT min(past.wait) FROM unnest(lefts, waits) AS past (left_over, wait)
            WHERE left_over <= 0
        )
    ) ELSE 'infinity' END;
END
$$;

CREATE TABLE viralfx_ops.viralfx_jobs (
    id uuid NOT NULL,
    queue text NOT NULL,
    task text NOT NULL,
    state text NOT NULL,
    payload json NOT NULL,
    key text,
    correlation_id text,
    traceparent text,
    created_at timestamp with time zone NOT NULL,
    run_at timestamp with time zone NOT NULL,
    asked_run_at timestamp with time zone,
    started_at timestamp with time zone,
    finished_at timestamp with time zone,
    attempts integer DEFAULT 0 NOT NULL,
    crashes integer DEFAULT 0 NOT NULL,
    claims integer DEFAULT 0 NOT NULL,
    result json,
    error_code text,
    error_message text,
    worker text,
    receipt bigint,
    refused_by text[],
    user_id text,
    priority smallint DEFAULT 0 NOT NULL,
    concurrency_key text,
    history jsonb,
    progress json,
    unique_key text,
    unique_while_waiting boolean DEFAULT false NOT NULL,
    cancel_requested boolean DEFAULT false NOT NULL,
    max_attempts smallint,
    CONSTRAINT viralfx_jobs_state_check CHECK ((state = ANY (ARRAY['waiting'::text, 'scheduled'::text, 'active'::text, 'failed'::text])))
)
WITH (fillfactor='70', autovacuum_vacuum_scale_factor='0.01', autovacuum_vacuum_threshold='5000', autovacuum_vacuum_insert_scale_factor='0.05', autovacuum_analyze_scale_factor='0.02', autovacuum_analyze_threshold='1000', autovacuum_vacuum_cost_delay='1');

CREATE FUNCTION viralfx_ops.viralfx_claim_jobs(of_queue text, by_worker text, most integer, with_receipt bigint, known text[], in_order boolean, limited text[], concurrencies integer[], rates integer[], periods double precision[], keyed boolean[]) RETURNS TABLE(mixed boolean, again_in double precision, claimed viralfx_ops.viralfx_jobs)
    LANGUAGE plpgsql
    SET plan_cache_mode TO 'force_generic_plan'
    SET enable_seqscan TO 'off'
    SET enable_bitmapscan TO 'off'
    SET enable_sort TO 'off'
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
#variable_conflict use_column
DECLARE
    until CONSTANT timestamptz = statement_timestamp();
    want integer = most;
    again float8 = 'infinity';
    others boolean;
    -- The next group of each task; its priority is NULL after its last group.
    tasks text[];
    priorities integer[];
    due_ats timestamptz[];
    next_priority integer;
    next_due_at timestamptz;
    place integer;
    of_task text;
    chosen uuid[];
    chosen_keys text[];
    found_count integer;
    -- Of the limited tasks: whether this claim decides, what is left of the limits, and the seconds
    -- until there may be more.
    at integer;
    decides boolean[] = array_fill(false, ARRAY[cardinality(limited)]);
    lefts integer[] = array_fill(most, ARRAY[cardinality(limited)]);
    waits float8[] = array_fill(1::float8, ARRAY[cardinality(limited)]);
    allowed integer;
    wait float8;
BEGIN
    IF limited <> '{}' AND NOT in_order
        AND current_setting('transaction_isolation') <> 'read committed'
    THEN
        RAISE EXCEPTION 'jobs of limited tasks are claimed under READ COMMITTED only'
            USING ERRCODE = 'feature_not_supported';
    END IF;
    IF EXISTS (SELECT FROM "viralfx_ops".viralfx_paused_queues AS paused WHERE paused.queue = of_queue) THEN
        RETURN;
    END IF;
    IF NOT in_order THEN
        WITH RECURSIVE first AS (
            (
                SELECT task, priority, run_at FROM "viralfx_ops".viralfx_jobs
                WHERE state = 'waiting' AND queue = of_queue AND (refused_by IS NULL OR by_worker <> ALL(refused_by))
                ORDER BY task, priority DESC, run_at, id LIMIT 1
            )
            UNION ALL
            SELECT following.task, following.priority, following.run_at
            FROM first CROSS JOIN LATERAL (
                SELECT job.task, job.priority, job.run_at FROM "viralfx_ops".viralfx_jobs AS job
                WHERE state = 'waiting' AND queue = of_queue AND job.task > first.task
                    AND (refused_by IS NULL OR by_worker <> ALL(refused_by))
                ORDER BY job.task, job.priority DESC, job.run_at, job.id LIMIT 1
            ) AS following
        )
        SELECT array_agg(task) FILTER (WHERE wanted), array_agg(priority) FILTER (WHERE wanted),
            array_agg(run_at) FILTER (WHERE wanted), bool_or(NOT wanted OR task = ANY(limited))
        INTO tasks, priorities, due_ats, others
        FROM (
            SELECT first.*, coalesce(task = ANY(known), known IS NULL) AS wanted FROM first
        ) AS waiting;
    END IF;
    WHILE want > 0 LOOP
        chosen = '{}';
        at = NULL;
        IF others THEN
            SELECT groups.place::integer INTO place
            FROM unnest(priorities, due_ats) WITH ORDINALITY AS groups (priority, due_at, place)
            WHERE groups.priority IS NOT NULL
            ORDER BY groups.priority DESC, groups.due_at LIMIT 1;
            EXIT WHEN NOT FOUND;
            of_task = tasks[place];
            at = array_position(limited, of_task);
            IF due_ats[place] > until THEN
                NULL;
            ELSIF at IS NULL THEN
                chosen = ARRAY(
                    SELECT id FROM "viralfx_ops".viralfx_jobs
                    WHERE state = 'waiting' AND queue = of_queue AND task = of_task
                        AND priority = priorities[place] AND run_at <= until AND (refused_by IS NULL OR by_worker <> ALL(refused_by))
                    ORDER BY run_at, id LIMIT want FOR UPDATE SKIP LOCKED
                );
            ELSE
                IF NOT decides[at] THEN
                    decides[at] = pg_try_advisory_xact_lock(hashtextextended(
                        of_task, '"viralfx_ops".viralfx_task_limits'::regclass::oid::bigint
                    ));
                    IF NOT decides[at] THEN
                        again = least(again, 0.005 + 0.015 * random());
                        priorities[place] = NULL;
                        CONTINUE;
                    END IF;
                    IF concurrencies[at] IS NOT NULL AND NOT keyed[at] THEN
                        SELECT least(most, concurrencies[at] - count(*)) INTO allowed FROM (
                            SELECT FROM "viralfx_ops".viralfx_jobs WHERE state = 'active' AND task = of_task
                            LIMIT concurrencies[at]
                        ) AS active;
                        lefts[at] = allowed;
                    END IF;
                    IF rates[at] IS NOT NULL AND NOT keyed[at] THEN
                        SELECT left_over.allowed, left_over.wait INTO allowed, wait
                        FROM "viralfx_ops".viralfx_rate_left(of_task, '', rates[at], periods[at]) AS left_over;
                        IF allowed < lefts[at] THEN
                            lefts[at] = allowed;
                            waits[at] = wait;
                        END IF;
                    END IF;
                END IF;
                IF keyed[at] THEN
                    SELECT found.ids, least(again, found.again_in) INTO chosen, again
                    FROM "viralfx_ops".viralfx_choose_by_key(
                        of_queue, by_worker, of_task, priorities[place], until, want,
                        concurrencies[at], rates[at], periods[at]
                    ) AS found;
                    found_count = cardinality(chosen);
                    SELECT coalesce(array_agg(id), '{}'), array_agg('=' || concurrency_key)
                    INTO chosen, chosen_keys FROM (
                        SELECT id, coalesce(concurrency_key, '') AS concurrency_key
                        FROM "viralfx_ops".viralfx_jobs
                        WHERE id = ANY(chosen) AND state IS NOT DISTINCT FROM 'waiting'
                        FOR UPDATE SKIP LOCKED
                    ) AS locked;
                    IF cardinality(chosen) < found_count THEN
                        -- Another transaction has locked some. The next claim begins after them.
                        again = least(again, 0.25);
                    END IF;
                ELSIF lefts[at] > 0 THEN
                    chosen = ARRAY(
                        SELECT id FROM "viralfx_ops".viralfx_jobs
                        WHERE state = 'waiting' AND queue = of_queue AND task = of_task
                            AND priority = priorities[place] AND run_at <= until
                            AND (refused_by IS NULL OR by_worker <> ALL(refused_by))
                        ORDER BY run_at, id LIMIT least(want, lefts[at]) FOR UPDATE SKIP LOCKED
                    );
                    chosen_keys = array_fill(''::text, ARRAY[cardinality(chosen)]);
                    lefts[at] = lefts[at] - cardinality(chosen);
                END IF;
                IF NOT keyed[at] AND lefts[at] <= 0 THEN
                    again = least(again, waits[at]);
                    due_ats[place] = NULL;
                END IF;
            END IF;
        ELSE
            -- In order, of any task; from priority to priority, since at each of them
            -- jobs may wait that are not due yet.
            chosen = ARRAY(
                WITH RECURSIVE levels AS (
                    (
                        SELECT priority FROM "viralfx_ops".viralfx_jobs
                        WHERE state = 'waiting' AND claims >= 0 AND queue = of_queue
                        ORDER BY priority DESC, run_at, id LIMIT 1
                    )
                    UNION ALL
                    SELECT lower.priority FROM levels CROSS JOIN LATERAL (
                        SELECT job.priority FROM "viralfx_ops".viralfx_jobs AS job
                        WHERE state = 'waiting' AND job.claims >= 0 AND queue = of_queue
                            AND job.priority < levels.priority
                        ORDER BY job.priority DESC, job.run_at, job.id LIMIT 1
                    ) AS lower
                )
                SELECT due.id FROM levels CROSS JOIN LATERAL (
                    SELECT job.id FROM "viralfx_ops".viralfx_jobs AS job
                    WHERE state = 'waiting' AND job.claims >= 0 AND queue = of_queue
                        AND job.priority = levels.priority AND run_at <= until
                        AND (known IS NULL OR task = ANY(known)) AND task <> ALL(limited)
                        AND (refused_by IS NULL OR by_worker <> ALL(refused_by))
                    ORDER BY job.run_at, job.id LIMIT want FOR UPDATE SKIP LOCKED
                ) AS due
                LIMIT want
            );
        END IF;
        IF chosen <> '{}' THEN
            RETURN QUERY
            UPDATE "viralfx_ops".viralfx_jobs AS job
            SET state = 'active', worker = by_worker, receipt = with_receipt, claims = claims + 1,
                started_at = until
            WHERE id = ANY(chosen) AND state IS NOT DISTINCT FROM 'waiting'
            RETURNING NULL::boolean, NULL::float8, job;
            want = want - cardinality(chosen);
            IF rates[at] IS NOT NULL THEN
                -- Starts that are closer together than a hundredth of the period become one entry
                -- with the time of the last one, so that the row stays small.
                INSERT INTO "viralfx_ops".viralfx_task_limits AS old (task, key, moments, starts, expires_at)
                SELECT of_task, start.key, ARRAY[clock_timestamp()], ARRAY[count(*)::integer],
                    clock_timestamp() + make_interval(secs => periods[at])
                FROM unnest(chosen_keys) AS start (key) GROUP BY start.key
                ON CONFLICT (task, key) DO UPDATE SET expires_at = excluded.expires_at,
                    (moments, starts) = (
                        SELECT array_agg(moment ORDER BY moment), array_agg(start ORDER BY moment)
                        FROM (
                            SELECT max(moment) AS moment, sum(start)::integer AS start
                            FROM unnest(
                                old.moments || excluded.moments, old.starts || excluded.starts
                            ) AS past (moment, start)
                            WHERE moment > clock_timestamp() - make_interval(secs => periods[at])
                            GROUP BY floor(extract(epoch FROM moment) * 100 / periods[at])
                        ) AS merged
                    );
            END IF;
        END IF;
        EXIT WHEN NOT coalesce(others, false);
        IF due_ats[place] IS NULL THEN
            priorities[place] = NULL;
        ELSE
            SELECT job.priority, job.run_at INTO next_priority, next_due_at
            FROM "viralfx_ops".viralfx_jobs AS job
            WHERE state = 'waiting' AND queue = of_queue AND task = of_task
                AND job.priority < priorities[place] AND (refused_by IS NULL OR by_worker <> ALL(refused_by))
            ORDER BY job.priority DESC, job.run_at, job.id LIMIT 1;
            priorities[place] = next_priority;
            due_ats[place] = next_due_at;
        END IF;
    END LOOP;
    RETURN QUERY SELECT coalesce(others, false), nullif(again, 'infinity'), NULL::"viralfx_ops".viralfx_jobs;
END
$$;

CREATE FUNCTION viralfx_ops.viralfx_count_deleted_jobs() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
    INSERT INTO "viralfx_ops".viralfx_job_counters (queue, state, count)
    SELECT queue, state, -count(*) FROM before_it
    WHERE state <> 'failed' GROUP BY queue, state;
    RETURN NULL;
END
$$;

CREATE FUNCTION viralfx_ops.viralfx_count_inserted_jobs() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
    INSERT INTO "viralfx_ops".viralfx_job_counters (queue, state, count)
    SELECT queue, state, count(*) FROM after_it GROUP BY queue, state;
    RETURN NULL;
END
$$;

CREATE FUNCTION viralfx_ops.viralfx_count_truncated_jobs() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
    DELETE FROM "viralfx_ops".viralfx_job_counters WHERE state IN ('waiting', 'scheduled', 'active');
    RETURN NULL;
END
$$;

CREATE FUNCTION viralfx_ops.viralfx_count_updated_jobs() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
    INSERT INTO "viralfx_ops".viralfx_job_counters (queue, state, count)
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

CREATE FUNCTION viralfx_ops.viralfx_rate_left(of_task text, of_key text, rate integer, period double precision, OUT allowed integer, OUT wait double precision) RETURNS record
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
    SELECT rate - coalesce(sum(start), 0)::integer,
        coalesce(period - extract(epoch FROM clock_timestamp() - min(moment))::float8, period)
    FROM "viralfx_ops".viralfx_task_limits AS known, unnest(known.moments, known.starts) AS past (moment, start)
    WHERE known.task = of_task AND known.key = of_key
        AND moment > clock_timestamp() - make_interval(secs => period)
$$;

CREATE TABLE viralfx_ops.viralfx_finished_jobs (
    id uuid NOT NULL,
    queue text NOT NULL,
    task text NOT NULL,
    state text NOT NULL,
    payload json NOT NULL,
    key text,
    correlation_id text,
    traceparent text,
    created_at timestamp with time zone NOT NULL,
    run_at timestamp with time zone NOT NULL,
    asked_run_at timestamp with time zone,
    started_at timestamp with time zone,
    finished_at timestamp with time zone NOT NULL,
    attempts integer DEFAULT 0 NOT NULL,
    crashes integer DEFAULT 0 NOT NULL,
    claims integer DEFAULT 0 NOT NULL,
    result json,
    error_code text,
    error_message text,
    user_id text,
    priority smallint DEFAULT 0 NOT NULL,
    concurrency_key text,
    history jsonb,
    progress json,
    max_attempts smallint,
    CONSTRAINT viralfx_finished_jobs_state_check CHECK ((state = ANY (ARRAY['completed'::text, 'cancelled'::text])))
)
WITH (autovacuum_vacuum_scale_factor='0.05', autovacuum_vacuum_threshold='5000', autovacuum_analyze_scale_factor='0.05', autovacuum_analyze_threshold='1000', autovacuum_vacuum_cost_delay='1');

CREATE VIEW viralfx_ops.viralfx_all_jobs AS
 SELECT viralfx_jobs.id,
    viralfx_jobs.queue,
    viralfx_jobs.task,
    viralfx_jobs.payload,
    viralfx_jobs.key,
    viralfx_jobs.correlation_id,
    viralfx_jobs.traceparent,
    viralfx_jobs.user_id,
    viralfx_jobs.priority,
    viralfx_jobs.concurrency_key,
    viralfx_jobs.created_at,
    viralfx_jobs.run_at,
    viralfx_jobs.asked_run_at,
    viralfx_jobs.started_at,
    viralfx_jobs.finished_at,
    viralfx_jobs.attempts,
    viralfx_jobs.crashes,
    viralfx_jobs.claims,
    viralfx_jobs.result,
    viralfx_jobs.error_code,
    viralfx_jobs.error_message,
    viralfx_jobs.history,
    viralfx_jobs.progress,
    viralfx_jobs.worker,
    viralfx_jobs.cancel_requested,
        CASE viralfx_jobs.state
            WHEN 'scheduled'::text THEN 'waiting'::text
            ELSE viralfx_jobs.state
        END AS state,
    viralfx_jobs.max_attempts
   FROM viralfx_ops.viralfx_jobs
UNION ALL
 SELECT viralfx_finished_jobs.id,
    viralfx_finished_jobs.queue,
    viralfx_finished_jobs.task,
    viralfx_finished_jobs.payload,
    viralfx_finished_jobs.key,
    viralfx_finished_jobs.correlation_id,
    viralfx_finished_jobs.traceparent,
    viralfx_finished_jobs.user_id,
    viralfx_finished_jobs.priority,
    viralfx_finished_jobs.concurrency_key,
    viralfx_finished_jobs.created_at,
    viralfx_finished_jobs.run_at,
    viralfx_finished_jobs.asked_run_at,
    viralfx_finished_jobs.started_at,
    viralfx_finished_jobs.finished_at,
    viralfx_finished_jobs.attempts,
    viralfx_finished_jobs.crashes,
    viralfx_finished_jobs.claims,
    viralfx_finished_jobs.result,
    viralfx_finished_jobs.error_code,
    viralfx_finished_jobs.error_message,
    viralfx_finished_jobs.history,
    viralfx_finished_jobs.progress,
    NULL::text AS worker,
    false AS cancel_requested,
    viralfx_finished_jobs.state,
    viralfx_finished_jobs.max_attempts
   FROM viralfx_ops.viralfx_finished_jobs;

CREATE TABLE viralfx_ops.viralfx_instances (
    instance text NOT NULL,
    host text NOT NULL,
    role text NOT NULL,
    version text NOT NULL,
    environment text NOT NULL,
    started_at timestamp with time zone NOT NULL,
    seen_at timestamp with time zone NOT NULL,
    state text NOT NULL,
    reason text NOT NULL,
    health text NOT NULL,
    checks json NOT NULL,
    jobs integer NOT NULL,
    queues text[] NOT NULL,
    backend integer
)
WITH (fillfactor='50', autovacuum_vacuum_scale_factor='0', autovacuum_vacuum_threshold='500');

CREATE TABLE viralfx_ops.viralfx_job_counters (
    queue text NOT NULL,
    state text NOT NULL,
    count bigint NOT NULL
)
WITH (autovacuum_vacuum_scale_factor='0', autovacuum_vacuum_threshold='1000');

CREATE TABLE viralfx_ops.viralfx_migrations (
    version_num character varying(32) NOT NULL
);

CREATE TABLE viralfx_ops.viralfx_paused_queues (
    queue text NOT NULL,
    paused_at timestamp with time zone NOT NULL
);

CREATE TABLE viralfx_ops.viralfx_schedules (
    task text NOT NULL,
    cron text NOT NULL,
    timezone text NOT NULL,
    since timestamp with time zone NOT NULL,
    last_run_at timestamp with time zone,
    seen_at timestamp with time zone NOT NULL,
    paused_at timestamp with time zone,
    resumed_at timestamp with time zone
);

CREATE TABLE viralfx_ops.viralfx_state (
    instance text NOT NULL,
    saved_at timestamp with time zone NOT NULL,
    state json NOT NULL
);

CREATE TABLE viralfx_ops.viralfx_task_limits (
    task text NOT NULL,
    key text NOT NULL,
    last_key text,
    looked_at timestamp with time zone,
    moments timestamp with time zone[] DEFAULT '{}'::timestamp with time zone[] NOT NULL,
    starts integer[] DEFAULT '{}'::integer[] NOT NULL,
    expires_at timestamp with time zone
)
WITH (fillfactor='50', autovacuum_vacuum_scale_factor='0', autovacuum_vacuum_threshold='500');

CREATE TABLE viralfx_ops.viralfx_transitions (
    instance text NOT NULL,
    number bigint NOT NULL,
    check_name text NOT NULL,
    at timestamp with time zone NOT NULL,
    old text,
    new text NOT NULL,
    code text
);

CREATE TABLE viralfx_ops.viralfx_unknown_tasks (
    queue text NOT NULL,
    task text NOT NULL,
    since timestamp with time zone NOT NULL,
    seen_at timestamp with time zone NOT NULL
);

CREATE TABLE viralfx_ops.viralfx_workers (
    worker text NOT NULL,
    queues text[] NOT NULL,
    tasks text[],
    eligible boolean DEFAULT true NOT NULL,
    lease_until timestamp with time zone NOT NULL
)
WITH (fillfactor='50', autovacuum_vacuum_scale_factor='0', autovacuum_vacuum_threshold='500');

ALTER TABLE ONLY viralfx_ops.viralfx_finished_jobs
    ADD CONSTRAINT viralfx_finished_jobs_pkey PRIMARY KEY (id);

ALTER TABLE ONLY viralfx_ops.viralfx_instances
    ADD CONSTRAINT viralfx_instances_pkey PRIMARY KEY (instance);

ALTER TABLE ONLY viralfx_ops.viralfx_jobs
    ADD CONSTRAINT viralfx_jobs_pkey PRIMARY KEY (id);

ALTER TABLE ONLY viralfx_ops.viralfx_migrations
    ADD CONSTRAINT viralfx_migrations_pkc PRIMARY KEY (version_num);

ALTER TABLE ONLY viralfx_ops.viralfx_paused_queues
    ADD CONSTRAINT viralfx_paused_queues_pkey PRIMARY KEY (queue);

ALTER TABLE ONLY viralfx_ops.viralfx_schedules
    ADD CONSTRAINT viralfx_schedules_pkey PRIMARY KEY (task);

ALTER TABLE ONLY viralfx_ops.viralfx_state
    ADD CONSTRAINT viralfx_state_pkey PRIMARY KEY (instance);

ALTER TABLE ONLY viralfx_ops.viralfx_task_limits
    ADD CONSTRAINT viralfx_task_limits_pkey PRIMARY KEY (task, key);

ALTER TABLE ONLY viralfx_ops.viralfx_transitions
    ADD CONSTRAINT viralfx_transitions_pkey PRIMARY KEY (instance, number);

ALTER TABLE ONLY viralfx_ops.viralfx_unknown_tasks
    ADD CONSTRAINT viralfx_unknown_tasks_pkey PRIMARY KEY (queue, task);

ALTER TABLE ONLY viralfx_ops.viralfx_workers
    ADD CONSTRAINT viralfx_workers_pkey PRIMARY KEY (worker);

CREATE INDEX viralfx_finished_jobs_age ON viralfx_ops.viralfx_finished_jobs USING btree (finished_at);

CREATE INDEX viralfx_finished_jobs_key ON viralfx_ops.viralfx_finished_jobs USING btree (key) WHERE (key IS NOT NULL);

CREATE INDEX viralfx_finished_jobs_pages ON viralfx_ops.viralfx_finished_jobs USING btree (queue, state, id);

CREATE INDEX viralfx_jobs_active ON viralfx_ops.viralfx_jobs USING btree (task, concurrency_key, worker) WHERE (state = 'active'::text);

CREATE INDEX viralfx_jobs_cancelled ON viralfx_ops.viralfx_jobs USING btree (worker) WHERE cancel_requested;

CREATE INDEX viralfx_jobs_failed ON viralfx_ops.viralfx_jobs USING btree (finished_at) WHERE (state = 'failed'::text);

CREATE UNIQUE INDEX viralfx_jobs_key ON viralfx_ops.viralfx_jobs USING btree (key) WHERE (key IS NOT NULL);

CREATE INDEX viralfx_jobs_pages ON viralfx_ops.viralfx_jobs USING btree (queue, state, id) WHERE (state <> 'active'::text);

CREATE INDEX viralfx_jobs_refused ON viralfx_ops.viralfx_jobs USING btree (run_at) WHERE ((state = 'waiting'::text) AND (refused_by IS NOT NULL));

CREATE INDEX viralfx_jobs_scheduled ON viralfx_ops.viralfx_jobs USING btree (run_at) WHERE (state = 'scheduled'::text);

CREATE UNIQUE INDEX viralfx_jobs_unique ON viralfx_ops.viralfx_jobs USING btree (unique_key) WHERE ((unique_key IS NOT NULL) AND (state <> 'failed'::text) AND (NOT cancel_requested) AND ((claims = 0) OR (NOT unique_while_waiting)));

CREATE INDEX viralfx_jobs_waiting ON viralfx_ops.viralfx_jobs USING btree (queue, priority DESC, run_at, id) WHERE ((state = 'waiting'::text) AND (claims >= 0));

CREATE INDEX viralfx_jobs_waiting_keys ON viralfx_ops.viralfx_jobs USING btree (queue, task, priority DESC, concurrency_key, run_at, id) WHERE ((state = 'waiting'::text) AND (concurrency_key IS NOT NULL));

CREATE INDEX viralfx_jobs_waiting_tasks ON viralfx_ops.viralfx_jobs USING btree (queue, task, priority DESC, run_at, id) WHERE (state = 'waiting'::text);

CREATE INDEX viralfx_state_saved_at ON viralfx_ops.viralfx_state USING btree (saved_at);

CREATE INDEX viralfx_transitions_at ON viralfx_ops.viralfx_transitions USING btree (at);

CREATE TRIGGER viralfx_finished_jobs_inserted AFTER INSERT ON viralfx_ops.viralfx_finished_jobs REFERENCING NEW TABLE AS after_it FOR EACH STATEMENT EXECUTE FUNCTION viralfx_ops.viralfx_count_inserted_jobs();

CREATE TRIGGER viralfx_jobs_deleted AFTER DELETE ON viralfx_ops.viralfx_jobs REFERENCING OLD TABLE AS before_it FOR EACH STATEMENT EXECUTE FUNCTION viralfx_ops.viralfx_count_deleted_jobs();

CREATE TRIGGER viralfx_jobs_inserted AFTER INSERT ON viralfx_ops.viralfx_jobs REFERENCING NEW TABLE AS after_it FOR EACH STATEMENT EXECUTE FUNCTION viralfx_ops.viralfx_count_inserted_jobs();

CREATE TRIGGER viralfx_jobs_truncated AFTER TRUNCATE ON viralfx_ops.viralfx_jobs FOR EACH STATEMENT EXECUTE FUNCTION viralfx_ops.viralfx_count_truncated_jobs();

CREATE TRIGGER viralfx_jobs_updated AFTER UPDATE ON viralfx_ops.viralfx_jobs REFERENCING OLD TABLE AS before_it NEW TABLE AS after_it FOR EACH STATEMENT EXECUTE FUNCTION viralfx_ops.viralfx_count_updated_jobs();

INSERT INTO viralfx_ops.viralfx_migrations VALUES ('0006');
