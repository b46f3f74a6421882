"""Corporate actions, their view, and adjusted candles.

Revision ID: 0009
"""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

TABLE = """
CREATE TABLE fks.action (
    symbol TEXT NOT NULL,
    kind TEXT NOT NULL,
    ex_date DATE NOT NULL,
    provider TEXT NOT NULL,
    ratio DOUBLE PRECISION,
    amount DOUBLE PRECISION,
    currency TEXT,
    fetched_at TIMESTAMPTZ NOT NULL,
    begins_at TIMESTAMPTZ NOT NULL,
    rank INTEGER NOT NULL,
    PRIMARY KEY (symbol, kind, ex_date, provider),
    CONSTRAINT action_values CHECK (
        (kind = 'split' AND ratio IS NOT NULL AND ratio > 0 AND ratio < 'Infinity'
            AND amount IS NULL AND currency IS NULL)
        OR (kind = 'dividend' AND ratio IS NULL AND amount IS NOT NULL AND amount > 0 AND amount < 'Infinity'
            AND currency IS NOT NULL)
    )
)
"""

# Reports that are a week apart at most can be one action with another date: of each such group the reports of one
# provider are used, that of the lowest rank. What has not begun is listed, but adjusts nothing.
VIEW = """
CREATE VIEW fks.actions AS
SELECT
    g.symbol,
    g.kind,
    g.ex_date,
    g.ratio,
    g.amount,
    g.currency,
    g.provider,
    g.fetched_at,
    g.begins_at,
    g.begins_at <= now() AND g.provider = first_value(g.provider) OVER (
        PARTITION BY g.symbol, g.kind, g.number ORDER BY g.rank, g.provider
    ) AS used
FROM (
    SELECT n.*, count(*) FILTER (WHERE n.is_first) OVER (
        PARTITION BY n.symbol, n.kind ORDER BY n.ex_date, n.provider
    ) AS number
    FROM (
        SELECT a.*, coalesce(
            a.ex_date - lag(a.ex_date) OVER (
                PARTITION BY a.symbol, a.kind ORDER BY a.ex_date, a.provider
            ) > 7,
            true
        ) AS is_first
        FROM fks.action a
    ) n
) g
"""

