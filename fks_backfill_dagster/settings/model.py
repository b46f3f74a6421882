"""All settings as one checked model, with lookups by series and provider."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, date, datetime, timedelta
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series, identifier
from fks_backfill_dagster.domain.timeframe import Timeframe, to_micros
from fks_backfill_dagster.settings.sections import (
    PROVIDER_NAMES,
    Alerts,
    Automation,
    CalendarSettings,
    Freshness,
    GapDetection,
    ProviderName,
    ProviderPriority,
    Providers,
    ProviderSettings,
    SymbolSettings,
    Validation,
    Webserver,
    provider_name,
)
from fks_backfill_dagster.settings.sources import (
    CLASS_CALENDARS,
    nearest,
)
from fks_backfill_dagster.settings.symbols import check_symbol, infer_asset_class
from fks_backfill_dagster.settings.types import (
    CalendarName,
    Instant,
    absolute_folder,
    between,
    database_address,
    leaves_unencrypted,
    login_token,
    no_section,
    parse_timeframe,
    resolved_calendar,
)

CONFIG: Final = Path("config", "backfill.yaml")
CHECKOUT: Final = Path(__file__).resolve().parents[2]
SHIPPED: Final = Path(__file__).resolve().parents[1] / "project"
"""The project files that the program ships: links in a checkout, copies in a wheel."""

KEY_VARIABLES: Final = {
    "coingecko": "COINGECKO_API_KEY",
    "polygon": "POLYGON_API_KEY",
    "alphavantage": "ALPHAVANTAGE_API_KEY",
    "oanda": "OANDA_API_TOKEN",
}
"""The environment variable with the key of each provider; the others need none."""


class SettingsError(Exception):
    """The settings are invalid. `problems` are complete sentences with their place; str() has one per line."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems: tuple[str, ...] = tuple(problems)
        super().__init__("\n".join(self.problems))


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
    "would send {} unencrypted to another host: use https://, unset that key, or use a proxy on this machine"
    " (http://127.0.0.1, http://[::1] and http://localhost are accepted)"
)

loading_sources: ContextVar[tuple[PydanticBaseSettingsSource, ...]] = ContextVar("_sources", default=())


def _default_symbols() -> tuple[SymbolSettings, ...]:
    frames = (Timeframe.M1, Timeframe.H1, Timeframe.D1)
    return tuple(
        SymbolSettings(asset_class=AssetClass.CRYPTO, symbol=symbol, timeframes=frames)
        for symbol in ("BTC/USDT", "ETH/USDT", "SOL/USDT")
    )


