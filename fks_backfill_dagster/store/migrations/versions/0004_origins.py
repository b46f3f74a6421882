"""Origins: host, instrument and publication time of a batch; eligible providers of a series; listing claims.

Revision ID: 0004
"""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

# `host` and `instrument` of older batches are not known and stay NULL. An archive without a publication
# time counts as published the day after its period (the day of the file's name); a monthly file the day
# after its first day, as providers/binance_archive.py has it.
BATCH = """
ALTER TABLE fks.batch ADD COLUMN host TEXT;
ALTER TABLE fks.batch ADD COLUMN instrument TEXT;
ALTER TABLE fks.batch ADD COLUMN published_at TIMESTAMP WITH TIME ZONE;

UPDATE fks.batch b SET published_at = (p.day AT TIME ZONE 'UTC') + interval '1 day'
FROM (
    SELECT id, to_date(rpad(
        substring(source FROM '-([0-9]{4}-[0-9]{2}(-[0-9]{2})?)[.]zip$'), 10, '-01'), 'YYYY-MM-DD')::timestamp AS day
    FROM fks.batch WHERE transport = 'archive'
) p
WHERE p.id = b.id;
"""

# NULL: not known yet. A provider that is not among them can reopen what rests on the others' responses.
SERIES = """
ALTER TABLE fks.series ADD COLUMN eligible TEXT[];
"""

# A claim is what a provider declares; an observation is what its complete response shows.
LISTING = """
ALTER TABLE fks.listing ADD COLUMN kind TEXT NOT NULL DEFAULT 'claim'
    CONSTRAINT listing_kind CHECK (kind IN ('claim', 'observation'));
"""


def upgrade() -> None:
    op.execute(BATCH)
    op.execute(SERIES)
    op.execute(LISTING)


def downgrade() -> None:
    op.execute("ALTER TABLE fks.listing DROP COLUMN kind")
    op.execute("ALTER TABLE fks.series DROP COLUMN eligible")
    op.execute("ALTER TABLE fks.batch DROP COLUMN host, DROP COLUMN instrument, DROP COLUMN published_at")
