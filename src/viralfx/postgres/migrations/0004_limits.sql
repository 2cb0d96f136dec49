-- Claims by priority, and limits of tasks over all workers.

-- While the indexes are built, jobs are read, but not changed. No lock excludes readers.
--
-- Only for statements that say `claims >= 0`, which is always so. A claim of one task must not use
-- it, or it might pass over many jobs of other tasks: its plan may be older than those.
CREATE INDEX viralfx_jobs_waiting ON viralfx_ops.viralfx_jobs (queue, priority DESC, run_at, id)
WHERE state = 'waiting' AND claims >= 0;
-- For claims while jobs of unknown or limited tasks wait, and for the tasks that wait.
CREATE INDEX viralfx_jobs_waiting_tasks
ON viralfx_ops.viralfx_jobs (queue, task, priority DESC, run_at, id)
WHERE state = 'waiting';
-- From one concurrency key to the next. A job without a key has no entry here.
CREATE INDEX viralfx_jobs_waiting_keys
ON viralfx_ops.viralfx_jobs (queue, task, priority DESC, concurrency_key, run_at, id)
WHERE state = 'waiting' AND concurrency_key IS NOT NULL;
-- Counts the active jobs of a task or a key. There are few active jobs, so those of a worker are
-- found in it, too; a second index would cost each claim an entry more.
CREATE INDEX viralfx_jobs_active ON viralfx_ops.viralfx_jobs (task, concurrency_key, worker)
WHERE state = 'active';
CREATE INDEX viralfx_jobs_cancelled ON viralfx_ops.viralfx_jobs (worker) WHERE cancel_requested;

-- The state of limits beyond the active jobs: the starts within the period of a rate, the key that
-- was served last, and when a claim that took all that it wanted looked for jobs without a key. The
-- key is '' for the task as a whole, else '=' and the concurrency key.
CREATE TABLE viralfx_ops.viralfx_task_limits (
    task text NOT NULL,
    key text NOT NULL,
    last_key text,
    looked_at timestamptz,
    moments timestamptz[] NOT NULL DEFAULT '{}',
    starts integer[] NOT NULL DEFAULT '{}',
    expires_at timestamptz,
    PRIMARY KEY (task, key)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);

-- How many jobs a rate still lets start, and when it lets the next one start.
CREATE FUNCTION viralfx_ops.viralfx_rate_left(
    of_task text, of_key text, rate integer, period float8,
    OUT allowed integer, OUT wait float8
) LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT rate - coalesce(sum(start), 0)::integer,
        coalesce(period - extract(epoch FROM clock_timestamp() - min(moment))::float8, period)
    FROM viralfx_ops.viralfx_task_limits AS known, unnest(known.moments, known.starts) AS past (moment, start)
    WHERE known.task = of_task AND known.key = of_key
        AND moment > clock_timestamp() - make_interval(secs => period)
$$;

