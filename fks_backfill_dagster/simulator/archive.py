"""Binance's public archives: zipped months and days of klines with their checksums.

Only which files exist at which time, and their content. The rows are those of `binance`.
"""

from __future__ import annotations

import io
import re
import zipfile
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, Timeframe, to_datetime, to_micros
from fks_backfill_dagster.simulator import binance
from fks_backfill_dagster.simulator.bars import Step
from fks_backfill_dagster.simulator.faults import (
    FILE,
    ROWS,
    Fault,
    Kind,
    RequestedSpan,
    Row,
    apply_fault,
    mixed,
)
from fks_backfill_dagster.simulator.state import Instrument, Sandbox
from fks_backfill_dagster.simulator.wire import Answer, Call, Reply

MICROSECONDS_FROM = to_micros(datetime(2025, 1, 1, tzinfo=UTC))
"""Rows that open from here on are stamped in microseconds, earlier ones in milliseconds."""

MONTHLY_LAG = 3 * MICROS_PER_DAY
"""After the first Monday of the next month. Daily files are published when their day is over."""

HEADER = (
    b"open_time,open,high,low,close,volume,close_time,quote_volume,count,"
    b"taker_buy_volume,taker_buy_quote_volume,ignore\n"
)
_PATH = re.compile(
    r"/data/spot/(?P<grain>monthly|daily)/klines/(?P<symbol>[^/]+)/(?P<interval>[^/]+)/"
    r"(?P<file>(?P=symbol)-(?P=interval)-(?P<period>\d{4}-\d\d(?:-\d\d)?)\.zip)(?P<checksum>\.CHECKSUM)?"
)
_NOT_FOUND = Reply(
    b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>NoSuchKey</Code>'
    b"<Message>The specified key does not exist.</Message></Error>",
    404,
    "application/xml",
)


@dataclass(frozen=True, slots=True)
class Archive:
    """One file: a period of a series."""

    symbol: str
    timeframe: Timeframe
    grain: str
    period: TimeRange

    @property
    def name(self) -> str:
        day = to_datetime(self.period.start).strftime("%Y-%m-%d" if self.grain == "daily" else "%Y-%m")
        return f"{self.symbol}-{self.timeframe}-{day}"

    @property
    def path(self) -> str:
        return f"/data/spot/{self.grain}/klines/{self.symbol}/{self.timeframe}/{self.name}.zip"


