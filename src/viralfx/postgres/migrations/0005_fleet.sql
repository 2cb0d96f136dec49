-- The processes of the fleet, and the changes of their checks.

-- Each process replaces its own row every few seconds. No index has a column that a beat changes,
-- so that the new version of the row fits on the page of the old one.
CREATE TABLE viralfx_ops.viralfx_instances (
    instance text PRIMARY KEY,
    host text NOT NULL,
    role text NOT NULL,
    version text NOT NULL,
    environment text NOT NULL,
    started_at timestamptz NOT NULL,
    seen_at timestamptz NOT NULL,
    state text NOT NULL,
    reason text NOT NULL,
    health text NOT NULL,
    checks json NOT NULL,
    jobs integer NOT NULL,
    queues text[] NOT NULL,
    backend integer
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);

-- Without a reference to the instance: the row of an instance may be pruned first.
CREATE TABLE viralfx_ops.viralfx_transitions (
    instance text NOT NULL,
    number bigint NOT NULL,
    check_name text NOT NULL,
    at timestamptz NOT NULL,
    old text,
    new text NOT NULL,
    code text,
    PRIMARY KEY (instance, number)
);
CREATE INDEX viralfx_transitions_at ON viralfx_ops.viralfx_transitions (at);
