"""The audit trail."""

from alembic import op

from viralfx.adapters.postgres.migrations import qualified

revision = "0007"
down_revision = "0006"

# The id begins with the time, so pages follow its index. The other one is for the retention.
_EVENTS = """
CREATE TABLE viralfx_audit_events (
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
)
"""
_INDEX = "CREATE INDEX viralfx_audit_events_at ON viralfx_audit_events (at)"


def upgrade() -> None:
    """Make the table; no other table is locked."""
    for statement in (_EVENTS, _INDEX):
        _execute(statement)


def downgrade() -> None:
    """Drop it, with all events."""
    _execute("DROP TABLE viralfx_audit_events")


def _execute(statement: str) -> None:
    op.execute(qualified(statement, op.get_context().opts["version_table_schema"]))
