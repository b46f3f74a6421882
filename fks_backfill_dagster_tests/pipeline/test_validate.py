"""A validation in parts: blocks, failed requests, plans that cover newer data only, several asset classes.

cli/test_validate.py has the verdicts as a user sees them, domain/test_patterns.py the patterns.
"""

from __future__ import annotations

import numpy as np
import pytest

from fks_backfill_dagster.domain.patterns import Pattern
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_HOUR, Timeframe
from fks_backfill_dagster.pipeline import validation_blocks
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.pipeline.sync import sync
from fks_backfill_dagster.pipeline.validate import Validation, ValidationOptions, record
from fks_backfill_dagster.pipeline.validation_report import NotComparable, ValidationReport
from fks_backfill_dagster.providers.base import Cancelled, FetchResult, Provider, TooOld
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.domain.builders import at, window
from fks_backfill_dagster_tests.pipeline.conftest import NOW, make_context
from fks_backfill_dagster_tests.store.builders import execute, fetch

HOURS = Series("BTC/USDT", Timeframe.H1, AssetClass.CRYPTO)
SPRING = window("2024-03-01T00:00Z", "2024-06-01T00:00Z")
CANDLES = 92 * 24
BOTH = ValidationOptions([["polygon"], ["binance"]], tolerance=0.01, share=1.0)


@pytest.fixture
def stored(context: Context, market: LocalMarket) -> Context:
    """Spring of 2024 from Binance."""
    assert sync(context, HOURS, SPRING, ["binance"]).complete
    market.reset_requests()
    return context


def validated(
    context: Context, options: ValidationOptions = BOTH, series: Series = HOURS
) -> ValidationReport:
    return Validation(context, series, SPRING, options).run()


