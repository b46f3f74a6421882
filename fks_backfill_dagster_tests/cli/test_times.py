"""`--start`, `--end` and the like: forms, and what they mean."""

from __future__ import annotations

import click
import pytest

from fks_backfill_dagster import app
from fks_backfill_dagster.cli.times import Moment
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_SECOND
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.simulator.local import LocalMarket
from fks_backfill_dagster_tests.cli.conftest import Command

NOW = instant("2024-03-05T12:34:56") + 789


def parsed(text: str) -> int:
    return Moment().convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("2024", "2024-01-01"),
        ("2024-02", "2024-02-01"),
        ("2024-02-03", "2024-02-03"),
        ("2024-02-03T04:00+02:00", "2024-02-03T02:00"),
        (" 2024-02-03 04:00 ", "2024-02-03T04:00"),
        ("1970", "1970-01-01"),
        ("-7d", "2024-02-27T12:34:56"),
        ("-90m", "2024-03-05T11:04:56"),
        ("-2w", "2024-02-20T12:34:56"),
        ("-0h", "2024-03-05T12:34:56"),
    ],
)
def test_a_time_is_a_date_a_month_a_year_or_before_now(
    text: str, means: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "now", lambda: NOW)
    assert parsed(text) == instant(means)


@pytest.mark.parametrize(
    "text", ["", "7d", "-7", "-7mo", "-d", "-1.5d", "24", "2024-1", "02024", "2024-00", "now"]
)
def test_other_forms_are_rejected_with_the_known_ones(text: str) -> None:
    with pytest.raises(click.BadParameter, match="-7d \\(units m h d w\\)"):
        parsed(text)


@pytest.mark.parametrize("form", [("--start", "-7d"), ("--start=-7d",)])
def test_a_relative_start_takes_whole_candles(
    fks: Command, world: LocalMarket, form: tuple[str, ...]
) -> None:
    report = fks("backfill", "BTC/USDT", "1h", *form, "--dry-run", "--json").json
    assert report["expected"] in (167, 168), "168 at a full hour"
    length = instant(report["end"]) - instant(report["start"])
    assert length + 3_600 * MICROS_PER_SECOND > 7 * MICROS_PER_DAY - MICROS_PER_SECOND
    whole = fks("backfill", "BTC/USDT", "1h", "--start", "2024", "--end", "2025", "--dry-run", "--json").json
    assert whole["expected"] == 366 * 24
