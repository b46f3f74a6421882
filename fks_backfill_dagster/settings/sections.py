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
    Form,
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


ProviderName = Annotated[str, AfterValidator(provider_name), Form("provider")]


class Section(BaseModel):
    """A part of the settings: frozen, strict, no unknown keys. An empty section keeps its defaults."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, raw: Any) -> Any:
        return {} if raw is None else raw


class ProviderSettings(Section):
    """How one provider is reached."""

    base_url: Url = Field(
        description="Scheme, host and optional path prefix; the provider's documented path follows. `http://` to"
        " another machine is refused while the provider's key is set."
    )
    requests_per_minute: Annotated[int, between(1, 1_000_000, "requests a minute")] | None = Field(
        default=None,
        description="null: the provider's own limits. A number replaces all of them, a daily budget too. Shared by"
        " every process on the database, per address and key.",
    )
    timeout_seconds: TimeoutSeconds = Field(default=30.0, description="The time limit of one request.")
    enabled: bool = Field(default=True, description="Whether the provider may be requested at all.")


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

    crypto: Priority = Field(
        default=("binance", "coingecko", "polygon"),
        description="The providers of cryptocurrency pairs, in order.",
    )
    stocks: Priority = Field(
        default=("polygon", "yfinance", "alphavantage"), description="The providers of stocks, in order."
    )
    forex: Priority = Field(
        default=("oanda", "polygon"), description="The providers of currency pairs, in order."
    )


_LIST, _BY_TIMEFRAME = "[list]", "[by timeframe]"
PRIORITY_TAGS: Final = ("[key]", _LIST, _BY_TIMEFRAME)
"""Parts of an error's location that pydantic adds; they are not keys of the file."""

