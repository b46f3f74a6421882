"""Closed dates and changed calendars in the commands `backfill`, `status`, `gaps`, `series accept-calendar`."""

from __future__ import annotations

from pathlib import Path

import pytest

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.simulator.local import LocalMarket
from fks_backfill_dagster_tests.calendars import Update, update
from fks_backfill_dagster_tests.cli.conftest import Command

__all__ = ["update"]

SETTINGS = """
symbols:
  - symbol: AAPL
    asset_class: stocks
    timeframes: [1d, 1w]
    provider_priority: [polygon]
    end: 2024-03-25
    CLOSED
"""
MARCH = ("--start", "2024-02-26", "--end", "2024-03-25")


def close(settings: Path, dates: str = "") -> None:
    settings.write_text(SETTINGS.replace("CLOSED", f"closed: [{dates}]"))


@pytest.fixture
def typhoon(world: LocalMarket, settings: Path) -> LocalMarket:
    """Two days that no provider has, and that are sessions of the calendar."""
    close(settings)
    for day in ("2024-03-08", "2024-03-13"):
        world.plant_outage("polygon", TimeRange(instant(day), instant(f"{day}T23:00")))
    return world


def test_days_closed_on_short_notice(fks: Command, typhoon: LocalMarket, settings: Path) -> None:
    assert fks("backfill", "AAPL", "1d", *MARCH).exit_code == 1
    assert fks("backfill", "AAPL", "1w", *MARCH).exit_code == 1
    assert [gap["status"] for gap in fks("gaps", "AAPL", "1d", "--json").json] == ["unavailable"] * 2
    before = fks("status", "AAPL", "1d", "--json").json
    assert (before["expected"], before["stored"], before["coverage"]) == (20, 18, 0.9)

    close(settings, "2024-03-08, 2024-03-13")
    typhoon.reset_requests()
    result = fks("status", "AAPL", "1d", "--json")
    assert "AAPL 1d: 2 closed dates added by the settings" in result.stderr
    assert (result.json["stored"], result.json["coverage"]) == (18, 1.0)
    assert [gap["status"] for gap in fks("gaps", "AAPL", "1d", "--json").json] == ["no_trade"] * 2
    assert typhoon.requests() == 0
    done = fks("backfill", "AAPL", "1d", *MARCH, "--json")
    assert (done.exit_code, done.json["expected"], done.json["missing"]) == (0, 20, 0)
    weeks = fks("backfill", "AAPL", "1w", *MARCH, "--json")
    assert (weeks.exit_code, weeks.json["total_candles"]) == (0, 2)

    close(settings, "2024-03-08")
    result = fks("gaps", "AAPL", "1d", "--json")
    assert "AAPL 1d: 1 closed date withdrawn by the settings" in result.stderr
    assert [gap["status"] for gap in result.json] == ["no_trade", "unavailable"]


def test_a_changed_calendar_is_reported_and_accepted(
    fks: Command, world: LocalMarket, settings: Path, update: Update
) -> None:
    close(settings)
    update("XNYS", closed=["2024-03-13"])
    assert fks("backfill", "AAPL", "1d", *MARCH).exit_code == 0
    update("XNYS")
    result = fks("status", "AAPL", "1d")
    assert result.exit_code == 0
    assert "XNYS has changed" in result.stderr
    assert "2024-03-13 is a new session" in result.stderr
    again = fks("backfill", "AAPL", "1d", *MARCH)
    assert again.exit_code == 0
    assert "XNYS has changed" in again.stderr
    assert fks("gaps", "AAPL", "1d", "--json").json == []
    found = fks("audit", "--json")
    assert found.exit_code == 1
    assert [d["kind"] for d in found.json["series"][0]["differences"]] == ["calendar_changed"]

    done = fks("series", "accept-calendar", "XNYS", "--json")
    assert done.exit_code == 0
    assert (done.json["calendar"], done.json["new"], done.json["gone"]) == ("XNYS", ["2024-03-13"], [])
    assert [d["kind"] for d in done.json["audit"]["series"][0]["differences"]] == ["unrecorded_gap"]
    assert "has changed" not in fks("status", "AAPL", "1d").stderr
    (filled,) = fks("fill-gaps", "AAPL", "1d", "--json").json
    assert (filled["success"], filled["candles_filled"]) == (True, 1)
    assert fks("audit").exit_code == 0


def test_the_candle_of_a_removed_session_stays(
    fks: Command, world: LocalMarket, settings: Path, update: Update
) -> None:
    close(settings)
    assert fks("backfill", "AAPL", "1d", *MARCH).exit_code == 0
    update("XNYS", closed=["2024-03-13"])
    assert "XNYS has changed" in fks("status", "AAPL", "1d", "--check").stderr
    done = fks("series", "accept-calendar", "XNYS")
    assert done.exit_code == 1
    assert "XNYS: 2024-03-13 is no session any more: accepted." in done.stdout
    assert "open where no candle is expected" in done.stdout
    assert fks("status", "AAPL", "1d", "--json").json["total_candles"] == 20


def test_nothing_to_accept(fks: Command, world: LocalMarket) -> None:
    done = fks("series", "accept-calendar", "XNYS")
    assert done.exit_code == 0
    assert "XNYS: nothing to accept" in done.stderr
