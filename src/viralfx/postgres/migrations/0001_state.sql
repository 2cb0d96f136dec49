-- Saved state of instances.

CREATE TABLE viralfx_ops.viralfx_state (
    instance text PRIMARY KEY,
    saved_at timestamptz NOT NULL,
    state json NOT NULL
);
CREATE INDEX viralfx_state_saved_at ON viralfx_ops.viralfx_state (saved_at);