class Settings(BaseSettings):
    """All settings, checked. Created by `load_settings`; `Settings(...)` alone reads no file or variable.

    `home` holds the project's state (the embedded database, Dagster's folder), `root` is the folder of
    the project. Both are absolute when loaded. `keys` precedes `providers`, whose addresses are checked
    against it.
    """

    model_config = SettingsConfigDict(
        frozen=True, strict=True, extra="forbid", hide_input_in_errors=True, validate_default=False
    )

    batch_size_days: Annotated[int, between(1, 3_660)] = 30
    max_concurrent_requests: Annotated[int, between(1, 100)] = 5
    provider_priority: ProviderPriority = ProviderPriority()
    gap_detection: GapDetection = GapDetection()
    freshness: Freshness = Freshness()
    validation: Validation = Validation()
    keys: dict[ProviderName, SecretStr] = Field(default={}, repr=False)
    providers: Providers = Providers()
    symbols: Annotated[tuple[SymbolSettings, ...], Field(strict=False)] = Field(
        default_factory=_default_symbols
    )
    calendars: Annotated[dict[CalendarName, CalendarSettings], BeforeValidator(no_section)] = {}
    history_start: Instant = to_micros(datetime(2017, 8, 17, tzinfo=UTC))
    allow_mixed_sources: bool = False
    alerts: Alerts = Alerts()
    webserver: Webserver = Webserver()
    automation: Automation = Automation()

    home: Annotated[Path, AfterValidator(absolute_folder)] = Path(".fks")
    root: Path = Path()
    config_file: Path | None = None
    database_url: Annotated[SecretStr, AfterValidator(database_address)] | None = None
    api_token: Annotated[SecretStr, AfterValidator(login_token)] | None = None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings, *loading_sources.get())

    @field_validator("providers")
    @classmethod
    def _keys_are_encrypted(cls, providers: Providers, info: ValidationInfo) -> Providers:
        """Reports every problem at its address."""
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
        """Reports colliding symbols together with all other errors of the list."""
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

    # --- series ---

    def series(self) -> tuple[Series, ...]:
        """Every configured symbol at each of its timeframes, in the order of the file."""
        return tuple(
            entry.instrument.at(timeframe) for entry in self.symbols for timeframe in entry.timeframes
        )

    def find_series(self, symbol: str, timeframe: str | Timeframe, stored: Iterable[Series] = ()) -> Series:
        """The series of a symbol in any notation (`BTC/USDT`, `BTC_USDT`, `btc/usdt`).

        A symbol that is not configured is looked up in `stored`, else inferred: `X_Y` is `X/Y`, the asset
        class follows from the form. Raises ValueError, with the nearest configured symbol, for an invalid
        one.
        """
        frame = parse_timeframe(timeframe)
        entry = self._configured(symbol)
        if entry is not None:
            return entry.instrument.at(frame)
        wanted = identifier(symbol.strip()).upper()
        known = [s for s in stored if s.timeframe is frame and identifier(s.symbol).upper() == wanted]
        if len(known) == 1:
            return known[0]
        return self._inferred(symbol, frame)

    def match_symbols(self, pattern: str | None = None) -> tuple[str, ...]:
        """The configured symbols that match a glob, as symbol or as asset key; None matches all."""
        return tuple(
            entry.symbol
            for entry in self.symbols
            if pattern is None
            or fnmatchcase(entry.symbol, pattern)
            or fnmatchcase(identifier(entry.symbol), pattern)
        )

    def nearest_symbol(self, symbol: str) -> str | None:
        """The configured symbol closest to one that is not configured; None if none is close.

        Base and quote are compared separately: DOGE/USDT is not a mistyped ETH/USDT, despite the common part.
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
        """The configured symbols by `identifier(symbol)`; cached, as thousands of series are looked up."""
        return {identifier(entry.symbol): entry for entry in self.symbols}

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with other symbols has its own `by_asset_key`: pydantic copies the cached one, too."""
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

    # --- lookups by series or provider ---

    def priority(self, series: Series) -> tuple[str, ...]:
        """The enabled providers of the series, in order of priority."""
        entry = self._entry(series)
        names = None if entry is None else entry.provider_priority
        if isinstance(names, dict):
            names = names.get(series.timeframe)
        if names is None:
            names = getattr(self.provider_priority, series.asset_class.value)
        return tuple(name for name in names if self.provider(name).enabled)

    def closed(self, series: Series) -> tuple[tuple[date, date], ...]:
        """The dates on which the market of the series was closed: first and last (inclusive) of each
        interval, ascending, disjoint. Those of its symbol and those of its calendar."""
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
        """The start of the series, in microseconds."""
        entry = self._entry(series)
        return self.history_start if entry is None or entry.start is None else entry.start

    def end_of(self, series: Series) -> int | None:
        """The end of the series (exclusive), in microseconds; None: no end."""
        entry = self._entry(series)
        return None if entry is None else entry.end

    def kept(self, series: Series, window: TimeRange) -> TimeRange:
        """The part of `window` from the series' start to its end; empty where there is none."""
        start, end = self.start_of(series), self.end_of(series)
        last = window.end if end is None else end
        return window.intersect(TimeRange(start, max(start, last)))

    def provider(self, name: str) -> ProviderSettings:
        """The settings of a provider. Raises ValueError for an unknown one."""
        found: ProviderSettings = getattr(self.providers, provider_name(name))
        return found

    def check_enabled(self, providers: Iterable[str]) -> None:
        """Raises ValueError for a provider that is unknown or disabled."""
        for name in providers:
            if not self.provider(name).enabled:
                raise ValueError(f"{name} is disabled: set providers.{name}.enabled to true in the settings")

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
        """The provider's key in clear text; None if it is not set."""
        secret = self.keys.get(provider)
        return None if secret is None else secret.get_secret_value()

    def redacted_dump(self) -> dict[str, Any]:
        """All settings as JSON values; every secret is asterisks."""
        return self.model_dump(mode="json")

    def _entry(self, series: Series) -> SymbolSettings | None:
        entry = self.by_asset_key.get(identifier(series.symbol))
        return entry if entry is not None and entry.symbol == series.symbol else None


def custom_address(provider: str, base_url: str, archive_url: str | None = None) -> str | None:
    """The address of `provider` if it is not the default one, else None."""
    usual = Providers.model_fields[provider].default
    archives = archive_url is not None and archive_url != getattr(usual, "archive_url", None)
    if base_url == usual.base_url and not archives:
        return None
    return f"{base_url} (archives: {archive_url})" if archives else base_url


def _is_calendar_of(name: str, series: Series) -> bool:
    venue = series.instrument.venue
    if name == venue or name in CLASS_CALENDARS or venue in CLASS_CALENDARS:
        return name == venue
    return resolved_calendar(name) == resolved_calendar(venue)


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
