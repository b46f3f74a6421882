"""What can be set, what it may be, and what it is when nobody says anything.

Belongs here: the keys of `config/backfill.yaml`, their checks, and the questions that settings alone
can answer: which series are configured, which series a written symbol means, who is asked first, on which
dates a market was closed.

Does not belong here: reading files and variables and telling their places (`settings_sources.py`);
anything that acts on a setting (`app.py` and the faces).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, date, datetime, timedelta
from fnmatch import fnmatchcase
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    PlainValidator,
    SecretStr,
    Tag,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series, identifier
from fks_backfill_dagster.domain.timeframe import Timeframe, iso, to_micros
from fks_backfill_dagster.loopback import is_loopback
from fks_backfill_dagster.ownership import exposure, read_trusted
from fks_backfill_dagster.settings_sources import (
    CLASS_CALENDARS,
    EnvironmentSource,
    FileSource,
    Location,
    Places,
    hint,
    nearest,
    section_at,
)

CONFIG: Final = Path("config", "backfill.yaml")
CHECKOUT: Final = Path(__file__).resolve().parents[1]
SHIPPED: Final = Path(__file__).resolve().with_name("project")
"""The files of a project as the program ships them: in a checkout links to its own, in a wheel copies."""
DEFAULT_CALENDAR: Final = "XNYS"

KEY_VARIABLES: Final = {
    "coingecko": "COINGECKO_API_KEY",
    "polygon": "POLYGON_API_KEY",
    "alphavantage": "ALPHAVANTAGE_API_KEY",
    "oanda": "OANDA_API_TOKEN",
}
"""Which environment variable holds the key of a provider; the others need none."""

_FIAT = (
    "AUD BRL CAD CHF CLP CNH CNY COP CZK DKK EUR GBP HKD HUF IDR ILS INR JPY KRW MXN MYR NOK NZD "
    "PHP PLN RON SAR SEK SGD THB TRY TWD USD ZAR"
)
FIAT: Final = frozenset(_FIAT.split())

T = TypeVar("T")
Entries = TypeVar("Entries", bound=Collection[Any])


class SettingsError(Exception):
    """The settings are wrong. `problems` are whole sentences, each with its place; str() is one a line."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems: tuple[str, ...] = tuple(problems)
        super().__init__("\n".join(self.problems))


# --- what a single value may be ---------------------------------------------------------------------


def _between(low: float, high: float) -> AfterValidator:
    def check(value: float) -> float:
        if not low <= value <= high:
            raise ValueError(f"{value} is not between {low:g} and {high:g}")
        return value

    return AfterValidator(check)


def _host_name(value: str) -> str:
    """As in a browser's address, without scheme, port and path."""
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]", value):
        raise ValueError(
            f"{value!r} is not the name of a host such as fks.example.com, without scheme and port"
        )
    return value.lower()


OTHERS: Final = "others"


def _login(value: object) -> object:
    if value is True or value is False or value == OTHERS:
        return value
    raise ValueError(f"{_shown(value)} is not one of: true, false, {OTHERS}")


LEAST_TOKEN = 32  # characters


