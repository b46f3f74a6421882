"""`quarantine`: rejected rows with their neighbours, released as corrections, or dropped with a reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.delivery import RejectedRows
from fks_backfill_dagster.domain.quality import Reason
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.writer.records import Committed
from fks_backfill_dagster_tests.cli.conftest import Command
from fks_backfill_dagster_tests.store.builders import Shelf, brought, candles_at, origin_of
from fks_backfill_dagster_tests.store.conftest import fresh


@pytest.fixture
def shelf(database: Database, database_url: str, settings: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    """Ten candles, of which 4 and 6 are missing: their rows were rejected, one as a splice, one as insane."""
    monkeypatch.setenv("FKS_DATABASE_URL", database_url)
    made = Shelf.of(database, fresh("1h"))
    opens = made.opens(0, 10)
    spliced, other = candles_at(opens[[4]], 2), candles_at(opens[[6]], 2)
    rejected = (
        RejectedRows.of(origin_of(), Reason.SPLICE, spliced),
        RejectedRows.of(origin_of("polygon"), Reason.HIGH_LOW, replace(other, high=other.low - 1)),
    )
    kept = np.delete(opens, [4, 6])
    made.commit(made.span(0, 10), brought(candles_at(kept)), refused=rejected)
    return made


def ids(fks: Command, *options: str) -> dict[str, int]:
    """The id of each row, by its rule."""
    return {one["rule"]: one["id"] for one in fks("quarantine", "list", *options, "--json").json}


def stored_at(shelf: Shelf, position: int) -> Candles:
    return shelf.read().take(shelf.read().ts == shelf.opens(position, position + 1)[0])


def test_rows_are_listed_by_series_and_rule(shelf: Shelf, fks: Command) -> None:
    assert ids(fks).keys() == {"splice", "high_low"}
    assert ids(fks, "--reason", "splice").keys() == {"splice"}
    assert ids(fks, shelf.series.symbol, "1h").keys() == {"splice", "high_low"}
    assert ids(fks, "--decided") == {}
    table = fks("quarantine", "list").stdout
    assert "polygon" in table
    assert table.splitlines()[0].split()[0] == "id"
    wrong = fks("quarantine", "list", "--reason", "bad")
    assert (wrong.exit_code, "'bad' is no rule; the rules are off_grid, " in wrong.stderr) == (2, True)


def test_a_row_is_shown_with_the_stored_candles_around_it(shelf: Shelf, fks: Command) -> None:
    row = ids(fks)["splice"]
    (shown,) = fks("quarantine", "show", str(row), "--json").json
    opens = shelf.opens(0, 10)
    stored = candles_at(opens[[2, 3, 5, 7]])
    assert [(one["ts"][:13], one["close"]) for one in shown["stored"]] == [
        (str(np.datetime64(int(ts), "us"))[:13], close)
        for ts, close in zip(stored.ts.tolist(), stored.close.tolist(), strict=True)
    ]
    assert shown["close"] == candles_at(opens[[4]], 2).close[0]
    assert "stored (UTC)" in fks("quarantine", "show", str(row)).stdout


def test_a_released_row_is_stored_pinned_and_can_be_undone(shelf: Shelf, fks: Command) -> None:
    row = ids(fks)["splice"]
    result = fks("quarantine", "release", str(row), "--reason", "it was real", "--author", "bob", "--json")
    assert result.exit_code == 0
    (released,) = result.json["released"]
    assert released["ids"] == [row]
    assert stored_at(shelf, 4).equals(candles_at(shelf.opens(4, 5), 2))
    assert [g.missing for g in shelf.gaps()] == [1]
    batch = fks("batches", "list", "--json").json[0]
    assert (batch["id"], batch["kind"], batch["author"], batch["reason"], batch["source"]) == (
        released["batch"],
        "correction",
        "bob",
        "it was real",
        f"quarantine {row} (binance, splice)",
    )
    assert shelf.put(4, 5, version=6) == Committed(0, 0, 0, pinned=1)
    (decided,) = fks("quarantine", "list", "--decided", "--json").json
    assert (decided["decision"], decided["decided_by"], decided["reason"], decided["batch"]) == (
        "released",
        "bob",
        "it was real",
        batch["id"],
    )
    again = fks("quarantine", "release", str(row), "--reason", "x")
    assert (again.exit_code, f"row {row} was released before, by bob: it was real" in again.stderr) == (
        2,
        True,
    )
    assert fks("batches", "undo", str(batch["id"]), "--yes").exit_code == 0
    assert len(stored_at(shelf, 4)) == 0
    assert shelf.audit().differences == ()


def test_what_breaks_a_rule_of_candles_is_refused_as_a_whole(shelf: Shelf, fks: Command) -> None:
    found = ids(fks)
    result = fks("quarantine", "release", *map(str, found.values()), "--reason", "x", "--json")
    assert result.exit_code == 1
    assert result.json == {
        "released": [],
        "rejected": 1,
        "problems": [
            {"id": found["high_low"], "reason": "high is not the highest price, or low not the lowest"}
        ],
    }
    assert f"row {found['high_low']}: high is not the highest price" in result.stderr
    assert ids(fks) == found
    assert len(shelf.read()) == 8


def test_a_dropped_row_is_kept_with_its_reason(shelf: Shelf, fks: Command) -> None:
    row = ids(fks)["high_low"]
    assert fks("quarantine", "drop", str(row), "--reason", "cut off", "--author", "bob", "--json").json == {
        "dropped": 1
    }
    assert ids(fks).keys() == {"splice"}
    (kept,) = fks("quarantine", "list", "--decided", "--json").json
    assert (kept["id"], kept["decision"], kept["decided_by"], kept["reason"]) == (
        row,
        "dropped",
        "bob",
        "cut off",
    )
    other = candles_at(shelf.opens(6, 7), 2)
    bad = RejectedRows.of(origin_of("polygon"), Reason.HIGH_LOW, replace(other, high=other.low - 1))
    shelf.commit(shelf.span(6, 7), refused=(bad,))
    assert ids(fks).keys() == {"splice"}  # received again, and still dropped
    assert fks("quarantine", "list", "--decided", "--json").json[0]["seen"] == 2


def test_a_row_that_does_not_exist(shelf: Shelf, fks: Command) -> None:
    for command in ("show", "release", "drop"):
        options = () if command == "show" else ("--reason", "x")
        result = fks("quarantine", command, "999999", *options)
        assert (result.exit_code, "there is no row 999999 in quarantine" in result.stderr) == (2, True)
