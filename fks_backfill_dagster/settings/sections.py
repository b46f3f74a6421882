"""The sections of the settings file."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    SecretStr,
    Tag,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from fks_backfill_dagster.domain.series import DEFAULT_CALENDAR, AssetClass, Instrument
from fks_backfill_dagster.domain.timeframe import Timeframe, iso
from fks_backfill_dagster.known_providers import KNOWN, KnownProvider
from fks_backfill_dagster.settings.sources import (
    CLASS_CALENDARS,
    hint,
)
from fks_backfill_dagster.settings.symbols import check_symbol
from fks_backfill_dagster.settings.types import (
    OTHERS,
    AnyInstant,
    Date,
    EachTimeframe,
    Instant,
    Many,
    TimeoutSeconds,
    Url,
    as_date,
    asset_class_of,
    between,
    calendar_name,
    host_name,
    login_mode,
    not_empty,
    nothing_is_empty,
    webhook_address,
)

PROVIDER_NAMES: Final = tuple(KNOWN)


def provider_name(name: str) -> str:
    if name not in PROVIDER_NAMES:
        raise ValueError(f"{name!r} is not a provider; {hint(name, PROVIDER_NAMES)}")
    return name


ProviderName = Annotated[str, AfterValidator(provider_name)]


class Section(BaseModel):
    """A part of the settings: frozen, strict, no unknown keys. An empty section keeps its defaults."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, raw: Any) -> Any:
        return {} if raw is None else raw


class ProviderSettings(Section):
    """How one provider is reached. The client appends the documented path to `base_url`.

    `requests_per_minute` None is the provider's own default; `timeout_seconds` is per request.
    """

    base_url: Url
    requests_per_minute: Annotated[int, between(1, 1_000_000)] | None = None
    timeout_seconds: TimeoutSeconds = 30.0
    enabled: bool = True


def _section_of(known: KnownProvider) -> tuple[type[ProviderSettings], ProviderSettings]:
    """The section of a provider, and its defaults."""
    addresses: dict[str, Any] = {"base_url": (Url, known.base_url)}
    if known.archive_url is not None:
        text = "The address of the daily and monthly archives; null: REST only."
        addresses["archive_url"] = (Url | None, Field(default=known.archive_url, description=text))
    section = create_model(known.name, __base__=ProviderSettings, **addresses)
    return section, section.model_validate({})


if TYPE_CHECKING:

    class Providers(Section):
        def __getattr__(self, name: str) -> ProviderSettings: ...
else:
    Providers = create_model(
        "Providers", __base__=Section, **{name: _section_of(known) for name, known in KNOWN.items()}
    )

Priority = Annotated[Many[ProviderName], AfterValidator(not_empty)]


class ProviderPriority(Section):
    """Providers in order of priority; each is requested for what the ones before it left missing."""

    crypto: Priority = ("binance", "coingecko", "polygon")
    stocks: Priority = ("polygon", "yfinance", "alphavantage")
    forex: Priority = ("oanda", "polygon")


_LIST, _BY_TIMEFRAME = "[list]", "[by timeframe]"
PRIORITY_TAGS: Final = ("[key]", _LIST, _BY_TIMEFRAME)
"""Parts of an error's location that pydantic adds; they are not keys of the file."""

PriorityByTimeframe = Annotated[dict[EachTimeframe, Priority], AfterValidator(not_empty)]
SymbolPriority = Annotated[
    Annotated[Priority, Tag(_LIST)] | Annotated[PriorityByTimeframe, Tag(_BY_TIMEFRAME)],
    Discriminator(lambda raw: _BY_TIMEFRAME if isinstance(raw, Mapping) else _LIST),
]


class ClosedDates(Section):
    """Dates on which a market was closed, from `start` to `end` inclusive; a single date is both."""

    start: Date
    end: Date

    @model_validator(mode="before")
    @classmethod
    def _single(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping | ClosedDates):
            return raw
        try:
            return {"start": as_date(raw), "end": as_date(raw)}
        except ValueError as error:
            raise ValueError(f"{error}, nor dates from {{start: ...}} to {{end: ...}}") from None

    @field_validator("end")
    @classmethod
    def _after_start(cls, end: date, info: ValidationInfo) -> date:
        start = info.data.get("start")
        if start is not None and end < start:
            raise ValueError(f"{end} lies before start, {start}: exchange them")
        return end


Closed = Annotated[tuple[ClosedDates, ...], Field(strict=False), BeforeValidator(nothing_is_empty)]


