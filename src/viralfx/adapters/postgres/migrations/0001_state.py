"""Saved state of instances."""

from alembic import op

from viralfx.adapters.postgres.migrations import qualified

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the table of :class:`viralfx.adapters.postgres.state.PostgresStateStore`."""
    _execute(
        """
        CREATE TABLE viralfx_state (
            instance text PRIMARY KEY,
            saved_at timestamptz NOT NULL,
            state json NOT NULL
        )
        """
    )
    _execute("CREATE INDEX viralfx_state_saved_at ON viralfx_state (saved_at)")


def downgrade() -> None:
    """Drop it, with the saved state."""
    _execute("DROP TABLE viralfx_state")


def _execute(statement: str) -> None:
    op.execute(qualified(statement, op.get_context().opts["version_table_schema"]))
