"""Corrections by a person: author and reason of a batch, pinned candles, decisions about quarantined rows; undos of
undos.

Revision ID: 0011
"""

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

# `undone_by`: the undo that is in effect. Until now an undo could not be undone, so each one is in effect.
BATCH = """
ALTER TABLE fks.batch ADD COLUMN author TEXT;
ALTER TABLE fks.batch ADD COLUMN reason TEXT;
ALTER TABLE fks.batch ADD COLUMN undone_by INTEGER;
UPDATE fks.batch b SET undone_by = u.id FROM fks.batch u WHERE u.undoes = b.id;
"""

# A row per candle of a correction, inserted ones included; it pins the candle while that correction is the stored
# value and `released_at` is NULL.
PIN = """
CREATE TABLE fks.pin (
    series_id INTEGER NOT NULL REFERENCES fks.series (id) ON DELETE CASCADE,
    ts TIMESTAMPTZ NOT NULL,
    batch_id INTEGER NOT NULL,
    released_at TIMESTAMPTZ,
    PRIMARY KEY (series_id, ts, batch_id)
);
"""

QUARANTINE = """
ALTER TABLE fks.quarantine ADD COLUMN decision TEXT
    CONSTRAINT quarantine_decision CHECK (decision IN ('released', 'dropped'));
ALTER TABLE fks.quarantine ADD COLUMN decided_at TIMESTAMPTZ;
ALTER TABLE fks.quarantine ADD COLUMN decided_by TEXT;
ALTER TABLE fks.quarantine ADD COLUMN decision_reason TEXT;
ALTER TABLE fks.quarantine ADD COLUMN batch_id INTEGER;
"""

VIEW = """
CREATE OR REPLACE VIEW fks.corrections AS
SELECT
    s.symbol,
    s.timeframe,
    r.ts,
    b.committed_at AS corrected_at,
    r.open AS open_before,
    r.high AS high_before,
    r.low AS low_before,
    r.close AS close_before,
    r.volume AS volume_before,
    r.open_after,
    r.high_after,
    r.low_after,
    r.close_after,
    r.volume_after,
    b.provider AS source,
    r.reason,
    b.id AS batch,
    b.author,
    b.source AS origin
FROM fks.revision r
JOIN fks.series s ON s.id = r.series_id
JOIN fks.batch b ON b.id = r.replaced_by;
"""


def upgrade() -> None:
    for statements in (BATCH, PIN, QUARANTINE, VIEW):
        op.execute(statements)


def downgrade() -> None:
    raise NotImplementedError("a program that does not know this revision would replace pinned candles")
