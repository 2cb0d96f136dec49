-- Drops all events of the audit trail.

DROP TABLE viralfx_ops.viralfx_audit_events;
