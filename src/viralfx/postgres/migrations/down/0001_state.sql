-- Drops the saved state.

DROP TABLE viralfx_ops.viralfx_state;
