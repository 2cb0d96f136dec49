-- Drops the history of the fleet.

DROP TABLE viralfx_ops.viralfx_instances, viralfx_ops.viralfx_transitions;
