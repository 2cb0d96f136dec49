-- The audit trail.

-- The id begins with the time, so pages follow its index. The other one is for the retention.
CREATE TABLE viralfx_ops.viralfx_audit_events (
    id uuid PRIMARY KEY,
    at timestamptz NOT NULL,
    actor text NOT NULL,
    address text,
    action text NOT NULL,
    target text NOT NULL,
    outcome text NOT NULL,
    before text,
    after text,
    detail text,
    correlation_id text,
    instance text NOT NULL
);
CREATE INDEX viralfx_audit_events_at ON viralfx_ops.viralfx_audit_events (at);
