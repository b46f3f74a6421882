"""The tables as SQLAlchemy metadata. The migrations create them; a test compares the two.

    series ─┬─ candles_<timeframe>   one table per timeframe: chunk sizes differ by timeframe
            ├─ batch                 lineage: what one source delivered in one commit
            ├─ revision              values of a candle before it was changed or withdrawn
            ├─ pin                   candles that a person corrected
            ├─ gap                   the ledger: every missing candle inside the coverage
            ├─ finding               the ledger of suspicious stored candles
            ├─ sync_state            coverage and totals, updated in the writing transaction
            ├─ lease                 running syncs
            ├─ quarantine            rows that broke a rule, with the rule and what a person decided
            └─ validation            verdicts of comparisons with other providers
    listing                          when a provider listed a symbol
    calendar                         past sessions of the exchange calendars that the database was filled with
    action                           corporate actions by symbol and provider
    pacing                           accounts at providers: cool-downs, failures, open circuits
    ├─ pacing_request                requests in flight
    ├─ pacing_spent                  used permits, by rate window
    └─ pacing_queue                  processes waiting for a permit

A candle refers to its batch by a plain integer: a foreign key would cost a look-up per row.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TSTZMULTIRANGE

from fks_backfill_dagster.domain.timeframe import Timeframe

SCHEMA = "fks"

# The transport of the lineage row of a response that no longer contains stored candles.
WITHDRAWAL = "withdrawal"

# The transport of an undo.
UNDO = "undo"
metadata = sa.MetaData(schema=SCHEMA)

_now = sa.text("now()")
_instant = sa.DateTime(timezone=True)


def _series_id(*, primary_key: bool = False) -> sa.Column[int]:
    owner = sa.ForeignKey("fks.series.id", ondelete="CASCADE")
    return sa.Column("series_id", sa.Integer, owner, primary_key=primary_key, nullable=False)


def _prices(*, nullable: bool = False) -> list[sa.Column[float]]:
    return [sa.Column(name, sa.Double, nullable=nullable) for name in ("open", "high", "low", "close")]


series = sa.Table(
    "series",
    metadata,
    sa.Column("id", sa.Integer, sa.Identity(), primary_key=True),
    sa.Column("symbol", sa.Text, nullable=False),
    sa.Column("timeframe", sa.Text, nullable=False),
    sa.Column("asset_class", sa.Text, nullable=False),
    sa.Column("calendar", sa.Text, nullable=False),
    sa.Column("created_at", _instant, nullable=False, server_default=_now),
    # The eligible providers, by name (NULL: unknown yet), and when former ones ceased to be eligible.
    sa.Column("eligible", ARRAY(sa.Text)),
    sa.Column("eligible_until", JSONB, nullable=False, server_default=sa.text("'{}'")),
    # The closed dates that the ledger was last settled by, as domain.closures writes them.
    sa.Column("closed", sa.Text, nullable=False, server_default=sa.text("''")),
    sa.UniqueConstraint("symbol", "timeframe"),
)

candles = {
    timeframe: sa.Table(
        f"candles_{timeframe}",
        metadata,
        sa.Column("series_id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("ts", _instant, primary_key=True),
        sa.Column("batch_id", sa.Integer, nullable=False),
        *_prices(),
        sa.Column("volume", sa.Double),
    )
    for timeframe in Timeframe
}

batch = sa.Table(
    "batch",
    metadata,
    sa.Column("id", sa.Integer, sa.Identity(), primary_key=True),
    _series_id(),
    sa.Column("provider", sa.Text, nullable=False),
    sa.Column("transport", sa.Text, nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("sha256", sa.Text),
    sa.Column("range_start", _instant, nullable=False),
    sa.Column("range_end", _instant, nullable=False),
    sa.Column("run_id", sa.Text),
    sa.Column("fetched_at", _instant, nullable=False),
    sa.Column("committed_at", _instant, nullable=False),
    sa.Column("inserted", sa.Integer, nullable=False),
    sa.Column("updated", sa.Integer, nullable=False),
    sa.Column("undoes", sa.Integer, sa.ForeignKey("fks.batch.id", ondelete="CASCADE")),
    # Empty: from before hosts were recorded.
    sa.Column("host", sa.Text, nullable=False, server_default=sa.text("''")),
    sa.Column("instrument", sa.Text),
    sa.Column("published_at", _instant),
    # The volume of its inserted candles, in base units. NULL: unknown, or no candle has a volume.
    sa.Column("volume_sum", sa.Double),
    # Of a correction: who gave it, and why.
    sa.Column("author", sa.Text),
    sa.Column("reason", sa.Text),
    # The undo that is in effect. NULL: the batch is in effect.
    sa.Column("undone_by", sa.Integer),
    sa.Index("batch_by_series", "series_id", "id"),
    sa.Index("batch_by_commit", "committed_at"),
    # Without it every deletion of a batch would scan all batches for its undo.
    sa.Index("batch_by_undone", "undoes", postgresql_where=sa.text("undoes IS NOT NULL")),
    # For the hosts in use and the oldest candle per provider: a few look-ups instead of a scan.
    sa.Index("batch_by_host", "provider", "host", postgresql_where=sa.text("undoes IS NULL")),
    sa.Index(
        "batch_by_oldest",
        "series_id",
        "provider",
        "range_start",
        postgresql_where=sa.text(f"undoes IS NULL AND transport <> '{WITHDRAWAL}'"),
    ),
)

revision = sa.Table(
    "revision",
    metadata,
    _series_id(primary_key=True),
    sa.Column("ts", _instant, primary_key=True),
    sa.Column("replaced_by", sa.Integer, sa.ForeignKey("fks.batch.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("batch_id", sa.Integer, nullable=False),
    # NULL: there is no candle before or after the revision.
    *_prices(nullable=True),
    sa.Column("volume", sa.Double),
    sa.Column("open_after", sa.Double),
    sa.Column("high_after", sa.Double),
    sa.Column("low_after", sa.Double),
    sa.Column("close_after", sa.Double),
    sa.Column("volume_after", sa.Double),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Index("revision_by_batch", "replaced_by"),
)

# A row per candle of a correction, inserted ones included. A candle is pinned while it comes from the batch of such
# a row and that row is not released: undoing the correction therefore ends the pin, and undoing the undo restores it.
pin = sa.Table(
    "pin",
    metadata,
    _series_id(primary_key=True),
    sa.Column("ts", _instant, primary_key=True),
    sa.Column("batch_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("released_at", _instant),
)

sync_state = sa.Table(
    "sync_state",
    metadata,
    _series_id(primary_key=True),
    sa.Column("synced", TSTZMULTIRANGE, nullable=False, server_default=sa.text("'{}'")),
    sa.Column("total_candles", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    sa.Column("oldest", _instant),
    sa.Column("newest", _instant),
    sa.Column("last_sync_time", _instant),
    sa.Column("error_message", sa.Text),
)

gap = sa.Table(
    "gap",
    metadata,
    sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
    _series_id(),
    sa.Column("gap_start", _instant, nullable=False),
    sa.Column("gap_end", _instant, nullable=False),
    sa.Column("missing_candles", sa.Integer, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("next_attempt_at", _instant),
    sa.Column("evidence", JSONB, nullable=False),
    sa.Column("found_at", _instant, nullable=False, server_default=_now),
    sa.Column("changed_at", _instant, nullable=False, server_default=_now),
    sa.Column(
        "heard",
        JSONB,
        sa.Computed(
            "jsonb_path_query_array(evidence,"
            """ '$[*] ? (@."outcome" == "absent" || @."outcome" == "refused")."provider"')""",
            persisted=True,
        ),
        nullable=False,
    ),
    # The missing candles of each UTC date from that of gap_start on (`ledger.days`); NULL for filled gaps.
    sa.Column("by_day", ARRAY(sa.Integer)),
    sa.CheckConstraint(
        "status IN ('open', 'filled', 'no_trade', 'unavailable', 'tolerated')", name="gap_status"
    ),
    sa.CheckConstraint("gap_start < gap_end AND missing_candles > 0", name="gap_not_empty"),
    sa.Index(
        "gap_missing",
        "series_id",
        "gap_start",
        unique=True,
        postgresql_where=sa.text("status <> 'filled'"),
    ),
    sa.Index(
        "gap_undecided",
        "series_id",
        "gap_start",
        postgresql_where=sa.text("status IN ('open', 'unavailable')"),
    ),
)

finding = sa.Table(
    "finding",
    metadata,
    sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
    _series_id(),
    sa.Column("rule", sa.Text, nullable=False),
    sa.Column("severity", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("start_ts", _instant, nullable=False),
    sa.Column("end_ts", _instant, nullable=False),
    sa.Column("candles", sa.Integer, nullable=False),
    # Identifies the values of the candles, as ledger.detections computes it.
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("first_seen_at", _instant, nullable=False),
    sa.Column("last_seen_at", _instant, nullable=False),
    sa.Column("changed_at", _instant, nullable=False, server_default=_now),
    sa.Column("evidence", JSONB, nullable=False),
    sa.Column("verdict", JSONB),
    sa.CheckConstraint(
        "status IN ('open', 'confirmed', 'corrected', 'accepted', 'resolved')", name="finding_status"
    ),
    sa.CheckConstraint("start_ts < end_ts AND candles > 0", name="finding_not_empty"),
    sa.Index("finding_by_series", "series_id", "start_ts"),
    sa.Index(
        "finding_active",
        "series_id",
        "rule",
        "start_ts",
        unique=True,
        postgresql_where=sa.text("status IN ('open', 'confirmed', 'accepted')"),
    ),
)

lease = sa.Table(
    "lease",
    metadata,
    _series_id(primary_key=True),
    sa.Column("owner", sa.Text, primary_key=True),
    sa.Column("expires_at", _instant, nullable=False),
)

quarantine = sa.Table(
    "quarantine",
    metadata,
    sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
    _series_id(),
    sa.Column("ts", _instant, nullable=False),
    # The row as received; NULL for a value that was not a finite number.
    sa.Column("open", sa.Double),
    sa.Column("high", sa.Double),
    sa.Column("low", sa.Double),
    sa.Column("close", sa.Double),
    sa.Column("volume", sa.Double),
    sa.Column("provider", sa.Text, nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("first_seen_at", _instant, nullable=False, server_default=_now),
    sa.Column("last_seen_at", _instant, nullable=False, server_default=_now),
    sa.Column("seen", sa.Integer, nullable=False, server_default=sa.text("1")),
    # NULL: not decided. `batch_id`: the correction that a release has written.
    sa.Column("decision", sa.Text),
    sa.Column("decided_at", _instant),
    sa.Column("decided_by", sa.Text),
    sa.Column("decision_reason", sa.Text),
    sa.Column("batch_id", sa.Integer),
    sa.CheckConstraint("decision IN ('released', 'dropped')", name="quarantine_decision"),
    sa.UniqueConstraint(
        "series_id",
        "ts",
        "provider",
        "reason",
        "open",
        "high",
        "low",
        "close",
        "volume",
        name="quarantine_once",
        postgresql_nulls_not_distinct=True,
    ),
)

validation = sa.Table(
    "validation",
    metadata,
    sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
    _series_id(),
    sa.Column("start_ts", _instant, nullable=False),
    sa.Column("end_ts", _instant, nullable=False),
    # Candles: stored in the range, and of these compared, at the timeframe compared_at.
    sa.Column("stored", sa.BigInteger, nullable=False),
    sa.Column("compared", sa.BigInteger, nullable=False),
    sa.Column("compared_at", sa.Text, nullable=False),
    # Prices beyond their tolerance.
    sa.Column("discrepancies", sa.BigInteger, nullable=False),
    sa.Column("providers", ARRAY(sa.Text), nullable=False),
    sa.Column("tolerance", sa.Double, nullable=False),
    sa.Column("validated_at", _instant, nullable=False),
    sa.CheckConstraint("compared > 0 AND cardinality(providers) > 0", name="validation_compared"),
    # So that a repeated statement adds no second row; also the index for the rows of a series.
    sa.UniqueConstraint("series_id", "validated_at", "start_ts", "end_ts", name="validation_once"),
)

listing = sa.Table(
    "listing",
    metadata,
    sa.Column("provider", sa.Text, primary_key=True),
    sa.Column("symbol", sa.Text, primary_key=True),
    sa.Column("listed_at", _instant, nullable=False),
    sa.Column("found_at", _instant, nullable=False, server_default=_now),
    sa.Column("kind", sa.Text, nullable=False, server_default=sa.text("'claim'")),
    sa.CheckConstraint("kind IN ('claim', 'observation')", name="listing_kind"),
)

calendar = sa.Table(
    "calendar",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    # The sessions dated before it, as domain.calendars packs them, and their digest.
    sa.Column("until", sa.Date, nullable=False),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("sessions", sa.LargeBinary, nullable=False),
    # The version of exchange-calendars that they come from.
    sa.Column("library", sa.Text, nullable=False),
    sa.Column("recorded_at", _instant, nullable=False, server_default=_now),
)

action = sa.Table(
    "action",
    metadata,
    sa.Column("symbol", sa.Text, primary_key=True),
    sa.Column("kind", sa.Text, primary_key=True),
    # A date of the exchange, and the moment at which it begins there.
    sa.Column("ex_date", sa.Date, primary_key=True),
    sa.Column("provider", sa.Text, primary_key=True),
    # New shares per old share.
    sa.Column("ratio", sa.Double),
    # Of dividends, which are not stored yet.
    sa.Column("amount", sa.Double),
    sa.Column("currency", sa.Text),
    # When these values were first received.
    sa.Column("fetched_at", _instant, nullable=False),
    sa.Column("begins_at", _instant, nullable=False),
    # The provider's place in the priority of the symbol when it was last written; 0: a person's file.
    sa.Column("rank", sa.Integer, nullable=False),
    sa.CheckConstraint(
        "(kind = 'split' AND ratio IS NOT NULL AND ratio > 0 AND ratio < 'Infinity' AND amount IS NULL"
        " AND currency IS NULL)"
        " OR (kind = 'dividend' AND ratio IS NULL AND amount IS NOT NULL AND amount > 0 AND amount < 'Infinity'"
        " AND currency IS NOT NULL)",
        name="action_values",
    ),
)


def _account() -> list[sa.Column[str]]:
    return [sa.Column(name, sa.Text, primary_key=True) for name in ("provider", "account")]


pacing = sa.Table(
    "pacing",
    metadata,
    *_account(),
    sa.Column("closed_until", _instant),
    sa.Column("failures", sa.Integer, nullable=False, server_default=sa.text("0")),
    sa.Column("resting_until", _instant),
    sa.Column("reason", sa.Text),
)

pacing_request = sa.Table(
    "pacing_request",
    metadata,
    sa.Column("number", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("provider", sa.Text, nullable=False),
    sa.Column("account", sa.Text, nullable=False),
    sa.Column("weight", sa.Integer, nullable=False),
    sa.Column("windows_ms", ARRAY(sa.BigInteger), nullable=False),
    sa.Column("over_at", _instant, nullable=False),
    sa.Index("pacing_request_by_account", "provider", "account"),
)

pacing_spent = sa.Table(
    "pacing_spent",
    metadata,
    *_account(),
    sa.Column("window_ms", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("slot", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("weight", sa.Integer, nullable=False),
)

pacing_queue = sa.Table(
    "pacing_queue",
    metadata,
    *_account(),
    sa.Column("owner", sa.Text, primary_key=True),
    sa.Column("ticket", sa.BigInteger, sa.Identity(), nullable=False),
    sa.Column("weight", sa.Integer, nullable=False),
    sa.Column("expires_at", _instant, nullable=False),
)