class CalendarSettings(Section):
    """Additions to a library calendar: `closed` are dates without any trading."""

    closed: Closed = ()


class GapDetection(Section):
    """`max_gap_minutes`: a gap up to this length is tolerated once all eligible providers have responded."""

    max_gap_minutes: Annotated[int, between(0, 525_600)] = 5
    check_interval_hours: Annotated[int, between(1, 8_760)] = 24


class Freshness(Section):
    """More closed candles than this beyond the allowed lag are a warning or an error."""

    warn_candles: Annotated[int, between(0, 1_000_000)] = 3
    error_candles: Annotated[int, between(0, 1_000_000)] = 10

    @model_validator(mode="after")
    def _warning_before_error(self) -> Self:
        if self.error_candles < self.warn_candles:
            raise ValueError(
                f"error_candles is {self.error_candles}, less than warn_candles, {self.warn_candles}"
            )
        return self


class Validation(Section):
    """`tolerance_pct` is a fraction of the other provider's price: 0.01 is one per cent."""

    enabled: bool = True
    tolerance_pct: Annotated[float, between(0, 1)] = 0.01
    validation_providers: Many[ProviderName] = ("coingecko", "polygon")


class Automation(Section):
    """Automation by Dagster. What is disabled here can still be started in its UI.

    `refresh`: the timeframes whose series are kept fresh. `fill_gaps`: whether due gaps are requested.
    `keep_runs_days`: age after which runs are deleted, with their events, if a later run has materialized
    their partitions.
    """

    refresh: Many[EachTimeframe] = tuple(Timeframe)
    fill_gaps: bool = True
    checks: bool = True
    audit: bool = True
    housekeeping: bool = True
    keep_runs_days: Annotated[int, between(1, 3_650)] = 3


class Webserver(Section):
    """Access to Dagster's pages that `up` serves.

    `hosts`: names of this server in a browser's address besides the loopback ones, such as those of a proxy.
    `login`: which requests need the token: all (true), none (false), or all but those of processes of the account
    that has called `up` (`others`); with FKS_API_TOKEN `others` means all.
    `report_assets`: whether other programs may report materializations and checks over HTTP.
    """

    hosts: Many[Annotated[str, AfterValidator(host_name)]] = ()
    login: Annotated[Literal[True, False, "others"], PlainValidator(login_mode)] = OTHERS
    report_assets: bool = False


class Alerts(Section):
    urls: Many[Annotated[SecretStr, AfterValidator(webhook_address)]] = ()


class SymbolSettings(Section):
    """One symbol and its timeframes.

    `start` None is `history_start`; from `end` on nothing is expected (delisted); `calendar` (stocks)
    None is XNYS; `provider_priority` None is that of the asset class, and so is a timeframe that it does not
    name; on the dates of `closed` nothing was traded. The order of the fields matters: later ones are
    checked against earlier ones.
    """

    asset_class: Annotated[AssetClass, BeforeValidator(asset_class_of)]
    symbol: str
    timeframes: Annotated[Many[EachTimeframe], AfterValidator(not_empty)]
    start: Instant | None = None
    end: AnyInstant | None = None
    calendar: str | None = None
    provider_symbols: dict[ProviderName, Annotated[str, Field(min_length=1)]] = {}
    provider_priority: SymbolPriority | None = None
    closed: Closed = ()

    @field_validator("symbol")
    @classmethod
    def _well_formed(cls, symbol: str, info: ValidationInfo) -> str:
        if "asset_class" in info.data:
            check_symbol(symbol, info.data["asset_class"])
        return symbol

    @field_validator("end")
    @classmethod
    def _after_start(cls, end: int | None, info: ValidationInfo) -> int | None:
        start = info.data.get("start")
        if end is not None and start is not None and end <= start:
            raise ValueError(f"{iso(end)} does not lie after start, {iso(start)}")
        return end

    @field_validator("calendar")
    @classmethod
    def _known_calendar(cls, name: str | None, info: ValidationInfo) -> str | None:
        if name is not None and info.data.get("asset_class", AssetClass.STOCKS) is not AssetClass.STOCKS:
            raise ValueError("only stocks have a calendar")
        if name in CLASS_CALENDARS:
            raise ValueError(f"{name!r} is the calendar of an asset class; stocks have an exchange's")
        return None if name is None else calendar_name(name)

    @property
    def instrument(self) -> Instrument:
        return Instrument(
            symbol=self.symbol,
            asset_class=self.asset_class,
            calendar=self.calendar or DEFAULT_CALENDAR,
            provider_symbols=tuple(self.provider_symbols.items()),
        )
