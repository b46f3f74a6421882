"""All settings as one checked model. Questions about series: `catalog`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

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

from fks_backfill_dagster.domain.series import AssetClass, identifier
from fks_backfill_dagster.domain.timeframe import Timeframe, to_micros
from fks_backfill_dagster.known_providers import KNOWN
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
from fks_backfill_dagster.settings.types import (
    CalendarName,
    Form,
    Instant,
    absolute_folder,
    between,
    database_address,
    leaves_unencrypted,
    login_token,
    no_section,
)

CONFIG: Final = Path("config", "backfill.yaml")
CHECKOUT: Final = Path(__file__).resolve().parents[2]
SHIPPED: Final = Path(__file__).resolve().parents[1] / "project"
"""The project files that the program ships: links in a checkout, copies in a wheel."""

KEY_VARIABLES: Final = {name: known.key_variable for name, known in KNOWN.items() if known.key_variable}
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

    batch_size_days: Annotated[int, between(1, 3_660, "days")] = Field(
        default=30,
        description="The longest range that is fetched and committed as one batch; from 28 days on, whole months.",
    )
    max_concurrent_requests: Annotated[int, between(1, 100, "requests")] = Field(
        default=5, description="Requests in flight at the same time, per process."
    )
    provider_priority: ProviderPriority = ProviderPriority()
    gap_detection: GapDetection = GapDetection()
    freshness: Freshness = Freshness()
    validation: Validation = Validation()
    keys: dict[ProviderName, SecretStr] = Field(
        default={}, repr=False, description="The keys of the providers that need one."
    )
    providers: Providers = Providers()
    symbols: Annotated[tuple[SymbolSettings, ...], Field(strict=False)] = Field(
        default_factory=_default_symbols
    )
    calendars: Annotated[dict[CalendarName, CalendarSettings], BeforeValidator(no_section)] = {}
    history_start: Instant = Field(
        default=to_micros(datetime(2017, 8, 17, tzinfo=UTC)),
        description="The beginning of the history of symbols without a `start` of their own.",
    )
    allow_mixed_sources: bool = Field(
        default=False,
        description="Whether candles of the providers' default addresses and of any other `base_url` (a local market)"
        " may share one database; otherwise a sync that would mix them is refused.",
    )
    alerts: Alerts = Alerts()
    webserver: Webserver = Webserver()
    automation: Automation = Automation()

    home: Annotated[Path, AfterValidator(absolute_folder), Form("folder")] = Field(
        default=Path(".fks"),
        description="The folder of the project's state (embedded database, Dagster's folder, logs). By default in the"
        " folder that holds `config/`.",
    )
    root: Path = Path()
    config_file: Annotated[Path, Form("file")] | None = Field(
        default=None, description="Another settings file."
    )
    database_url: Annotated[SecretStr, AfterValidator(database_address), Form("address")] | None = Field(
        default=None,
        description="A PostgreSQL or TimescaleDB, `postgresql://...` with libpq's parameters; not set: the embedded"
        " PostgreSQL below `FKS_HOME`.",
    )
    api_token: (
        Annotated[SecretStr, AfterValidator(login_token), Form("32 or more printable ASCII characters")]
        | None
    ) = Field(default=None, description="The token of the UI; all requests need it then (`webserver.login`).")

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
            name: KNOWN[name].custom_address(own.base_url, getattr(own, "archive_url", None))
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
