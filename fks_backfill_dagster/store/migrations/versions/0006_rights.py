"""Rights: functions that change something are for the owner of the schema.

Revision ID: 0006
"""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

# PostgreSQL lets everybody execute a new function. This one changes nothing for a role that may not write its tables,
# but it takes the account's lock first. `ohlcv_as_of` stays everybody's: it reads, with the rights of its caller.
NOT_PUBLIC = """
REVOKE EXECUTE ON FUNCTION fks.pace_admit(
    text, text, text, integer, integer[], bigint[], double precision
) FROM PUBLIC
"""


def upgrade() -> None:
    op.execute(NOT_PUBLIC)


def downgrade() -> None:
    op.execute(NOT_PUBLIC.replace("REVOKE", "GRANT").replace("FROM PUBLIC", "TO PUBLIC"))
