"""Due gaps: which of them are to be asked for, found without reading the evidence of each.

Revision ID: 0003
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# Who has said for good that it does not have the candles (Evidence.final). Computed by the database, so
# that it cannot disagree with the evidence.
HEARD = """
ALTER TABLE fks.gap ADD COLUMN heard JSONB GENERATED ALWAYS AS (
    jsonb_path_query_array(evidence, '$[*] ? (@.outcome == "absent" || @.outcome == "refused").provider')
) STORED NOT NULL
"""

UNDECIDED = """
CREATE INDEX gap_undecided ON fks.gap (series_id, gap_start) WHERE status IN ('open', 'unavailable')
"""


def upgrade() -> None:
    op.execute(HEARD)
    op.execute(UNDECIDED)


def downgrade() -> None:
    op.execute("DROP INDEX fks.gap_undecided")
    op.execute("ALTER TABLE fks.gap DROP COLUMN heard")
