"""Origins: host, instrument and publication time of a batch; eligible providers; listing claims; withdrawals.

Revision ID: 0004
"""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

# `host` and `instrument` of older batches are not known: empty, and NULL. An archive without a publication
# time counts as published the day after its period (the day of the file's name); a monthly file the day
# after its first day, as providers/binance_archive.py has it.
BATCH = """
ALTER TABLE fks.batch ADD COLUMN host TEXT NOT NULL DEFAULT '';
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

# Which hosts there are, and how far back each provider goes: a few look-ups, not a scan.
INDEXES = """
CREATE INDEX batch_by_host ON fks.batch (provider, host) WHERE undoes IS NULL;
CREATE INDEX batch_by_oldest ON fks.batch (series_id, provider, range_start)
    WHERE undoes IS NULL AND transport <> 'withdrawal';
"""

# NULL: not known yet. A provider that is not among them can reopen what rests on the others' responses;
# one that was among them earlier, what was decided since ({provider: until when}).
SERIES = """
ALTER TABLE fks.series ADD COLUMN eligible TEXT[];
ALTER TABLE fks.series ADD COLUMN eligible_until JSONB NOT NULL DEFAULT '{}';
"""

# A candle that was withdrawn can come back: then there was none before. A version of a candle without
# prices says so, and the function leaves it out; nothing else of it is new.
REVISION = """
ALTER TABLE fks.revision ALTER COLUMN open DROP NOT NULL, ALTER COLUMN high DROP NOT NULL,
    ALTER COLUMN low DROP NOT NULL, ALTER COLUMN close DROP NOT NULL;
"""

AS_OF = """
CREATE OR REPLACE FUNCTION fks.ohlcv_as_of(
    symbol text, timeframe text, start_ts timestamptz, end_ts timestamptz, as_of timestamptz
) RETURNS TABLE (
    ts timestamptz,
    open double precision,
    high double precision,
    low double precision,
    close double precision,
    volume double precision,
    provider text
) LANGUAGE plpgsql VOLATILE AS $function$
DECLARE
    wanted integer;
BEGIN
    IF as_of >= clock_timestamp() THEN
        RAISE EXCEPTION 'as_of % lies in the future: what it would hold can still change', as_of;
    END IF;
    IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        RAISE EXCEPTION 'fks.ohlcv_as_of works in READ COMMITTED only: a snapshot taken before it waited'
            ' for running commits would miss them';
    END IF;
    -- Through the gate and out again. The end of the inner block gives the lock back, however it ends: one
    -- that a cancelled query left behind would keep every writer out for as long as its session lives.
    BEGIN
        PERFORM pg_advisory_xact_lock_shared({gate});
        RAISE EXCEPTION USING ERRCODE = 'FKS00';
    EXCEPTION WHEN SQLSTATE 'FKS00' THEN
        NULL;
    END;
    SELECT s.id INTO wanted FROM fks.series s
    WHERE s.symbol = ohlcv_as_of.symbol AND s.timeframe = ohlcv_as_of.timeframe;
    IF wanted IS NULL THEN
        RETURN;
    END IF;
    RETURN QUERY EXECUTE format(
        $query$
        SELECT v.ts, v.open, v.high, v.low, v.close, v.volume, b.provider
        FROM (
            SELECT DISTINCT ON (x.ts) x.*
            FROM (
                SELECT r.ts, r.open, r.high, r.low, r.close, r.volume, r.batch_id,
                       later.committed_at AS until
                FROM fks.revision r JOIN fks.batch later ON later.id = r.replaced_by
                WHERE r.series_id = $1 AND r.ts >= $2 AND r.ts < $3 AND later.committed_at > $4
                UNION ALL
                SELECT c.ts, c.open, c.high, c.low, c.close, c.volume, c.batch_id, 'infinity'
                FROM fks.%I c
                WHERE c.series_id = $1 AND c.ts >= $2 AND c.ts < $3
            ) x
            ORDER BY x.ts, x.until
        ) v
        JOIN fks.batch b ON b.id = v.batch_id
        WHERE b.committed_at <= $4 AND v.open IS NOT NULL
        ORDER BY v.ts
        $query$,
        'candles_' || ohlcv_as_of.timeframe
    ) USING wanted, start_ts, end_ts, as_of;
END
$function$;
"""

# The advisory lock that serialises the last moment of every commit (store/writer/lineage.py).
COMMIT_GATE = 4613732

# A claim is what a provider declares; an observation is what its complete response shows.
LISTING = """
ALTER TABLE fks.listing ADD COLUMN kind TEXT NOT NULL DEFAULT 'claim'
    CONSTRAINT listing_kind CHECK (kind IN ('claim', 'observation'));
"""


def upgrade() -> None:
    op.execute(BATCH)
    op.execute(INDEXES)
    op.execute(SERIES)
    op.execute(LISTING)
    op.execute(REVISION)
    op.execute(AS_OF.format(gate=COMMIT_GATE))


def downgrade() -> None:
    raise NotImplementedError(
        "withdrawn candles cannot be kept by a program that does not know this revision"
    )