# It reads the two views, so a reader of the views may call it. The splits become two small arrays, the ascending
# moments and the factor of each stretch between them, so that the candles are read in one pass: the factor of a candle
# is found by binary search. Symbol and timeframe are written into the query, so that the planner reads one table.
ADJUSTED = """
CREATE FUNCTION fks.ohlcv_adjusted(
    symbol text, timeframe text, start_ts timestamptz, end_ts timestamptz, mode text
) RETURNS TABLE (
    ts timestamptz,
    open double precision,
    high double precision,
    low double precision,
    close double precision,
    volume double precision,
    provider text
) LANGUAGE plpgsql STABLE AS $function$
DECLARE
    is_daily constant boolean := timeframe IN ('1d', '1w');
    bounds timestamptz[] := '{}';
    factors double precision[] := ARRAY[1.0];
    mixed timestamptz[] := '{}';
    split record;
BEGIN
    IF mode = 'all' THEN
        RAISE EXCEPTION 'fks.ohlcv_adjusted has no mode all yet: dividends are not stored; use the mode splits'
            USING ERRCODE = 'feature_not_supported';
    ELSIF mode IS DISTINCT FROM 'splits' THEN
        RAISE EXCEPTION 'fks.ohlcv_adjusted has no mode %: use splits', coalesce(quote_literal(mode), 'NULL')
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF (timeframe IN ('1m', '5m', '15m', '30m', '1h', '4h', '1d', '1w')) IS NOT TRUE THEN
        RAISE EXCEPTION 'fks.ohlcv_adjusted has no timeframe %: use one of 1m 5m 15m 30m 1h 4h 1d 1w',
            coalesce(quote_literal(timeframe), 'NULL') USING ERRCODE = 'invalid_parameter_value';
    END IF;
    FOR split IN
        SELECT a.ratio, a.begins_at, a.ex_date, a.ex_date::timestamp AT TIME ZONE 'UTC' AS day
        FROM fks.actions a
        WHERE a.symbol = ohlcv_adjusted.symbol AND a.kind = 'split' AND a.used
        ORDER BY a.ex_date DESC
    LOOP
        factors := factors[1] * split.ratio || factors;
        bounds := CASE WHEN is_daily THEN split.day ELSE split.begins_at END || bounds;
        IF timeframe = '1w' AND extract(isodow FROM split.ex_date) > 1 THEN
            mixed := date_trunc('week', split.day, 'UTC') || mixed;
        END IF;
    END LOOP;
    IF mixed = '{}' THEN
        RETURN QUERY EXECUTE format(
            $query$
            SELECT o.ts, o.open / o.factor, o.high / o.factor, o.low / o.factor, o.close / o.factor,
                o.volume * o.factor, o.provider
            FROM (
                SELECT v.*, $2[width_bucket(v.ts, $1) + 1] AS factor FROM fks.ohlcv v
                WHERE v.symbol = %1$L AND v.timeframe = %2$L AND v.ts >= $3 AND v.ts < $4
            ) o
            ORDER BY o.ts
            $query$,
            symbol, timeframe
        ) USING bounds, factors, start_ts, end_ts;
        RETURN;
    END IF;
    -- Weeks in which a split begins after Monday hold prices of both kinds. They are made from adjusted days if the
    -- days as traded make the stored week; else their prices are unknown.
    RETURN QUERY EXECUTE format(
        $query$
        WITH day AS (
            SELECT d.*, date_trunc('week', d.ts, 'UTC') AS week, $2[width_bucket(d.ts, $1) + 1] AS factor
            FROM (SELECT DISTINCT unnest($5) AS ts) m
            JOIN fks.ohlcv d ON d.ts >= m.ts AND d.ts < m.ts + interval '168 hours'
            WHERE d.symbol = %1$L AND d.timeframe = '1d' AND m.ts >= $3 AND m.ts < $4
        ), made AS (
            SELECT
                d.week,
                (array_agg(d.open ORDER BY d.ts))[1] AS first_open,
                max(d.high) AS top,
                min(d.low) AS bottom,
                (array_agg(d.close ORDER BY d.ts DESC))[1] AS last_close,
                (array_agg(d.open / d.factor ORDER BY d.ts))[1] AS open,
                max(d.high / d.factor) AS high,
                min(d.low / d.factor) AS low,
                (array_agg(d.close / d.factor ORDER BY d.ts DESC))[1] AS close,
                CASE WHEN count(d.volume) = count(*) THEN sum(d.volume * d.factor ORDER BY d.ts) END AS volume
            FROM day d
            GROUP BY d.week
        )
        SELECT
            o.ts,
            CASE WHEN o.is_mixed THEN w.open ELSE o.open / o.factor END,
            CASE WHEN o.is_mixed THEN w.high ELSE o.high / o.factor END,
            CASE WHEN o.is_mixed THEN w.low ELSE o.low / o.factor END,
            CASE WHEN o.is_mixed THEN w.close ELSE o.close / o.factor END,
            CASE WHEN o.is_mixed THEN w.volume ELSE o.volume * o.factor END,
            o.provider
        FROM (
            SELECT v.*, $2[width_bucket(v.ts, $1) + 1] AS factor, v.ts = ANY($5) AS is_mixed FROM fks.ohlcv v
            WHERE v.symbol = %1$L AND v.timeframe = '1w' AND v.ts >= $3 AND v.ts < $4
        ) o
        LEFT JOIN made w ON w.week = o.ts
            AND (w.first_open, w.top, w.bottom, w.last_close) = (o.open, o.high, o.low, o.close)
        ORDER BY o.ts
        $query$,
        symbol
    ) USING bounds, factors, start_ts, end_ts, mixed;
END
$function$
"""


def upgrade() -> None:
    op.execute(TABLE)
    op.execute(VIEW)
    op.execute(ADJUSTED)


def downgrade() -> None:
    op.execute("DROP FUNCTION fks.ohlcv_adjusted")
    op.execute("DROP VIEW fks.actions")
    op.execute("DROP TABLE fks.action")
