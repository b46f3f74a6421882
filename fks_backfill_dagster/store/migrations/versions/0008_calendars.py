"""The closed dates and the exchange calendars by which the ledger was settled.

Revision ID: 0008
"""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Empty for all that is stored: what the settings close is then applied once, and changes nothing that it has
    # explained before.
    op.execute("ALTER TABLE fks.series ADD COLUMN closed TEXT NOT NULL DEFAULT ''")
    op.execute("""
        CREATE TABLE fks.calendar (
            name TEXT PRIMARY KEY,
            until DATE NOT NULL,
            digest TEXT NOT NULL,
            sessions BYTEA NOT NULL,
            library TEXT NOT NULL,
            recorded_at TIMESTAMPTZ NOT NULL DEFAULT now()
        )
    """)


def downgrade() -> None:
    op.execute("DROP TABLE fks.calendar")
    op.execute("ALTER TABLE fks.series DROP COLUMN closed")