-- Up to `want` due jobs of a task and priority whose keys have something left: one of each key in
-- turn, from the key after the last one on, then more of these keys. The caller locks them. The
-- settings of the caller hold here, too.
--
-- The empty key is that of jobs without a key. It is NULL if the job was accepted without knowledge
-- of its task. Such jobs get the empty key once they are among the oldest ones. A claim looks for
-- them if it could take more, or if none has looked for a moment.
--
-- The index is read in pieces, since a probe for each key would cost more. A piece with the jobs of
-- few keys is followed by a smaller one, so that a key with many jobs costs little.
CREATE FUNCTION viralfx_ops.viralfx_choose_by_key(
    of_queue text, by_worker text, of_task text, of_priority integer, until timestamptz,
    want integer, concurrency integer, rate integer, period float8,
    OUT ids uuid[], OUT again_in float8
) LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
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
    INTO started_after, looked FROM viralfx_ops.viralfx_task_limits WHERE task = of_task AND key = '';
    FOR pass IN 1..2 LOOP
        IF pass = 2 OR looked IS NOT TRUE THEN
            added = ARRAY(
                SELECT id FROM (
                    SELECT id, concurrency_key FROM viralfx_ops.viralfx_jobs
                    WHERE state = 'waiting' AND queue = of_queue AND task = of_task AND priority = of_priority AND run_at <= until
                    ORDER BY run_at, id LIMIT want + 50
                ) AS head
                WHERE concurrency_key IS NULL
            );
            EXIT WHEN pass = 2 AND added = '{}';
            IF added <> '{}' THEN
                UPDATE viralfx_ops.viralfx_jobs SET concurrency_key = '' WHERE id = ANY(ARRAY(
                    SELECT id FROM viralfx_ops.viralfx_jobs
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
                                    FROM viralfx_ops.viralfx_jobs AS job
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
                                    SELECT FROM viralfx_ops.viralfx_jobs AS job
                                    WHERE state = 'active' AND task = of_task
                                        AND job.concurrency_key = following.key
                                        AND concurrency IS NOT NULL
                                    LIMIT concurrency
                                ) AS active
                            ) AS free LEFT JOIN LATERAL (
                                SELECT left_over.allowed AS starts, left_over.wait
                                FROM viralfx_ops.viralfx_rate_left(of_task, '=' || following.key, rate, period)
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
        INSERT INTO viralfx_ops.viralfx_task_limits AS known (task, key, last_key, looked_at)
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
                SELECT id FROM viralfx_ops.viralfx_jobs
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

-- Claims jobs of the tasks that are known, each within its limits; see CLAIM_BY_TASK.
--
-- One statement for each step, so that each sees the claims that were committed before it: the lock
-- of a task is of no use to a statement whose snapshot is older than the lock. The lock is held
-- until the commit, so one claim at a time counts the active jobs of the task and adds to them.
-- Another one does not wait for it, but takes other tasks and comes back.
--
-- A group is the jobs of one task with one priority. Groups are taken by priority and due time, and
-- those of a task one after the other, so that no group is read that is not needed. Plans for empty
-- tables would be kept while the tables grow, so only those with an index in the right order are
-- on.
CREATE FUNCTION viralfx_ops.viralfx_claim_jobs(
    of_queue text, by_worker text, most integer, with_receipt bigint, known text[],
    in_order boolean, limited text[], concurrencies integer[], rates integer[],
    periods float8[], keyed boolean[]
) RETURNS TABLE (mixed boolean, again_in float8, claimed viralfx_ops.viralfx_jobs) LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
SET search_path = pg_catalog, pg_temp AS $$
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
    IF EXISTS (SELECT FROM viralfx_ops.viralfx_paused_queues AS paused WHERE paused.queue = of_queue) THEN
        RETURN;
    END IF;
    IF NOT in_order THEN
        WITH RECURSIVE first AS (
            (
                SELECT task, priority, run_at FROM viralfx_ops.viralfx_jobs
                WHERE state = 'waiting' AND queue = of_queue AND (refused_by IS NULL OR by_worker <> ALL(refused_by))
                ORDER BY task, priority DESC, run_at, id LIMIT 1
            )
            UNION ALL
            SELECT following.task, following.priority, following.run_at
            FROM first CROSS JOIN LATERAL (
                SELECT job.task, job.priority, job.run_at FROM viralfx_ops.viralfx_jobs AS job
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
                    SELECT id FROM viralfx_ops.viralfx_jobs
                    WHERE state = 'waiting' AND queue = of_queue AND task = of_task
                        AND priority = priorities[place] AND run_at <= until AND (refused_by IS NULL OR by_worker <> ALL(refused_by))
                    ORDER BY run_at, id LIMIT want FOR UPDATE SKIP LOCKED
                );
            ELSE
                IF NOT decides[at] THEN
                    decides[at] = pg_try_advisory_xact_lock(hashtextextended(
                        of_task, 'viralfx_ops.viralfx_task_limits'::regclass::oid::bigint
                    ));
                    IF NOT decides[at] THEN
                        again = least(again, 0.005 + 0.015 * random());
                        priorities[place] = NULL;
                        CONTINUE;
                    END IF;
                    IF concurrencies[at] IS NOT NULL AND NOT keyed[at] THEN
                        SELECT least(most, concurrencies[at] - count(*)) INTO allowed FROM (
                            SELECT FROM viralfx_ops.viralfx_jobs WHERE state = 'active' AND task = of_task
                            LIMIT concurrencies[at]
                        ) AS active;
                        lefts[at] = allowed;
                    END IF;
                    IF rates[at] IS NOT NULL AND NOT keyed[at] THEN
                        SELECT left_over.allowed, left_over.wait INTO allowed, wait
                        FROM viralfx_ops.viralfx_rate_left(of_task, '', rates[at], periods[at]) AS left_over;
                        IF allowed < lefts[at] THEN
                            lefts[at] = allowed;
                            waits[at] = wait;
                        END IF;
                    END IF;
                END IF;
                IF keyed[at] THEN
                    SELECT found.ids, least(again, found.again_in) INTO chosen, again
                    FROM viralfx_ops.viralfx_choose_by_key(
                        of_queue, by_worker, of_task, priorities[place], until, want,
                        concurrencies[at], rates[at], periods[at]
                    ) AS found;
                    found_count = cardinality(chosen);
                    SELECT coalesce(array_agg(id), '{}'), array_agg('=' || concurrency_key)
                    INTO chosen, chosen_keys FROM (
                        SELECT id, coalesce(concurrency_key, '') AS concurrency_key
                        FROM viralfx_ops.viralfx_jobs
                        WHERE id = ANY(chosen) AND state IS NOT DISTINCT FROM 'waiting'
                        FOR UPDATE SKIP LOCKED
                    ) AS locked;
                    IF cardinality(chosen) < found_count THEN
                        -- Another transaction has locked some. The next claim begins after them.
                        again = least(again, 0.25);
                    END IF;
                ELSIF lefts[at] > 0 THEN
                    chosen = ARRAY(
                        SELECT id FROM viralfx_ops.viralfx_jobs
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
                        SELECT priority FROM viralfx_ops.viralfx_jobs
                        WHERE state = 'waiting' AND claims >= 0 AND queue = of_queue
                        ORDER BY priority DESC, run_at, id LIMIT 1
                    )
                    UNION ALL
                    SELECT lower.priority FROM levels CROSS JOIN LATERAL (
                        SELECT job.priority FROM viralfx_ops.viralfx_jobs AS job
                        WHERE state = 'waiting' AND job.claims >= 0 AND queue = of_queue
                            AND job.priority < levels.priority
                        ORDER BY job.priority DESC, job.run_at, job.id LIMIT 1
                    ) AS lower
                )
                SELECT due.id FROM levels CROSS JOIN LATERAL (
                    SELECT job.id FROM viralfx_ops.viralfx_jobs AS job
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
            UPDATE viralfx_ops.viralfx_jobs AS job
            SET state = 'active', worker = by_worker, receipt = with_receipt, claims = claims + 1,
                started_at = until
            WHERE id = ANY(chosen) AND state IS NOT DISTINCT FROM 'waiting'
            RETURNING NULL::boolean, NULL::float8, job;
            want = want - cardinality(chosen);
            IF rates[at] IS NOT NULL THEN
                -- Starts that are closer together than a hundredth of the period become one entry
                -- with the time of the last one, so that the row stays small.
                INSERT INTO viralfx_ops.viralfx_task_limits AS old (task, key, moments, starts, expires_at)
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
            FROM viralfx_ops.viralfx_jobs AS job
            WHERE state = 'waiting' AND queue = of_queue AND task = of_task
                AND job.priority < priorities[place] AND (refused_by IS NULL OR by_worker <> ALL(refused_by))
            ORDER BY job.priority DESC, job.run_at, job.id LIMIT 1;
            priorities[place] = next_priority;
            due_ats[place] = next_due_at;
        END IF;
    END LOOP;
    RETURN QUERY SELECT coalesce(others, false), nullif(again, 'infinity'), NULL::viralfx_ops.viralfx_jobs;
END
$$;
