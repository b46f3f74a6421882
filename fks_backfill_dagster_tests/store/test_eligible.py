"""A new key or provider reopens gaps that are based on the response of a single provider."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import datetime

import numpy as np
import pytest
import sqlalchemy as sa

from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, Timeframe, to_datetime
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.ledger.records import Evidence, Outcome
from fks_backfill_dagster.store import ledger
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.writer.lineage import _SERIES_LOCK
from fks_backfill_dagster_tests.store.builders import MIDNIGHT, Shelf, brought, candles_at, execute, fetch

A, AB, ABC = frozenset({"oanda"}), frozenset({"oanda", "polygon"}), frozenset({"oanda", "polygon", "binance"})
DAY = MICROS_PER_DAY


def absent(provider: str = "oanda", day: int = 0, outcome: str = "absent") -> Evidence:
    return Evidence(provider, MIDNIGHT + day * DAY, Outcome(outcome))


def hole(shelf: Shelf, first: int, *evidence: Evidence, status: str = "no_trade") -> None:
    """Ten candles, of which the second to fourth are absent by that evidence."""
    opens = shelf.opens(first, first + 10)
    shelf.commit(
        shelf.span(first, first + 10), brought(candles_at(np.delete(opens, [1, 2, 3]))), evidence=evidence
    )
    execute(
        shelf.database,
        f"UPDATE fks.gap SET status = '{status}', next_attempt_at = NULL WHERE series_id = {shelf.identity}"
        f" AND gap_start = '{to_datetime(int(opens[1])).isoformat()}'",
    )


def reopen(shelf: Shelf, eligible: frozenset[str], day: int = 100) -> int:
    with shelf.database.begin() as connection:
        found = ledger.reopen(connection, {shelf.series: eligible}, MIDNIGHT + day * DAY)
    return found.get(shelf.series, 0)


def statuses(shelf: Shelf) -> list[str]:
    return [gap.status.value for gap in shelf.gaps()]


def test_a_new_provider_reopens_it(hours: Shelf) -> None:
    assert reopen(hours, A) == 0
    hole(hours, 0, absent())
    assert reopen(hours, A) == 0
    assert statuses(hours) == ["no_trade"]
    assert reopen(hours, AB) == 1
    (gap,) = hours.gaps()
    assert (gap.status, gap.next_attempt_at, gap.missing) == (GapStatus.OPEN, None, 3)
    assert gap.evidence == (absent(),)
    assert gap.is_due(AB, MIDNIGHT)
    assert hours.audit().differences == ()
    assert reopen(hours, AB) == 0


def test_a_series_without_a_recorded_set(hours: Shelf) -> None:
    """As after an upgrade: the former eligible providers are unknown."""
    hole(hours, 0, absent())
    assert reopen(hours, AB) == 1


def test_a_single_provider_reopens_none_of_its_own_gaps(hours: Shelf) -> None:
    hole(hours, 0, absent())
    assert reopen(hours, A) == 0
    assert statuses(hours) == ["no_trade"]


@pytest.mark.parametrize(
    "evidence",
    [
        (absent(), absent("polygon")),  # two have responded
        (absent(), absent("polygon"), absent("yfinance", outcome="error")),
    ],
)
def test_a_gap_confirmed_by_two_providers_stays(hours: Shelf, evidence: Sequence[Evidence]) -> None:
    reopen(hours, A)
    hole(hours, 0, *evidence)
    assert reopen(hours, ABC) == 0
    assert statuses(hours) == ["no_trade"]


@pytest.mark.parametrize(("outcome", "reopened"), [("error", 1), ("rejected", 1), ("refused", 0)])
def test_a_new_provider_with_another_outcome(hours: Shelf, outcome: str, reopened: int) -> None:
    """It reopens gaps that it has no final response to."""
    reopen(hours, A)
    hole(hours, 0, absent(), absent("polygon", outcome=outcome))
    assert reopen(hours, AB) == reopened


@pytest.mark.parametrize("status", ["filled", "unavailable", "tolerated", "open"])
def test_gaps_of_other_states_stay(hours: Shelf, status: str) -> None:
    reopen(hours, A)
    hole(hours, 0, absent(), status=status)
    before = hours.rows("SELECT * FROM fks.gap WHERE series_id = :id")
    assert reopen(hours, AB) == 0
    assert hours.rows("SELECT * FROM fks.gap WHERE series_id = :id") == before


def test_a_key_that_is_removed_and_added_again(hours: Shelf) -> None:
    """It reopens gaps that were decided in its absence, and none that were decided with it."""
    reopen(hours, AB, day=0)
    hole(hours, 0, absent(day=1))  # its length fits the density of trades: the other one was not requested
    assert reopen(hours, A, day=2) == 0
    assert reopen(hours, AB, day=3) == 0
    assert reopen(hours, A, day=4) == 0
    hole(hours, 20, absent(day=5))
    assert reopen(hours, AB, day=6) == 1
    assert statuses(hours) == ["no_trade", "open"]
    assert reopen(hours, A, day=7) == 0
    assert reopen(hours, ABC, day=8) == 1  # the first one, by the provider that is new
    assert statuses(hours) == ["open", "open"]


def test_the_recorded_set(hours: Shelf) -> None:
    query = "SELECT eligible, eligible_until FROM fks.series WHERE id = :id"
    assert hours.rows(query) == [(None, {})]
    reopen(hours, ABC, day=1)
    assert hours.rows(query) == [(["binance", "oanda", "polygon"], {})]
    reopen(hours, A, day=2)
    ((now, until),) = hours.rows(query)
    assert now == ["oanda"]
    assert isinstance(until, dict)
    moments = {name: datetime.fromisoformat(text) for name, text in until.items()}
    assert moments == dict.fromkeys(["binance", "polygon"], to_datetime(MIDNIGHT + 2 * DAY))
    reopen(hours, frozenset(), day=3)
    ((now, until),) = hours.rows(query)
    assert now == []
    assert isinstance(until, dict)
    assert set(until) == {"binance", "oanda", "polygon"}
    reopen(hours, AB, day=4)
    ((now, until),) = hours.rows(query)
    assert (now, list(until)) == (["oanda", "polygon"], ["binance"])  # type: ignore[call-overload]


def test_a_series_that_is_being_committed_to_is_found_again(hours: Shelf) -> None:
    """While its ledger is being settled, neither the gap nor the recorded set changes."""
    reopen(hours, A)
    hole(hours, 0, absent())
    other = Database(hours.database.url.render_as_string(hide_password=False))
    with other.begin() as committing:
        committing.execute(sa.text(f"SELECT pg_advisory_xact_lock({_SERIES_LOCK}, {hours.identity})"))
        assert reopen(hours, AB) == 0
        assert statuses(hours) == ["no_trade"]
    other.dispose()
    assert reopen(hours, AB) == 1


def test_neighbours_become_one_gap_by_the_next_commit(hours: Shelf) -> None:
    reopen(hours, A)
    hole(hours, 0, absent())
    hours.commit(hours.span(10, 12), brought(candles_at(hours.opens(11, 12))))
    evidence = json.dumps([absent().to_json()])
    execute(
        hours.database,
        f"INSERT INTO fks.gap (series_id, gap_start, gap_end, missing_candles, status, attempts, evidence, by_day)"
        f" SELECT series_id, gap_end, gap_end + interval '1 hour', 1, 'no_trade', 1, '{evidence}', '{{1}}'"
        f" FROM fks.gap WHERE series_id = {hours.identity} AND missing_candles = 3",
        f"DELETE FROM {hours.table} WHERE series_id = {hours.identity} AND ts = '2024-01-01T04:00Z'",
        f"UPDATE fks.sync_state SET total_candles = total_candles - 1 WHERE series_id = {hours.identity}",
    )
    assert reopen(hours, AB) == 2
    assert hours.audit().differences == ()
    hours.commit(hours.span(0, 6), evidence=(absent("polygon", 1),))
    assert [(gap.missing, gap.status.value) for gap in hours.gaps()] == [(4, "open"), (1, "open")]


def test_thousands_of_series_in_two_statements(database: Database) -> None:
    """2,000 series with 40 gaps each: without a change it is almost free, with a new key it takes seconds."""
    series = [Series(f"S{n}/USDT", Timeframe.H1, AssetClass.CRYPTO) for n in range(2000)]
    execute(
        database,
        "INSERT INTO fks.series (symbol, timeframe, asset_class, calendar)"
        " SELECT 'S' || n || '/USDT', '1h', 'crypto', 'XNYS' FROM generate_series(0, 1999) n",
        "INSERT INTO fks.gap (series_id, gap_start, gap_end, missing_candles, status, attempts, evidence)"
        " SELECT s.id, at, at + interval '1 hour', 1, CASE mod(k, 4) WHEN 0 THEN 'no_trade' ELSE 'tolerated' END, 1,"
        f" '{json.dumps([absent().to_json()])}' FROM fks.series s, generate_series(1, 40) k,"
        " LATERAL (SELECT timestamptz '2024-01-01Z' + k * interval '3 hours' AS at) t",
        "ANALYZE fks.gap",
        "ANALYZE fks.series",
    )

    def run(eligible: frozenset[str], day: int) -> tuple[int, float]:
        statements: list[str] = []
        with database.begin() as connection:
            sa.event.listen(
                connection,
                "before_cursor_execute",
                lambda c, cur, statement, *_: statements.append(statement),
            )
            began = time.perf_counter()
            found = ledger.reopen(connection, dict.fromkeys(series, eligible), MIDNIGHT + day * DAY)
            seconds = time.perf_counter() - began
        assert len(statements) <= 2
        return sum(found.values()), seconds

    assert run(A, 1)[0] == 0
    assert run(A, 2)[0] == 0
    assert run(A, 2)[1] < 1
    reopened, seconds = run(AB, 3)
    assert reopened == 2000 * 10
    assert seconds < 20
    assert fetch(database, "SELECT status, count(*) FROM fks.gap GROUP BY 1 ORDER BY 1") == [
        ("open", 20_000),
        ("tolerated", 60_000),
    ]
    assert run(AB, 4)[0] == 0
