"""On SQLite a delta's report is the last column: reading one behind it would read all of it.

Revision: 0014
"""

from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply. Postgres stores large values apart from their row."""
    if op.get_bind().dialect.name == "sqlite":
        op.execute("ALTER TABLE deltas ADD COLUMN moved_report JSON")
        op.execute("UPDATE deltas SET moved_report = report WHERE report IS NOT NULL")
        op.execute("ALTER TABLE deltas DROP COLUMN report")
        op.execute("ALTER TABLE deltas RENAME COLUMN moved_report TO report")


def downgrade() -> None:
    """Nothing to revert: the order of columns has no other meaning."""