def _token(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if len(text) < LEAST_TOKEN or not (text.isascii() and text.isprintable()) or " " in text:
        raise ValueError(
            f"it is to be {LEAST_TOKEN} or more printable ASCII characters without spaces, such as"
            " `openssl rand -hex 32` prints"
        )
    return value


def _seconds(value: float) -> float:
    if not 0 < value <= 600:
        raise ValueError(f"{value:g} is not a time above 0 and up to 600 seconds")
    return value


def _url(text: str) -> str:
    """Scheme, host and an optional path prefix, without the trailing slash.

    The error does not repeat the text: it may hold a password.
    """
    if not _has_host(text):
        raise ValueError("is not an address such as https://api.example.com")
    parts = urlsplit(text)
    if parts.username is not None or parts.password is not None:
        raise ValueError("holds a user or password; keys come from their own variables only")
    if "?" in text or "#" in text:
        raise ValueError("is scheme, host and path prefix only: leave out what follows '?' or '#'")
    return text.rstrip("/")


def leaves_unencrypted(url: str) -> bool:
    """Whether requests to this checked address leave the machine unencrypted."""
    parts = urlsplit(url)
    return parts.scheme == "http" and not is_loopback(parts.hostname or "")


def _webhook(secret: SecretStr) -> SecretStr:
    """An alert's address. It is a secret itself: whoever has it can write there."""
    if not _has_host(secret.get_secret_value()):
        raise ValueError("is not an address such as https://hooks.example.com/services/...")
    return secret


def _has_host(text: str) -> bool:
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    return (
        parts.scheme in ("http", "https")
        and bool(parts.hostname)
        and port != 0
        and not re.search(r"\s", text)
    )


def _database(secret: SecretStr) -> SecretStr:
    address = secret.get_secret_value()
    try:
        parts = urlsplit(address)
        # A password with a bare @ would make the rest of it pass for the host.
        sound = parts.port != 0 and parts.netloc.count("@") <= 1
    except ValueError:  # its text would quote a piece of the address
        sound = False
    if not sound or not address.startswith(("postgresql://", "postgres://", "postgresql+psycopg://")):
        raise ValueError(
            "is not a PostgreSQL address such as postgresql://user:password@host:5432/database "
            "(special characters of a password are percent-encoded)"
        )
    return secret


def _folder(path: Path) -> Path:
    if os.path.exists(path) and not os.path.isdir(
        path
    ):  # unlike Path's own they say no where we may not look
        raise ValueError(f"{path} is a file; it has to be a folder")
    return path


def _instant(raw: object) -> int:
    """A date or time as microseconds, not in the future; UTC where no zone is written."""
    micros = _any_instant(raw)
    if micros > to_micros(datetime.now(UTC)):
        raise ValueError(f"{raw} is not between 1970 and now")
    return micros


def _any_instant(raw: object) -> int:
    try:
        moment = datetime.fromisoformat(raw.strip()) if isinstance(raw, str) else raw
    except ValueError:
        moment = None
    if isinstance(moment, date) and not isinstance(moment, datetime):
        moment = datetime(moment.year, moment.month, moment.day, tzinfo=UTC)
    if not isinstance(moment, datetime):
        raise ValueError(f"{raw!r} is not a time such as 2017-08-17 or 2017-08-17T04:00:00Z")
    micros = to_micros(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    if micros < 0:
        raise ValueError(f"{raw} lies before 1970")
    return micros


def parse_timeframe(raw: object) -> Timeframe:
    """The timeframe of a written one. Raises ValueError that names all eight."""
    try:
        return Timeframe(str(raw))
    except ValueError:
        raise ValueError(f"{str(raw)!r} is not a timeframe ({' '.join(Timeframe)})") from None


def _asset_class(raw: object) -> AssetClass:
    try:
        return AssetClass(str(raw))
    except ValueError:
        raise ValueError(f"{str(raw)!r} is not an asset class ({' '.join(AssetClass)})") from None


def _once_each(values: tuple[T, ...]) -> tuple[T, ...]:
    twice = next((value for index, value in enumerate(values) if value in values[:index]), None)
    if twice is not None:
        raise ValueError(f"names {twice} twice")
    return values


def _some(values: Entries) -> Entries:
    if not values:
        raise ValueError("is empty; it needs at least one entry")
    return values


def _date(raw: object) -> date:
    """A calendar date, without a time or a zone: it is the market's."""
    if isinstance(raw, date) and not isinstance(raw, datetime):
        return raw
    try:
        if not (isinstance(raw, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", raw.strip())):
            raise ValueError
        return date.fromisoformat(raw.strip())
    except ValueError:
        raise ValueError(f"{_shown(raw)} is not a date such as 2023-09-08") from None


def _calendar_name(name: str) -> str:
    if name not in (*CLASS_CALENDARS, DEFAULT_CALENDAR):
        # Half a second with pandas behind it: paid by those who name another calendar only.
        from exchange_calendars import get_calendar_names

        known = get_calendar_names(include_aliases=True)
        if name not in known:
            raise ValueError(f"{name!r} is no exchange calendar; {hint(name, (*CLASS_CALENDARS, *known))}")
    return name


@cache
def _resolved(calendar: str) -> str:
    """The exchange calendar that a name or an alias means: NYSE is XNYS."""
    if calendar == DEFAULT_CALENDAR:
        return calendar
    from exchange_calendars import resolve_alias

    return str(resolve_alias(calendar))


def _no_section(raw: object) -> object:
    """A section that is left empty in the file."""
    return {} if raw is None else raw


def _nothing_is_empty(raw: object) -> object:
    """A list that is left empty in the file."""
    return () if raw is None else raw


def _provider_name(name: str) -> str:
    if name not in PROVIDER_NAMES:
        raise ValueError(f"{name!r} is not a provider; {hint(name, PROVIDER_NAMES)}")
    return name


# Strict models take no list for a tuple, and YAML and JSON have lists only.
Many = Annotated[tuple[T, ...], Field(strict=False), AfterValidator(_once_each)]
Url = Annotated[str, AfterValidator(_url)]
ProviderName = Annotated[str, AfterValidator(_provider_name)]
_AS_ISO = PlainSerializer(iso, return_type=str, when_used="json")
Instant = Annotated[int, BeforeValidator(_instant), _AS_ISO]
AnyInstant = Annotated[int, BeforeValidator(_any_instant), _AS_ISO]
EachTimeframe = Annotated[Timeframe, BeforeValidator(parse_timeframe)]
TimeoutSeconds = Annotated[float, AfterValidator(_seconds)]
Date = Annotated[date, BeforeValidator(_date)]
CalendarName = Annotated[str, AfterValidator(_calendar_name)]


# --- the sections -------------------------------------------------------------------------------------


class Section(BaseModel):
    """A part of the settings: frozen, strict, no unknown keys. A section left empty is its defaults."""

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
    requests_per_minute: Annotated[int, _between(1, 1_000_000)] | None = None
    timeout_seconds: TimeoutSeconds = 30.0
    enabled: bool = True


class Binance(ProviderSettings):
    """`archive_url` null: REST only."""

    base_url: Url = "https://api.binance.com"
    archive_url: Url | None = "https://data.binance.vision"


class CoinGecko(ProviderSettings):
    base_url: Url = "https://api.coingecko.com"


class Polygon(ProviderSettings):
    base_url: Url = "https://api.massive.com"


class YFinance(ProviderSettings):
    base_url: Url = "https://query2.finance.yahoo.com"


class AlphaVantage(ProviderSettings):
    base_url: Url = "https://www.alphavantage.co"


class Oanda(ProviderSettings):
    base_url: Url = "https://api-fxpractice.oanda.com"


class Providers(Section):
    binance: Binance = Binance()
    coingecko: CoinGecko = CoinGecko()
    polygon: Polygon = Polygon()
    yfinance: YFinance = YFinance()
    alphavantage: AlphaVantage = AlphaVantage()
    oanda: Oanda = Oanda()


PROVIDER_NAMES: Final = tuple(Providers.model_fields)

Priority = Annotated[Many[ProviderName], AfterValidator(_some)]


class ProviderPriority(Section):
    """Who is asked, first to last; what the first leaves missing, the next one is asked for."""

    crypto: Priority = ("binance", "coingecko", "polygon")
    stocks: Priority = ("polygon", "yfinance", "alphavantage")
    forex: Priority = ("oanda", "polygon")


_LIST, _BY_TIMEFRAME = "[list]", "[by timeframe]"
_TAGS: Final = ("[key]", _LIST, _BY_TIMEFRAME)
"""Parts of an error's location that are pydantic's, and no keys of the file."""

PriorityByTimeframe = Annotated[dict[EachTimeframe, Priority], AfterValidator(_some)]
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
            return {"start": _date(raw), "end": _date(raw)}
        except ValueError as error:
            raise ValueError(f"{error}, nor dates from {{start: ...}} to {{end: ...}}") from None

    @field_validator("end")
    @classmethod
    def _after_start(cls, end: date, info: ValidationInfo) -> date:
        start = info.data.get("start")
        if start is not None and end < start:
            raise ValueError(f"{end} lies before start, {start}: exchange them")
        return end


Closed = Annotated[tuple[ClosedDates, ...], Field(strict=False), BeforeValidator(_nothing_is_empty)]


class CalendarSettings(Section):
    """What is known of a calendar beyond its library: `closed` are dates without any trading."""

    closed: Closed = ()


class GapDetection(Section):
    """`max_gap_minutes`: what stays missing and is not longer is tolerated once all were asked."""

    max_gap_minutes: Annotated[int, _between(0, 525_600)] = 5
    check_interval_hours: Annotated[int, _between(1, 8_760)] = 24


class Freshness(Section):
    """So many closed candles beyond the allowed lag are a warning, and so many an error."""

    warn_candles: Annotated[int, _between(0, 1_000_000)] = 3
    error_candles: Annotated[int, _between(0, 1_000_000)] = 10

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
    tolerance_pct: Annotated[float, _between(0, 1)] = 0.01
    validation_providers: Many[ProviderName] = ("coingecko", "polygon")


class Automation(Section):
    """What Dagster does by itself once it is up. What is off here can still be started in its UI.

    `refresh`: the timeframes whose series are kept fresh. `fill_gaps`: whether gaps that are due are asked
    for. `keep_runs_days`: after which runs whose
    partitions a later run has materialized again are forgotten, with their events.
    """

    refresh: Many[EachTimeframe] = tuple(Timeframe)
    fill_gaps: bool = True
    checks: bool = True
    audit: bool = True
    housekeeping: bool = True
    keep_runs_days: Annotated[int, _between(1, 3_650)] = 3


class Webserver(Section):
    """Who reaches Dagster's pages that `up` starts.

    `hosts`: names of this server in a browser's address besides the loopback ones, such as those of a proxy.
    `login`: who needs the token: everybody (true), nobody (false), or all but the processes of the account that has
    called `up` (`others`); FKS_API_TOKEN makes `others` everybody.
    `report_assets`: whether other programs may report materializations and checks over HTTP.
    """

    hosts: Many[Annotated[str, AfterValidator(_host_name)]] = ()
    login: Annotated[Literal[True, False, "others"], PlainValidator(_login)] = OTHERS
    report_assets: bool = False


class Alerts(Section):
    urls: Many[Annotated[SecretStr, AfterValidator(_webhook)]] = ()


class SymbolSettings(Section):
    """One symbol and the timeframes that are kept of it.

    `start` None is `history_start`; from `end` on nothing is expected (delisted); `calendar` (stocks)
    None is XNYS; `provider_priority` None is that of the asset class, and so is a timeframe that it does not
    name; on the dates of `closed` nothing was traded. The order of the fields matters: later ones are
    checked against earlier.
    """

    asset_class: Annotated[AssetClass, BeforeValidator(_asset_class)]
    symbol: str
    timeframes: Annotated[Many[EachTimeframe], AfterValidator(_some)]
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
        return None if name is None else _calendar_name(name)

    def series(self, timeframe: Timeframe) -> Series:
        return Series(
            symbol=self.symbol,
            timeframe=timeframe,
            asset_class=self.asset_class,
            calendar=self.calendar or DEFAULT_CALENDAR,
            provider_symbols=tuple(self.provider_symbols.items()),
        )


def infer_asset_class(symbol: str) -> AssetClass:
    """Two fiat currencies are forex, anything else with a slash is crypto, the rest are stocks."""
    base, slash, quote = symbol.partition("/")
    if not slash:
        return AssetClass.STOCKS
    return AssetClass.FOREX if {base, quote} <= FIAT else AssetClass.CRYPTO


def check_symbol(symbol: str, asset_class: AssetClass) -> None:
    """Raises ValueError where `symbol` cannot be one of its asset class."""
    if asset_class is AssetClass.STOCKS:
        if not re.fullmatch(r"[A-Za-z0-9.^=_-]+", symbol):
            raise ValueError(f"{symbol!r} is not a ticker such as AAPL or BRK.B")
        return
    sides = symbol.split("/")
    if len(sides) != 2 or not all(side.isalnum() and side == side.upper() for side in sides):
        example = "EUR/USD" if asset_class is AssetClass.FOREX else "BTC/USDT"
        raise ValueError(f"{symbol!r} is not BASE/QUOTE in capitals, such as {example}")


# --- the whole ----------------------------------------------------------------------------------------

ENVIRONMENT_ONLY: Final = {
    "home": "FKS_HOME",
    "config_file": "FKS_CONFIG",
    "database_url": "FKS_DATABASE_URL",
    "api_token": "FKS_API_TOKEN",
    "keys": ", ".join(KEY_VARIABLES.values()),
    "root": "FKS_CONFIG",
}
"""Fields of `Settings` that the file cannot set, and the variable that does."""

_OPEN_KEY: Final = (
    "would send {} unencrypted to another host: begin it with https://, unset that key, or let a proxy on this machine"
    " do it (http://127.0.0.1, http://[::1] and http://localhost are taken)"
)

_sources: ContextVar[tuple[PydanticBaseSettingsSource, ...]] = ContextVar("_sources", default=())


def _default_symbols() -> tuple[SymbolSettings, ...]:
    frames = (Timeframe.M1, Timeframe.H1, Timeframe.D1)
    return tuple(
        SymbolSettings(asset_class=AssetClass.CRYPTO, symbol=symbol, timeframes=frames)
        for symbol in ("BTC/USDT", "ETH/USDT", "SOL/USDT")
    )


class Settings(BaseSettings):
    """All settings, checked. `load_settings` makes them; `Settings(...)` alone reads no file or variable.

    `home` holds what the project keeps (the embedded database, Dagster's folder), `root` is the folder
    of the project. Both are absolute when loaded. `keys` stand before `providers`, whose addresses are checked
    against them.
    """

    model_config = SettingsConfigDict(
        frozen=True, strict=True, extra="forbid", hide_input_in_errors=True, validate_default=False
    )

    batch_size_days: Annotated[int, _between(1, 3_660)] = 30
    max_concurrent_requests: Annotated[int, _between(1, 100)] = 5
    provider_priority: ProviderPriority = ProviderPriority()
    gap_detection: GapDetection = GapDetection()
    freshness: Freshness = Freshness()
    validation: Validation = Validation()
    keys: dict[ProviderName, SecretStr] = Field(default={}, repr=False)
    providers: Providers = Providers()
    symbols: Annotated[tuple[SymbolSettings, ...], Field(strict=False)] = Field(
        default_factory=_default_symbols
    )
    calendars: Annotated[dict[CalendarName, CalendarSettings], BeforeValidator(_no_section)] = {}
    history_start: Instant = to_micros(datetime(2017, 8, 17, tzinfo=UTC))
    allow_mixed_sources: bool = False
    alerts: Alerts = Alerts()
    webserver: Webserver = Webserver()
    automation: Automation = Automation()

    home: Annotated[Path, AfterValidator(_folder)] = Path(".fks")
    root: Path = Path()
    config_file: Path | None = None
    database_url: Annotated[SecretStr, AfterValidator(_database)] | None = None
    api_token: Annotated[SecretStr, AfterValidator(_token)] | None = None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings, *_sources.get())

    @field_validator("providers")
    @classmethod
    def _keys_are_encrypted(cls, providers: Providers, info: ValidationInfo) -> Providers:
        """Every problem at the address it is about."""
        problems = [
            InitErrorDetails(
                type=PydanticCustomError(
                    "open_key", "{text}", {"text": _OPEN_KEY.format(KEY_VARIABLES[name])}
                ),
                loc=(name, "base_url"),
                input=None,
            )
            for name in KEY_VARIABLES
            if name in info.data.get("keys", {}) and leaves_unencrypted(getattr(providers, name).base_url)
        ]
        if problems:
            raise ValidationError.from_exception_data("providers", problems)
        return providers

    @field_validator("symbols", mode="wrap")
    @classmethod
    def _one_asset_key_each(cls, raw: Any, checked: ValidatorFunctionWrapHandler) -> Any:
        """Tells colliding symbols together with whatever else is wrong with the list."""
        problems = list(_collisions(raw))
        try:
            symbols = checked(raw)
        except ValidationError as error:
            problems += [
                InitErrorDetails(type=e["type"], loc=e["loc"], input=e["input"], ctx=e.get("ctx", {}))
                for e in error.errors(include_url=False)
            ]
        if problems:
            raise ValidationError.from_exception_data("symbols", problems)
        return symbols

    # --- which series ---

    def series(self) -> tuple[Series, ...]:
        """Every configured symbol at every timeframe of its own, in the order of the file."""
        return tuple(entry.series(timeframe) for entry in self.symbols for timeframe in entry.timeframes)

    def find_series(self, symbol: str, timeframe: str | Timeframe, stored: Iterable[Series] = ()) -> Series:
        """The series that is meant by a written symbol (`BTC/USDT`, `BTC_USDT`, `btc/usdt`).

        A symbol that is not configured is the one of `stored` that is written so, else inferred: `X_Y`
        is `X/Y`, the asset class follows from the form. Raises ValueError, with the nearest configured
        symbol, for what cannot be one.
        """
        frame = parse_timeframe(timeframe)
        entry = self._configured(symbol)
        if entry is not None:
            return entry.series(frame)
        wanted = identifier(symbol.strip()).upper()
        known = [s for s in stored if s.timeframe is frame and identifier(s.symbol).upper() == wanted]
        if len(known) == 1:
            return known[0]
        return self._inferred(symbol, frame)

    def match_symbols(self, pattern: str | None = None) -> tuple[str, ...]:
        """The configured symbols a glob takes, written as symbol or as asset key; None takes all."""
        return tuple(
            entry.symbol
            for entry in self.symbols
            if pattern is None
            or fnmatchcase(entry.symbol, pattern)
            or fnmatchcase(identifier(entry.symbol), pattern)
        )

    def nearest_symbol(self, symbol: str) -> str | None:
        """The configured symbol that one which is not configured was probably meant to be; None: none is close.

        Base and quote are compared apart: DOGE/USDT is no mistyped ETH/USDT, however much of it is the same.
        """
        names = self.match_symbols()
        if symbol in names:
            return None
        base, slash, quote = symbol.partition("/")
        if not slash:
            return nearest(symbol, names)
        pairs = [name.partition("/") for name in names if "/" in name]
        bases = [one for one, _, _ in pairs if nearest(base, [one])]
        close = [f"{one}/{other}" for one, _, other in pairs if one in bases and nearest(quote, [other])]
        return nearest(symbol, close)

    def _configured(self, symbol: str) -> SymbolSettings | None:
        wanted = identifier(symbol.strip())
        exact = self.by_asset_key.get(wanted)
        if exact is not None:
            return exact
        loose = [key for key in self.by_asset_key if key.upper() == wanted.upper()]
        return self.by_asset_key[loose[0]] if len(loose) == 1 else None

    @cached_property
    def by_asset_key(self) -> dict[str, SymbolSettings]:
        """The configured symbols by `identifier(symbol)`: thousands of series are looked up one by one."""
        return {identifier(entry.symbol): entry for entry in self.symbols}

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with other symbols has its own `by_asset_key`: pydantic copies what was cached too."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("by_asset_key", None)
        return copied

    def _inferred(self, written: str, timeframe: Timeframe) -> Series:
        symbol = written.strip().upper()
        if "/" not in symbol and symbol.count("_") == 1:
            symbol = symbol.replace("_", "/")
        asset_class = infer_asset_class(symbol)
        names = [entry.symbol for entry in self.symbols]
        joined = {re.sub(r"\W|_", "", name): name for name in names}
        if asset_class is AssetClass.STOCKS and symbol in joined:
            raise ValueError(f"{written!r} is not configured; did you mean {joined[symbol]}?")
        try:
            check_symbol(symbol, asset_class)
        except ValueError as error:
            match = nearest(symbol, names)
            raise ValueError(f"{error}" + (f"; did you mean {match}?" if match else "")) from None
        return Series(symbol=symbol, timeframe=timeframe, asset_class=asset_class)

    # --- what holds for a series or a provider ---

    def priority(self, series: Series) -> tuple[str, ...]:
        """Who is asked for the series, first to last, without the disabled ones."""
        entry = self._entry(series)
        names = None if entry is None else entry.provider_priority
        if isinstance(names, dict):
            names = names.get(series.timeframe)
        if names is None:
            names = getattr(self.provider_priority, series.asset_class.value)
        return tuple(name for name in names if self.provider(name).enabled)

    def closed(self, series: Series) -> tuple[tuple[date, date], ...]:
        """The dates on which the market of the series was closed: first and last (inclusive) of each
        stretch, ascending, disjoint. Those of its symbol and those of its calendar."""
        entry = self._entry(series)
        found = [] if entry is None else list(entry.closed)
        for name, calendar in self.calendars.items():
            if calendar.closed and _is_calendar_of(name, series):
                found += calendar.closed
        merged: list[tuple[date, date]] = []
        for one in sorted(found, key=lambda dates: dates.start):
            if merged and one.start <= merged[-1][1] + timedelta(days=1):
                merged[-1] = (merged[-1][0], max(merged[-1][1], one.end))
            else:
                merged.append((one.start, one.end))
        return tuple(merged)

    @property
    def earliest_start(self) -> int:
        """The earliest start of any series, in microseconds: partitions of every grain begin there, rounded down.

        All series of a grain share one partitions definition, as one run cannot mix two.
        """
        starts = (entry.start for entry in self.symbols if entry.start is not None)
        return min((self.history_start, *starts))

    def start_of(self, series: Series) -> int:
        """From when on the series is kept, in microseconds."""
        entry = self._entry(series)
        return self.history_start if entry is None or entry.start is None else entry.start

    def end_of(self, series: Series) -> int | None:
        """From when on nothing is expected of the series, in microseconds; None: it goes on."""
        entry = self._entry(series)
        return None if entry is None else entry.end

    def kept(self, series: Series, window: TimeRange) -> TimeRange:
        """The part of `window` from the series' start to its end; empty where there is none."""
        start, end = self.start_of(series), self.end_of(series)
        last = window.end if end is None else end
        return window.intersect(TimeRange(start, max(start, last)))

    def provider(self, name: str) -> ProviderSettings:
        """The settings of a provider. Raises ValueError for an unknown one."""
        found: ProviderSettings = getattr(self.providers, _provider_name(name))
        return found

    def custom_addresses(self) -> dict[str, str]:
        """The enabled providers whose address is not their default one, with that address."""
        given = {name: self.provider(name) for name in PROVIDER_NAMES}
        found = {
            name: custom_address(name, own.base_url, getattr(own, "archive_url", None))
            for name, own in given.items()
            if own.enabled
        }
        return {name: address for name, address in found.items() if address is not None}

    def key_of(self, provider: str) -> str | None:
        """The provider's key in clear; None where there is none."""
        secret = self.keys.get(provider)
        return None if secret is None else secret.get_secret_value()

    def redacted_dump(self) -> dict[str, Any]:
        """All settings as JSON values; every secret is asterisks."""
        return self.model_dump(mode="json")

    def _entry(self, series: Series) -> SymbolSettings | None:
        entry = self.by_asset_key.get(identifier(series.symbol))
        return entry if entry is not None and entry.symbol == series.symbol else None


def custom_address(provider: str, base_url: str, archive_url: str | None = None) -> str | None:
    """Where `provider` is reached instead of at its default address; None for the default."""
    usual = Providers.model_fields[provider].default
    archives = archive_url is not None and archive_url != getattr(usual, "archive_url", None)
    if base_url == usual.base_url and not archives:
        return None
    return f"{base_url} (archives: {archive_url})" if archives else base_url


def _is_calendar_of(name: str, series: Series) -> bool:
    if series.asset_class is not AssetClass.STOCKS:
        return name == series.asset_class.value
    return name == series.calendar or (
        name not in CLASS_CALENDARS and _resolved(name) == _resolved(series.calendar)
    )


def _collisions(raw: object) -> Iterator[InitErrorDetails]:
    """One error for every symbol whose asset key an earlier one already has; `raw` is unchecked."""
    first: dict[str, tuple[int, str]] = {}
    for index, item in enumerate(raw if isinstance(raw, list | tuple) else ()):
        symbol = item.get("symbol") if isinstance(item, Mapping) else getattr(item, "symbol", None)
        if not isinstance(symbol, str):
            continue
        where, other = first.setdefault(identifier(symbol), (index, symbol))
        if where == index:
            continue
        text = (
            f"{symbol!r} is configured twice (also symbols[{where}])"
            if symbol == other
            else f"{symbol!r} and {other!r} (symbols[{where}]) become the same asset key {identifier(symbol)}"
        )
        yield InitErrorDetails(
            type=PydanticCustomError("same_asset_key", "{text}", {"text": text}),
            loc=(index, "symbol"),
            input=None,
        )


# --- loading ------------------------------------------------------------------------------------------


def load_settings(environ: Mapping[str, str] | None = None, cwd: Path | None = None) -> Settings:
    """Reads file and environment (the environment wins) and checks everything as a whole.

    The file: `FKS_CONFIG`; else `config/backfill.yaml` here or in the nearest folder above that has
    it; else that of the source checkout; else there is none and the defaults hold. One that was searched for
    and that another account can change is an error.
    Raises SettingsError with every problem at once.
    """
    environ = os.environ if environ is None else environ
    cwd = (cwd or Path.cwd()).resolve()
    root, refused = _project(cwd)
    named = _path(environ, "FKS_CONFIG", cwd)
    file = named or (None if refused else _existing(root / CONFIG))
    places = Places(file=_relative(file, cwd) if file else "")
    places.variables.update(
        {(name,): ENVIRONMENT_ONLY[name] for name in ("home", "database_url", "api_token")}
    )
    own = [name for name in Settings.model_fields if name not in ENVIRONMENT_ONLY]
    sources: list[PydanticBaseSettingsSource] = [EnvironmentSource(Settings, environ, own, places)]
    if named is not None and not named.is_file():
        places.note(f"environment FKS_CONFIG: {named} does not exist or is no file")
    elif file is not None:
        read = partial(read_trusted, root, *CONFIG.parts) if named is None else partial(_text, file)
        sources.append(FileSource(Settings, read, ENVIRONMENT_ONLY, places))
    elif refused:
        places.note(refused)
    token = _sources.set(tuple(sources))
    try:
        settings = Settings(root=root, config_file=file, **_from_environment(environ, cwd))
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            location = tuple(part for part in detail["loc"] if part not in _TAGS)
            places.report(location, _sentence(detail, location))
    finally:
        _sources.reset(token)
    if places.problems:
        raise SettingsError(places.problems)  # from nothing: pydantic's own error may quote a secret
    return settings


def _from_environment(environ: Mapping[str, str], cwd: Path) -> dict[str, Any]:
    """What only the environment can tell; an empty variable counts as not set."""
    keys = {name: environ.get(variable, "").strip() for name, variable in KEY_VARIABLES.items()}
    return {
        "home": home_of(environ, cwd),
        "database_url": _secret(environ.get("FKS_DATABASE_URL", "")),
        "api_token": _secret(environ.get("FKS_API_TOKEN", "")),
        "keys": {name: SecretStr(key) for name, key in keys.items() if key},
    }


def home_of(environ: Mapping[str, str] | None = None, cwd: Path | None = None) -> Path:
    """`home` as `load_settings` would have it, without the checks of anything else."""
    environ = os.environ if environ is None else environ
    cwd = (cwd or Path.cwd()).resolve()
    return _path(environ, "FKS_HOME", cwd) or _project(cwd)[0] / ".fks"


def _path(environ: Mapping[str, str], variable: str, cwd: Path) -> Path | None:
    text = environ.get(variable, "").strip()
    return cwd / os.path.expanduser(text) if text else None  # unlike Path.expanduser it never raises


def _secret(text: str) -> SecretStr | None:
    return SecretStr(text.strip()) if text.strip() else None


def _project(cwd: Path) -> tuple[Path, str | None]:
    """The folder of the project: the nearest one with a `config/backfill.yaml`, else the source checkout, else `cwd`.

    One that another account can change is passed over, as `dagster.yaml` and more are taken from there, too; the
    second value is a sentence about the first of those, else None.
    """
    refused: str | None = None
    for folder in (cwd, *cwd.parents, CHECKOUT):
        if (file := _existing(folder / CONFIG)) is None:
            continue
        if (reason := exposure(folder, *CONFIG.parts)) is None:
            return folder, refused
        refused = refused or (
            f"{file}: is not used, because {reason}: set FKS_CONFIG to this file if you trust it, else to your own"
        )
    return cwd, refused


def _existing(path: Path) -> Path | None:
    """None also for what we may not look at: another account's folder above ours is no error."""
    return path if os.path.isfile(path) else None


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def _relative(path: Path, cwd: Path) -> str:
    return str(path.relative_to(cwd)) if path.is_relative_to(cwd) else str(path)


# --- pydantic's findings as sentences -----------------------------------------------------------------

_NOT_A = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
}


def _sentence(error: ErrorDetails, location: Location) -> str:
    """What is wrong, in words of the settings. Texts of secret fields are never repeated."""
    kind = error["type"]
    if kind == "value_error":
        return str(error["ctx"]["error"])
    if kind == "extra_forbidden":
        return _unknown_key(location)
    if kind == "missing":
        return "is missing"
    if kind == "string_too_short":
        return "is empty"
    if kind == "tuple_type":
        return 'is not a list such as ["a", "b"]'
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return "is not a section of `key: value` settings"
    if kind in _NOT_A:
        quote = (
            "; put it in quotes"
            if kind == "string_type" and isinstance(error["input"], bool | int | float)
            else ""
        )
        shown = "" if location[0] in ("alerts", *ENVIRONMENT_ONLY) else f"{_shown(error['input'])} "
        return f"{shown}is not {_NOT_A[kind]}{quote}"
    return error["msg"]


def _unknown_key(location: Location) -> str:
    name = str(location[-1])
    section = section_at(Settings, location[:-1])
    known = [key for key in section.model_fields if key not in ENVIRONMENT_ONLY] if section else []
    if re.search(r"key|token|secret|password", name):
        return f"is not a setting; keys come from the environment only: {ENVIRONMENT_ONLY['keys']}"
    return f"is not a setting here; {hint(name, known)}"


def _shown(value: object) -> str:
    if isinstance(value, bool | None):
        return {True: "true", False: "false", None: "nothing"}[value]
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a section"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