PriorityByTimeframe = Annotated[dict[EachTimeframe, Priority], AfterValidator(not_empty)]
SymbolPriority = Annotated[
    Annotated[Priority, Tag(_LIST)] | Annotated[PriorityByTimeframe, Tag(_BY_TIMEFRAME)],
    Discriminator(lambda raw: _BY_TIMEFRAME if isinstance(raw, Mapping) else _LIST),
    Form("list of providers, or {timeframe: list}"),
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


Closed = Annotated[
    tuple[ClosedDates, ...],
    Field(strict=False),
    BeforeValidator(nothing_is_empty),
    Form("list of dates, or of {start, end}"),
]


class CalendarSettings(Section):
    """Additions to a library calendar."""

    closed: Closed = Field(
        default=(),
        description="Dates without any trading, first and last inclusive: missing candles are explained.",
    )


class GapDetection(Section):
    """Which gaps are tolerated, and how often the ledger is audited."""

    max_gap_minutes: Annotated[int, between(0, 525_600, "minutes")] = Field(
        default=5,
        description="A gap up to this length (missing candles times timeframe) is tolerated once every eligible"
        " provider has responded without its candles.",
    )
    check_interval_hours: Annotated[int, between(1, 8_760, "hours")] = Field(
        default=24, description="The interval of the audit of all stored series."
    )


class Freshness(Section):
    """More closed candles than this beyond the allowed lag are a warning or an error."""

    warn_candles: Annotated[int, between(0, 1_000_000, "candles")] = Field(
        default=3,
        description="The check `data_freshness` warns about more candles than this beyond the allowed lag.",
    )
    error_candles: Annotated[int, between(0, 1_000_000, "candles")] = Field(
        default=10, description="The check fails for more candles than this. At least `warn_candles`."
    )

    @model_validator(mode="after")
    def _warning_before_error(self) -> Self:
        if self.error_candles < self.warn_candles:
            raise ValueError(
                f"error_candles is {self.error_candles}, less than warn_candles, {self.warn_candles}"
            )
        return self


class Validation(Section):
    """The comparison of stored candles with those of other providers."""

    enabled: bool = Field(default=True, description="Whether `validate` compares stored candles.")
    tolerance_pct: Annotated[float, between(0, 1, "")] = Field(
        default=0.01,
        description="A **fraction** of the other provider's price: 0.01 is one per cent. Twice that for high and low.",
    )
    validation_providers: Many[ProviderName] = Field(
        default=("coingecko", "polygon"),
        description="The providers that `validate` prefers; if none can serve a series, the others of its priority do.",
    )


class Automation(Section):
    """Automation by Dagster. What is disabled here can still be started in its UI."""

    refresh: Many[EachTimeframe] = Field(
        default=tuple(Timeframe),
        description="The timeframes whose series Dagster keeps fresh; `[]` for none.",
    )
    fill_gaps: bool = Field(
        default=True,
        description="Whether a sensor requests gaps that are due, and outages of a venue are reported.",
    )
    checks: bool = Field(default=True, description="Whether all checks of all series run once a day.")
    audit: bool = Field(
        default=True,
        description="Whether all stored series are audited, every `gap_detection.check_interval_hours`.",
    )
    housekeeping: bool = Field(default=True, description="Whether old runs are deleted once a day.")
    keep_runs_days: Annotated[int, between(1, 3_650, "days")] = Field(
        default=3,
        description="Older runs are deleted if a later run has materialized their partitions.",
    )


class Webserver(Section):
    """Access to Dagster's pages that `up` serves."""

    hosts: Many[Annotated[str, AfterValidator(host_name), Form("host name")]] = Field(
        default=(),
        description="Names of this server in a browser's address besides 127.0.0.1 and localhost, without scheme and"
        " port, such as those of a proxy.",
    )
    login: Annotated[Literal[True, False, "others"], PlainValidator(login_mode)] = Field(
        default=OTHERS,
        description="Which requests need the token that `up` prints: all (`true`), none (`false`, for a proxy with a"
        " login of its own), or those of other accounts (`others`; all, if `FKS_API_TOKEN` is set).",
    )
    report_assets: bool = Field(
        default=False,
        description="Whether other programs may report materializations, checks and observations over HTTP"
        " (`/report_asset_materialization` and the like).",
    )


class Alerts(Section):
    """The receivers of alerts."""

    urls: Many[Annotated[SecretStr, AfterValidator(webhook_address), Form("http or https address")]] = Field(
        default=(), description="Addresses that receive alerts; treated as secrets."
    )


class SymbolSettings(Section):
    """One symbol and its timeframes. The order of the fields matters: later ones are checked against earlier ones."""

    asset_class: Annotated[AssetClass, BeforeValidator(asset_class_of)] = Field(
        description="Decides providers and calendar, and the group in Dagster."
    )
    symbol: str = Field(description="Crypto and forex: `BASE/QUOTE` in capitals; stocks: the ticker.")
    timeframes: Annotated[Many[EachTimeframe], AfterValidator(not_empty)] = Field(
        description="The timeframes to store, at least one; each is a series."
    )
    start: Instant | None = Field(
        default=None,
        description="The beginning of its history, instead of `history_start`; earlier or later.",
    )
    end: AnyInstant | None = Field(
        default=None,
        description="From then on no candle is expected or requested (delisted). Later than `start`; may lie in the"
        " future.",
    )
    calendar: Annotated[str, Form("exchange calendar")] | None = Field(
        default=None, description=f"Sessions, half-days and holidays; stocks only. null: {DEFAULT_CALENDAR}."
    )
    provider_symbols: dict[ProviderName, Annotated[str, Field(min_length=1), Form("symbol")]] = Field(
        default={}, description="The symbol's name at a provider, where it is not the usual one."
    )
    provider_priority: SymbolPriority | None = Field(
        default=None,
        description="Instead of that of the asset class; of lists by timeframe, other timeframes keep that of the"
        " asset class.",
    )
    closed: Closed = Field(
        default=(), description="Dates without trading, in addition to those of its calendar."
    )

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
