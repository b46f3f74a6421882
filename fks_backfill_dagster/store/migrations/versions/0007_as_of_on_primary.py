"""ohlcv_as_of refuses on a standby.

Revision ID: 0007
"""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

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
    -- A standby has a commit some time after the primary server: what it holds of a moment can still change.
    IF pg_is_in_recovery() THEN
        RAISE EXCEPTION 'fks.ohlcv_as_of refuses on a standby, which gets commits later than the primary server, so'
            ' that the same as_of could give different answers: call it on the primary server';
    END IF;
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


def upgrade() -> None:
    op.execute(AS_OF.format(gate=COMMIT_GATE))


def downgrade() -> None:
    raise NotImplementedError("a standby would give different answers for the same moment again")