def test_blocks_do_not_change_the_result(
    stored: Context, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(
        database,
        "UPDATE fks.candles_1h SET open = open * 7, high = high * 7, low = low * 7, close = close * 7"
        " WHERE ts < '2024-04-10Z'",
    )
    whole = validated(stored)
    monkeypatch.setattr(validation_blocks, "BLOCK", 100)
    parts = validated(stored)
    for report in (whole, parts):
        assert (report.valid, report.sampled, report.compared) == (False, CANDLES, CANDLES)
        assert report.discrepancies == 40 * 24 * 4
        classified = report.classified()["polygon"]
        assert classified.pattern is Pattern.FACTOR
        assert classified.factor == pytest.approx(7, rel=0.001)
    assert len(whole.worst) == len(parts.worst) == 100
    assert whole.sources["polygon"].spread.largest_of("close") == parts.sources["polygon"].spread.largest_of(
        "close"
    )


def test_requests_that_fail_in_part_give_no_verdict(stored: Context, market: LocalMarket) -> None:
    """Everything that was compared agrees, and the rest was not seen: neither valid nor invalid."""
    april = window("2024-04-20T00:00Z", "2024-04-21T00:00Z")
    market.plant_fault("polygon", "status", count=None, status=404, window=april)
    report = validated(stored)
    assert report.valid is None
    failed = report.sources["polygon"].not_comparable[NotComparable.FAILED]
    assert report.compared == CANDLES - failed
    assert report.unverified == failed
    assert 0 < failed < CANDLES
    assert report.reason is not None
    assert report.reason.startswith(
        f"{failed:,} of {CANDLES:,} candles were not compared, as requests failed: polygon"
    )
    assert not record(stored, report)
    assert fetch(stored.database, "SELECT count(*) FROM fks.validation") == [(0,)]


def test_differences_count_whatever_else_failed(
    stored: Context, market: LocalMarket, database: Database
) -> None:
    execute(database, "UPDATE fks.candles_1h SET high = high * 1.5 WHERE ts = '2024-03-02 05:00Z'")
    market.plant_fault(
        "polygon", "status", count=None, status=404, window=window("2024-05-20T00:00Z", "2024-05-21T00:00Z")
    )
    report = validated(stored)
    assert (report.valid, report.discrepancies) == (False, 1)
    assert record(stored, report)


def test_a_plan_that_covers_newer_candles_only(stored: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older ones are not comparable, which is no failure; the newer ones are requested."""
    polygon, edge = type(stored.providers["polygon"]), at("2024-04-15T00:00Z")
    fetched, requested = polygon.fetch, []

    def fetch(self: Provider, series: Series, span: TimeRange) -> FetchResult:
        requested.append(span.start)
        if span.start < edge:
            raise TooOld("polygon", "the plan covers nothing before 2024-04-15", edge)
        return fetched(self, series, span)

    monkeypatch.setattr(polygon, "fetch", fetch)
    monkeypatch.setattr(validation_blocks, "BLOCK", 200)
    report = validated(stored)
    older = 45 * 24
    assert (report.valid, report.compared) == (True, CANDLES - older)
    assert report.sources["polygon"].not_comparable == {NotComparable.BEYOND: older}
    assert report.errors == ()
    assert [start for start in requested if start < edge] == [SPRING.start]  # then it is known


def test_a_provider_that_fails_repeatedly_is_not_requested_further(
    stored: Context, market: LocalMarket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation_blocks, "BLOCK", 24)
    market.plant_fault("polygon", "status", count=None, status=404)
    report = validated(stored)
    assert market.requests("polygon") == 2
    assert report.sources["polygon"].not_comparable == {NotComparable.FAILED: CANDLES}
    assert (report.valid, report.providers) == (None, ())
    assert "not requested after 2 failures in a row" in str(report.reason)


def test_an_interruption_is_raised(stored: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    polygon = stored.providers["polygon"]

    def fetch(*_: object) -> None:
        raise Cancelled("polygon", "the run is being interrupted")

    monkeypatch.setattr(type(polygon), "fetch", fetch)
    with pytest.raises(Cancelled):
        validated(stored)


def test_the_provider_that_delivered_is_not_requested(stored: Context, market: LocalMarket) -> None:
    options = ValidationOptions([["binance", "polygon"]], tolerance=0.01, share=1.0)
    report = validated(stored, options)
    assert (report.valid, report.providers) == (True, ("polygon",))  # Binance delivered them
    assert market.requests("binance") == 0


@pytest.mark.parametrize(("recorded", "compared"), [("'X:WRONGUSD'", CANDLES), ("NULL", 0), ("'BTCUSDT'", 0)])
def test_a_provider_validates_what_it_delivered_for_another_instrument(
    stored: Context, market: LocalMarket, database: Database, recorded: str, compared: int
) -> None:
    """After a wrong ticker was corrected in the settings; an unrecorded one counts as the same."""
    execute(database, f"UPDATE fks.batch SET instrument = {recorded}")
    report = validated(stored, ValidationOptions([["binance"]], tolerance=0.01, share=1.0))
    assert (report.compared, report.valid) == (compared, True if compared else None)


def test_lineage_without_an_instrument_beside_lineage_with_another_one(
    stored: Context, database: Database
) -> None:
    """March is of an older version that recorded none."""
    execute(
        database,
        "UPDATE fks.batch SET instrument = CASE WHEN range_start < '2024-04-01Z' THEN NULL ELSE 'X:WRONGUSD' END",
    )
    report = validated(stored, ValidationOptions([["binance"]], tolerance=0.01, share=1.0))
    march = 31 * 24
    assert report.compared == CANDLES - march
    assert report.sources["binance"].not_comparable == {NotComparable.OWN: march}


def test_an_absence_that_could_not_be_confirmed_is_a_failure(stored: Context, market: LocalMarket) -> None:
    """The first response lacks candles, and the second request fails."""
    market.plant_outage("polygon", window("2024-03-10T00:00Z", "2024-03-10T10:00Z"))
    market.plant_fault("polygon", "status", nth=2, count=1, status=404)
    report = validated(stored)
    assert (report.valid, report.unverified) == (None, 10)
    assert report.sources["polygon"].not_comparable == {NotComparable.FAILED: 10}
    assert "404" in str(report.reason)


def test_missing_candles_of_the_other_are_counted(stored: Context, market: LocalMarket) -> None:
    market.plant_outage("polygon", window("2024-04-01T00:00Z", "2024-04-01T10:00Z"))
    report = validated(stored)
    assert (report.valid, report.compared) == (True, CANDLES - 10)
    assert report.sources["polygon"].not_comparable == {NotComparable.ABSENT: 10}
    assert report.reason == f"10 of {CANDLES:,} candles could not be compared"


@pytest.mark.parametrize("hours", [1, 5])
def test_stored_candles_that_are_late(stored: Context, database: Database, hours: int) -> None:
    """As of a provider that stamps the close, or of local time taken for UTC."""
    execute(
        database,
        "CREATE TEMP TABLE late AS SELECT * FROM fks.candles_1h;"
        f" DELETE FROM fks.candles_1h WHERE ts < '2024-03-01Z'::timestamptz + interval '{hours} h';"
        f" UPDATE fks.candles_1h c SET open = l.open, high = l.high, low = l.low, close = l.close FROM late l"
        f" WHERE l.ts = c.ts - interval '{hours} h'",
    )
    report = validated(stored, ValidationOptions([["polygon"]], tolerance=0.0005, share=1.0))
    classified = report.classified()["polygon"]
    assert classified.pattern is (Pattern.BAR_OFFSET if hours == 1 else Pattern.ZONE_OFFSET)
    assert classified.bars == hours


def test_the_edges_of_gaps_are_in_the_sample(context: Context, market: LocalMarket) -> None:
    outage = TimeRange(
        SPRING.start + 40 * MICROS_PER_DAY, SPRING.start + 43 * MICROS_PER_DAY + 5 * MICROS_PER_HOUR
    )
    market.plant_outage("binance", outage)
    sync(context, HOURS, SPRING, ["binance"])
    options = ValidationOptions([["polygon"]], tolerance=0.01)
    sample = Validation(context, HOURS, SPRING, options).sample
    edges = [outage.start - MICROS_PER_HOUR, outage.end]
    assert sample.contains(np.array(edges)).all()


def test_a_key_that_is_missing(database: Database, market: LocalMarket) -> None:
    context = make_context(database, market.binance_url, key=None)
    sync(context, HOURS, window("2024-05-30T00:00Z", "2024-06-01T00:00Z"), ["binance"])
    validation = Validation(context, HOURS, SPRING, BOTH)
    assert validation.warnings == ("polygon is skipped: POLYGON_API_KEY is not set",)
    assert validation.obstacle == (
        "polygon needs a key: POLYGON_API_KEY is not set; binance delivered these candles itself"
    )
    assert validation.run().valid is None


def test_the_clock_is_that_of_the_context(stored: Context) -> None:
    report = validated(stored)
    record(stored, report)
    assert report.validated_at == NOW
    assert fetch(
        stored.database, "SELECT extract(epoch FROM validated_at)::bigint * 1000000 FROM fks.validations"
    ) == [(NOW // 1_000_000 * 1_000_000,)]