class Archives:
    """GET /data/spot/{monthly|daily}/klines/{SYM}/{INT}/{SYM}-{INT}-{PERIOD}.zip and .CHECKSUM."""

    name = "archive"

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def charge(self, call: Call) -> Reply | None:
        return None

    def extra_headers(self) -> tuple[tuple[str, str], ...]:
        return ()

    def spell(self, plain: str) -> str:
        return plain

    def error(self, status: int, retry_after: int) -> Reply:
        return Reply(b"<Error><Code>InternalError</Code></Error>", status, "application/xml")

    def with_other_symbol(self, call: Call, symbol: str, other: str | None) -> Answer:
        return self.answer(call)

    def answer(self, call: Call) -> Answer:
        match = _PATH.fullmatch(call.path)
        archive = None if match is None else _archive(match)
        if match is None or archive is None:
            return Answer(_NOT_FOUND, "unknown")
        endpoint = "checksum" if match["checksum"] else archive.grain
        body, fault = self._served(archive)
        if body is None:
            return Answer(_NOT_FOUND, endpoint, 1, archive.symbol, archive.period, fault=fault)
        if not match["checksum"]:
            return Answer(
                Reply(body, media_type="application/zip"),
                endpoint,
                1,
                archive.symbol,
                archive.period,
                None,
                fault,
            )
        digest = sha256(body).hexdigest()
        wrong = self._sandbox.faults.pick(
            self.name,
            frozenset({Kind.WRONG_CHECKSUM}),
            archive.symbol,
            call.path,
            RequestedSpan(archive.period),
        )
        if wrong is not None:
            digest, fault = sha256(body + b"?").hexdigest(), wrong
        text = f"{digest}  {archive.name}.zip\n".encode()
        return Answer(
            Reply(text, media_type="text/plain"), endpoint, 1, archive.symbol, archive.period, None, fault
        )

    def prepare(self, symbol: str, timeframe: Timeframe, window: TimeRange) -> tuple[int, int]:
        """Builds every published month and day that overlaps `window`; returns (files, bytes)."""
        files = size = 0
        for grain in ("monthly", "daily"):
            at = _period(grain, to_datetime(window.start))
            while at.start < window.end:
                body = self._file(Archive(symbol, timeframe, grain, at))
                files, size = files + (body is not None), size + len(body or b"")
                at = _period(grain, to_datetime(at.end))
        return files, size

    def _served(self, archive: Archive) -> tuple[bytes | None, Fault | None]:
        body = self._file(archive)
        if body is None:
            return None, None
        fault = self._sandbox.faults.pick_file(
            self.name, ROWS | FILE, archive.symbol, archive.path, RequestedSpan(archive.period)
        )
        if fault is None or fault.kind is Kind.ARCHIVE_404:
            return (body if fault is None else None), fault
        if fault.kind is Kind.CORRUPT_ZIP:
            middle = len(body) // 2
            return body[:middle] + bytes(b ^ 0xFF for b in body[middle : middle + 16]) + body[
                middle + 16 :
            ], fault
        return self._with_faulty_rows(archive, fault), fault

    def _with_faulty_rows(self, archive: Archive, fault: Fault) -> bytes:
        fields, unit = binance.ROWS.fields, _unit(archive.period)
        if fault.kind is Kind.OTHER_SYMBOL:
            requested = Instrument(AssetClass.CRYPTO, archive.symbol)
            other = self._sandbox.other_symbol("binance", requested, fault.other) or archive.symbol
            theirs = replace(archive, symbol=other)
            if fault.only is None:
                return _zipped(archive.name, self._text(theirs))
            rows = mixed(self._rows(archive), self._rows(theirs), fields, unit, fault.only)
        else:
            rows = apply_fault(fault, self._rows(archive), fields, unit)
        header = HEADER if self._has_header(archive) else b""
        return _zipped(
            archive.name, header + "".join(",".join(map(str, row)) + "\n" for row in rows).encode()
        )

    def _rows(self, archive: Archive) -> list[Row]:
        header = HEADER if self._has_header(archive) else b""
        lines = self._text(archive).removeprefix(header).decode().splitlines()
        return [[int(ts), *rest] for ts, *rest in (line.split(",") for line in lines)]

    def _file(self, archive: Archive) -> bytes | None:
        """The file without faults; None if it is not published (yet)."""
        if not self._published(archive):
            return None
        body = self._sandbox.prepared.get(archive)
        if body is None:
            text = self._text(archive)
            if not text:
                return None
            body = _zipped(archive.name, text)
            self._sandbox.prepared.put(archive, body)
        return body

    def _published(self, archive: Archive) -> bool:
        market = self._sandbox.crypto["binance"]
        if not market.has_symbol(archive.symbol):
            return False
        if archive.grain == "daily" and archive.timeframe is Timeframe.W1:
            return False  # weekly candles are published only in the month in which they open
        end, now = archive.period.end, self._sandbox.clock.now()
        if self._sandbox.replays:
            listing = market.listing(archive.symbol)
            return listing.start <= archive.period.start and end <= min(listing.end, now)
        return now >= (end if archive.grain == "daily" else _first_monday(end) + MONTHLY_LAG)

    def _text(self, archive: Archive) -> bytes:
        bars = self._sandbox.closed("binance", archive.symbol, Step.of(archive.timeframe), archive.period)
        if len(bars) == 0:
            return b""
        header = HEADER if self._has_header(archive) else b""
        return header + binance.csv_rows(bars, archive.timeframe, _unit(archive.period))

    def _has_header(self, archive: Archive) -> bool:
        since = self._sandbox.config.archive_header_from
        return since is not None and archive.period.start >= since


def _archive(match: re.Match[str]) -> Archive | None:
    """The file of a path; None for an invalid interval or date."""
    if match["interval"] not in list(Timeframe) or (match["grain"] == "daily") != (
        len(match["period"]) == 10
    ):
        return None
    try:
        first = datetime.fromisoformat(f"{match['period']}{'' if match['grain'] == 'daily' else '-01'}")
    except ValueError:
        return None
    period = _period(match["grain"], first.replace(tzinfo=UTC))
    return Archive(match["symbol"], Timeframe(match["interval"]), match["grain"], period)


def _period(grain: str, moment: datetime) -> TimeRange:
    """The day or month that contains `moment`."""
    start = moment.replace(hour=0, minute=0, second=0, microsecond=0)
    if grain == "daily":
        return TimeRange.of(start, start + timedelta(days=1))
    start = start.replace(day=1)
    return TimeRange.of(start, (start + timedelta(days=32)).replace(day=1))


def _first_monday(month: int) -> int:
    first = to_datetime(month)
    return to_micros(first + timedelta(days=-first.weekday() % 7))


def _unit(period: TimeRange) -> int:
    return 1 if period.start >= MICROSECONDS_FROM else 1000


def _zipped(name: str, text: bytes) -> bytes:
    """Deterministic: the entry has a fixed date."""
    buffer = io.BytesIO()
    entry = zipfile.ZipInfo(f"{name}.csv", date_time=(2020, 1, 1, 0, 0, 0))
    entry.compress_type = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(buffer, "w") as target:
        target.writestr(entry, text, compresslevel=1)
    return buffer.getvalue()
