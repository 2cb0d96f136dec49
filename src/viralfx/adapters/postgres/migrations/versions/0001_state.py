"""Saved state of instances."""

from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the table of :class:`viralfx.adapters.postgres.state.PostgresStateStore`."""
    op.execute(
        """
        CREATE TABLE viralfx_state (
            instance text PRIMARY KEY,
            saved_at timestamptz NOT NULL,
            state json NOT NULL
        )
        """
    )
    op.execute("CREATE INDEX viralfx_state_saved_at ON viralfx_state (saved_at)")


def downgrade() -> None:
    """Drop it, with what was saved."""
    op.execute("DROP TABLE viralfx_state")
