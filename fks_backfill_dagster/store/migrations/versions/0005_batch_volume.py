"""The volume that a batch has inserted, so that a partition's sum need not read its candles.

Revision ID: 0005
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # NULL: not known, as of all older batches.
    op.execute("ALTER TABLE fks.batch ADD COLUMN volume_sum DOUBLE PRECISION")


def downgrade() -> None:
    op.execute("ALTER TABLE fks.batch DROP COLUMN volume_sum")
