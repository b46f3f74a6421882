"""The command `series providers`: timeframes, key and cool-down of every provider."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fks_backfill_dagster.cli.arguments import usage
from fks_backfill_dagster.cli.completion import complete_provider
from fks_backfill_dagster.cli.messages import shown
from fks_backfill_dagster.cli.output import (
    example,
    json_option,
    many,
    print_json,
    print_line,
    print_table,
    verbose_option,
    wide_option,
)

if TYPE_CHECKING:
    from fks_backfill_dagster.documents import Document
    from fks_backfill_dagster.providers.base import Provider
    from fks_backfill_dagster.settings.model import Settings
    from fks_backfill_dagster.store.rate_limits import ProviderState


@click.command("providers", epilog=example("series providers", "series providers --reset binance"))
@click.option(
    "--reset",
    metavar="NAME",
    shell_complete=complete_provider,
    help="End the wait or the cool-down of this provider, and reset its failures.",
)
@verbose_option
@wide_option
@json_option
def list_providers(reset: str | None, as_json: bool) -> None:
    """List the providers with their timeframes, history depth and state.

    With --reset NAME instead: request this provider again at once, despite its `Retry-After` or repeated
    failures. Other processes may run; what was spent of its limits still counts.
    """
    from fks_backfill_dagster.app import build_providers, open_database, provider_states
    from fks_backfill_dagster.providers.http.pool import RequestPool
    from fks_backfill_dagster.settings.load import load_settings
    from fks_backfill_dagster.settings.sections import PROVIDER_NAMES

    settings = load_settings()
    if reset is not None:
        _reset_provider(settings, reset, as_json)
        return
    pool = RequestPool(1)
    built = build_providers(settings, pool)
    pool.close()
    with open_database(settings) as database:
        states = provider_states(settings, database)
    rows = [
        row
        for name in PROVIDER_NAMES
        for row in _provider_rows(settings, name, built.get(name), states.get(name))
    ]
    if as_json:
        print_json(rows)
        return
    header = ("provider", "state", "class", "timeframes", "depth", "candles a request", "volume", "address")
    print_table(
        header,
        [
            (
                row["provider"],
                shown(str(row["state"])),
                row["asset_class"],
                " ".join(row["timeframes"]),  # type: ignore[arg-type]
                _depth(row),
                row["page_size"],
                row["has_volume"],
                row["custom_address"] or "default",
            )
            for row in rows
        ],
    )


def _reset_provider(settings: Settings, name: str, as_json: bool) -> None:
    from fks_backfill_dagster.app import open_database, reset_provider

    with usage():
        settings.provider(name)
    with open_database(settings) as database:
        found = reset_provider(settings, database, name)
    if as_json:
        ended = [
            {
                "provider": one.provider,
                "told_to_wait_seconds": one.told_to_wait,
                "cool_down_seconds": None if one.rest is None else one.rest.seconds,
                "failures": one.failures,
                "reason": one.reason,
            }
            for one in found
        ]
        print_json({"provider": name, "ended": ended})
        return
    for one in found:
        print_line(f"{one.provider}: ended {' and '.join(_ended(one))}.")
    if not found:
        print_line(f"{name}: nothing to reset: it is requested as usual.")


def _ended(state: ProviderState) -> list[str]:
    parts = []
    if state.told_to_wait is not None:
        parts.append(f"the wait of another {state.told_to_wait:,.0f} s that it requested")
    if state.rest is not None:
        parts.append(f"the cool-down of another {state.rest.seconds:,.0f} s")
    if state.failures:
        parts.append(f"the failure count ({state.failures}, the last failure: {state.reason})")
    return parts


def _provider_rows(
    settings: Settings, name: str, provider: Provider | None, known: ProviderState | None
) -> list[Document]:
    """One row per asset class and depth. `depth_days` null: as far back as the provider has the symbol.
    `custom_address` null: the provider's default one."""
    from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, Timeframe

    enabled, address = settings.provider(name).enabled, settings.custom_addresses().get(name)
    if provider is None:
        state = "disabled"
        none: Document = {
            "asset_class": None,
            "timeframes": [],
            "depth_days": None,
            "page_size": None,
            "has_volume": None,
            "custom_address": None,
        }
        return [{"provider": name, "state": state, "enabled": enabled, "key": None, "key_set": None} | none]
    can, missing = provider.capabilities, provider.missing_key()
    return [
        {
            "provider": name,
            "state": f"{missing} is not set" if missing else state_text(known),
            "enabled": enabled,
            "key": can.needs_key,
            "key_set": None if can.needs_key is None else missing is None,
            "asset_class": asset_class.value,
            "timeframes": [t.value for t in Timeframe if t in timeframes and can.depth.get(t) == depth],
            "depth_days": None if depth is None else depth // MICROS_PER_DAY,
            "page_size": can.page_size,
            "has_volume": can.has_volume,
            "custom_address": address,
        }
        for asset_class, timeframes in can.timeframes.items()
        for depth in dict.fromkeys(can.depth.get(t) for t in Timeframe if t in timeframes)
    ]


def _depth(row: Document) -> str | None:
    if row["asset_class"] is None:
        return None
    return "since listing" if row["depth_days"] is None else many(int(str(row["depth_days"])), "day")


def state_text(state: ProviderState | None) -> str:
    if state is not None and state.rest is not None:
        return f"cool-down for another {state.rest.seconds:.0f} s: {state.rest.reason}"
    if state is not None and state.told_to_wait is not None:
        return f"requested a wait of another {state.told_to_wait:.0f} s"
    return "ready"
