"""The processes of the fleet, and the changes of their checks."""

from alembic import op

from viralfx.adapters.postgres.migrations import qualified

revision = "0005"
down_revision = "0004"

# Each process replaces its own row every few seconds. No index has a column that a beat changes, so
# that the new version of the row fits on the page of the old one.
_INSTANCES = """
CREATE TABLE viralfx_instances (
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
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500)
"""
# Without a reference to the instance: the row of an instance may be pruned first.
_TRANSITIONS = """
CREATE TABLE viralfx_transitions (
    instance text NOT NULL,
    number bigint NOT NULL,
    check_name text NOT NULL,
    at timestamptz NOT NULL,
    old text,
    new text NOT NULL,
    code text,
    PRIMARY KEY (instance, number)
)
"""
_INDEX = "CREATE INDEX viralfx_transitions_at ON viralfx_transitions (at)"


def upgrade() -> None:
    """Make the tables; no other table is locked."""
    for statement in (_INSTANCES, _TRANSITIONS, _INDEX):
        _execute(statement)


def downgrade() -> None:
    """Drop them, with the history of the fleet."""
    _execute("DROP TABLE viralfx_instances, viralfx_transitions")


def _execute(statement: str) -> None:
    op.execute(qualified(statement, op.get_context().opts["version_table_schema"]))
