"""Archives: selection of files, publication, and the fallback to REST."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, Timeframe
from fks_backfill_dagster.providers.base import Transport
from fks_backfill_dagster.providers.binance_archive import (
    ArchiveFile,
    Fetched,
    Outcome,
    choose_files,
    month_of,
    published_at,
    read_archive,
)
from fks_backfill_dagster_tests.providers.archives import JANUARY, fetch, kinds, of
from fks_backfill_dagster_tests.providers.conftest import Make
from fks_backfill_dagster_tests.providers.scripted import (
    Received,
    Scripted,
    SmallBinance,
    candles_at,
    checksum_of,
    crypto,
    csv_of,
    serve,
    span,
    us,
    zipped_csv,
)

pytestmark = pytest.mark.server


class TestChoice:
    """`choose_files`, a pure function."""

    now = us("2026-01-01")

    def chosen(
        self,
        window: TimeRange,
        timeframe: Timeframe = Timeframe.M1,
        fetched: tuple[Fetched, ...] = (),
        now: int = now,
    ) -> list[str]:
        return [
            file.stem[11:] for file in choose_files("BTCUSDT", timeframe, RangeSet([window]), fetched, now)
        ]

    def test_whole_months(self) -> None:
        assert self.chosen(span("2023-12-01", "2024-02-01")) == ["2023-12", "2024-01"]

    def test_most_of_a_month_uses_the_monthly_file(self) -> None:
        assert self.chosen(span("2024-01-10", "2024-02-03")) == ["2024-01", "2024-02-01", "2024-02-02"]

    def test_a_part_of_a_day_uses_rest(self) -> None:
        assert self.chosen(span("2024-01-10T12:00", "2024-01-11T16:00")) == []
        assert self.chosen(span("2024-01-10T06:00", "2024-01-11T16:00")) == ["2024-01-10"]

    @pytest.mark.parametrize(
        ("timeframe", "files"),
        [
            (Timeframe.M5, ["2024-01"]),
            (Timeframe.M15, ["2024-01"]),
            (Timeframe.M30, ["2024-01"]),
            (Timeframe.H1, []),
            (Timeframe.D1, []),
            (Timeframe.W1, []),
        ],
    )
    def test_timeframes(self, timeframe: Timeframe, files: list[str]) -> None:
        assert [name.removeprefix("-") for name in self.chosen_stems(timeframe)] == files
        assert self.chosen_stems(Timeframe.M5, span("2024-01-05", "2024-01-08")) == [], (
            "less than a page a day"
        )

    def chosen_stems(self, timeframe: Timeframe, window: TimeRange = JANUARY) -> list[str]:
        files = choose_files("B", timeframe, RangeSet([window]), (), self.now)
        return [file.stem.removeprefix(f"B-{timeframe}-") for file in files]

    @pytest.mark.parametrize(
        ("now", "monthly"),
        [("2024-02-04T23:59", False), ("2024-02-05T00:00", True)],  # the first Monday of February
    )
    def test_a_month_is_published_from_the_first_monday_on(self, now: str, monthly: bool) -> None:
        assert ArchiveFile("B", Timeframe.M1, JANUARY, monthly=True).published(us(now)) is monthly
        names = self.chosen(JANUARY, now=us(now))
        assert names == (["2024-01"] if monthly else [f"2024-01-{day:02}" for day in range(1, 32)])

    def test_the_first_of_a_month_that_is_a_monday(self) -> None:
        april = ArchiveFile("B", Timeframe.M1, span("2024-03-01", "2024-04-01"), monthly=True)
        assert april.published(us("2024-04-01"))
        assert not april.published(us("2024-03-31T23:59"))

    def test_days_are_published_after_their_end(self) -> None:
        assert self.chosen(span("2024-01-08", "2024-01-11"), now=us("2024-01-10T07:00")) == [
            "2024-01-08",
            "2024-01-09",
        ]

    def test_without_a_monthly_file_the_newest_day_decides(self) -> None:
        month = Fetched(ArchiveFile("BTCUSDT", Timeframe.M1, JANUARY, monthly=True), Outcome.ABSENT)
        assert self.chosen(JANUARY, fetched=(month,)) == ["2024-01-31"]
        last = ArchiveFile("BTCUSDT", Timeframe.M1, span("2024-01-31", "2024-02-01"), monthly=False)
        assert self.chosen(JANUARY, fetched=(month, Fetched(last, Outcome.ABSENT))) == []
        rest = self.chosen(JANUARY, fetched=(month, Fetched(last, Outcome.FAILED)))
        assert rest == [f"2024-01-{day:02}" for day in range(1, 31)]

    def test_paths(self) -> None:
        monthly = ArchiveFile("BTCUSDT", Timeframe.M1, JANUARY, monthly=True)
        daily = ArchiveFile("BTCUSDT", Timeframe.M15, span("2024-01-05", "2024-01-06"), monthly=False)
        assert monthly.path == "/data/spot/monthly/klines/BTCUSDT/1m/BTCUSDT-1m-2024-01.zip"
        assert daily.path == "/data/spot/daily/klines/BTCUSDT/15m/BTCUSDT-15m-2024-01-05.zip"


class TestHonest:
    def test_a_month(self, make: Make) -> None:
        answer, server = fetch(make, SmallBinance(), JANUARY)
        assert kinds(server) == ["monthly"]
        (delivery,) = answer.deliveries
        assert delivery.origin.transport is Transport.ARCHIVE
        assert delivery.origin.source == "/data/spot/monthly/klines/BTCUSDT/1m/BTCUSDT-1m-2024-01.zip"
        assert delivery.origin.sha256 is not None
        assert len(delivery.origin.sha256) == 64

    def test_microseconds_header_and_the_turn_of_2025(self, make: Make) -> None:
        window = span("2024-12-31", "2025-01-02")
        for header in (False, True):
            answer, server = fetch(make, SmallBinance(header=header), window)
            assert kinds(server) == ["daily", "daily"]
            assert answer.warnings == ()

    def test_units_are_decided_row_by_row(self) -> None:
        period = span("2024-12-31", "2025-01-01")
        file = ArchiveFile("BTCUSDT", Timeframe.M1, period, monthly=False)
        candles = candles_at(np.arange(period.start, period.end, 60_000_000), "BTCUSDT")
        lines = csv_of(candles, Timeframe.M1).decode().splitlines()
        mixed = [line if i % 2 else line.replace(",", "000,", 1) for i, line in enumerate(lines)]
        zipped = zipped_csv("\n".join(mixed).encode(), file.stem)
        assert read_archive(file, zipped, checksum_of(zipped, f"{file.stem}.zip").body, "http://h")[0].equals(
            candles
        )

    def test_a_missing_stretch_is_fetched_from_rest(self, make: Make) -> None:
        six_hours = RangeSet([span("2024-01-05T01:00", "2024-01-05T07:00")])
        answer, server = fetch(make, SmallBinance(archive_missing=six_hours), JANUARY)
        assert kinds(server) == ["monthly", "rest"]
        assert [len(d.candles) for d in answer.deliveries] == [44_640 - 360, 360]

    def test_a_missing_day_is_fetched_from_its_daily_file(self, make: Make) -> None:
        day = span("2024-01-05", "2024-01-06")

        def archive(asked: Received, honest: Scripted) -> Scripted:
            return SmallBinance(archive_missing=RangeSet([day]))(asked) if "monthly" in asked.path else honest

        answer, server = fetch(make, SmallBinance(archive=archive), JANUARY)
        assert kinds(server) == ["monthly", "daily"]
        assert [len(d.candles) for d in answer.deliveries] == [44_640 - 1440, 1440]
        assert len({d.origin.sha256 for d in answer.deliveries}) == 2

    def test_close_outages_share_one_request(self, make: Make) -> None:
        outage = RangeSet(
            [span("2024-01-05T03:00", "2024-01-05T03:07"), span("2024-01-05T09:00", "2024-01-05T09:01")]
        )
        _, server = fetch(make, SmallBinance(outage=outage), JANUARY)
        assert kinds(server) == ["monthly", "rest"]

    def test_monthly_file_not_published_yet(self, make: Make) -> None:
        window = span("2024-01-01", "2024-01-31T12:00")
        answer, server = fetch(make, SmallBinance(unpublished=("/monthly/",)), window)
        assert kinds(server) == ["monthly"] + ["daily"] * 30 + ["rest"]
        assert answer.warnings == ()

    def test_no_archives_of_the_symbol(self, make: Make) -> None:
        answer, server = fetch(make, SmallBinance(unpublished=("/data/",)), JANUARY)
        assert kinds(server) == ["monthly", "daily"] + ["rest"] * 45
        assert answer.warnings == ()

    def test_few_requests_before_the_listing(self, make: Make) -> None:
        _, server = fetch(
            make, SmallBinance(listed=us("2024-02-01"), unpublished=("2023", "2024-01")), JANUARY
        )
        assert kinds(server)[:2] == ["monthly", "daily"]
        assert kinds(server).count("rest") <= 46

    def test_archives_off(self, make: Make) -> None:
        with serve(SmallBinance()) as server:
            make("binance", server.url).fetch(crypto(), span("2024-01-05", "2024-01-06"))
            assert kinds(server) == ["rest", "rest"]

    def test_the_clock_decides_which_files_are_published(self, make: Make) -> None:
        window = span("2024-01-05", "2024-01-07")
        _, server = fetch(make, SmallBinance(), window, clock=lambda: us("2024-01-06T20:00") + MICROS_PER_DAY)
        assert kinds(server) == ["daily", "daily"]
        with serve(SmallBinance()) as server:
            provider = make(
                "binance", server.url, archive_url=server.url, clock=lambda: us("2024-01-06T20:00")
            )
            provider.fetch(crypto(), window)
        assert kinds(server) == ["daily", "rest", "rest"]

    def test_bad_rows_are_delivered_and_fetched_from_rest(self, make: Make) -> None:
        day = span("2024-01-05", "2024-01-06")
        market = SmallBinance()
        truth = market.truth(crypto(), day)

        def archive(asked: Received, _: Scripted) -> Scripted:
            lines = csv_of(truth, Timeframe.M1).decode().splitlines()
            lines[7] = lines[7].replace("," + lines[7].split(",")[4], ",NaN", 1)
            lines[9] = lines[9].replace("000,", "500,", 1)
            zipped = zipped_csv("\n".join(lines).encode(), "BTCUSDT-1m-2024-01-05")
            return (
                checksum_of(zipped, "BTCUSDT-1m-2024-01-05.zip")
                if "CHECK" in asked.path
                else Scripted(zipped)
            )

        market.archive = archive
        with serve(market) as server:
            answer = make("binance", server.url, archive_url=server.url).fetch(crypto(), day)
        archived, rest = answer.deliveries
        assert len(archived.candles) == 1440, "both bad rows are delivered, to be quarantined"
        assert np.isnan(archived.candles.close).sum() == 1
        assert rest.candles.ts.tolist() == truth.ts[[7, 9]].tolist()

    def test_estimate(self, make: Make) -> None:
        window = span("2024-01-01", "2024-02-03T06:00")
        _, server = fetch(make, SmallBinance(), window)
        estimate = make("binance", server.url, archive_url=server.url).estimate(crypto(), window)
        assert estimate.requests == len(server.requests)


class TestBeforeTheListing:
    """An archive may contain candles from before the first candle of REST; they are delivered."""

    def test_rows_of_an_archive_from_before_the_listing_of_rest(self, make: Make) -> None:
        listed = us("2024-01-20")
        since = us("2024-01-05T07:30")
        old = SmallBinance(listed=since)
        market = SmallBinance(listed=listed, archive=lambda asked, _: old(asked))
        with serve(market) as server:
            provider = make("binance", server.url, archive_url=server.url)
            assert provider.listed_at(crypto()) == listed
            got = of(provider.fetch(crypto(), JANUARY))
        assert got.equals(old.truth(crypto(), JANUARY))
        assert int(got.ts[0]) == since


class TestPublished:
    """The publication time of an archive: its Last-Modified, otherwise derived from its period."""

    MONTH = ArchiveFile("BTCUSDT", Timeframe.M1, JANUARY, monthly=True)
    DAY = ArchiveFile("BTCUSDT", Timeframe.M1, span("2024-01-05", "2024-01-06"), monthly=False)

    @pytest.mark.parametrize("file", [MONTH, DAY])
    def test_with_a_header(self, file: ArchiveFile) -> None:
        for text in (
            "Tue, 06 Feb 2024 09:10:11 GMT",
            "Tue, 06 Feb 2024 10:10:11 +0100",
            "Tue, 06 Feb 2024 09:10:11 -0000",
        ):
            assert published_at(file, {"Last-Modified": text}) == us("2024-02-06T09:10:11")

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            *(
                {"Last-Modified": text}
                for text in ("", "soon", "2024-02-06", "Tue, 99 Feb 2024 09:10:11 GMT")
            ),
        ],
    )
    def test_without_one_or_with_a_broken_one(self, headers: dict[str, str]) -> None:
        """A monthly file may be older than a daily file of the month: it counts as published after the first day."""
        assert published_at(self.DAY, headers) == us("2024-01-06")
        assert published_at(self.MONTH, headers) == us("2024-01-02")

    @pytest.mark.parametrize(
        ("header", "published"),
        [
            ("Tue, 06 Feb 2024 09:10:11 GMT", "2024-02-06T09:10:11"),
            (
                "Tue, 06 Feb 2091 09:10:11 GMT",
                "2024-03-01",
            ),  # its clock is ahead: limited to the request time
            ("soon", "2024-01-02"),
            (None, "2024-01-02"),
        ],
    )
    def test_of_a_fetched_file(self, make: Make, header: str | None, published: str) -> None:
        headers = {"Last-Modified": header} if header else {}
        market = SmallBinance(archive=lambda _, honest: replace(honest, headers=headers))
        answer, server = fetch(make, market, JANUARY, clock=lambda: us("2024-03-01"))
        origin = answer.deliveries[0].origin
        assert (origin.published_at, origin.requested_at) == (us(published), us("2024-03-01"))
        assert (origin.as_of, origin.host, origin.instrument) == (us(published), server.url, "BTCUSDT")

    def test_rest_is_dated_by_its_request(self, make: Make) -> None:
        now = us("2024-03-01T12:00")
        six_hours = RangeSet([span("2024-01-05T01:00", "2024-01-05T07:00")])
        answer, _ = fetch(make, SmallBinance(archive_missing=six_hours), JANUARY, clock=lambda: now)
        archive, rest = (delivery.origin for delivery in answer.deliveries)
        assert (rest.published_at, rest.as_of) == (None, now)
        assert archive.as_of < rest.as_of


def test_month_of() -> None:
    assert month_of(us("2024-12-31T23:59")) == span("2024-12-01", "2025-01-01")
