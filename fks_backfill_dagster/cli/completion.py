"""Completion of arguments in the shell: symbols, timeframes and providers of the settings.

Reads the settings only: a database may hang, and completion must not. Invalid settings complete nothing; the command
itself reports them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import click


def complete_series(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Symbols, and after a symbol or `--all` its timeframes."""
    known, names = _configured(), _given(context)
    if not names and not context.params.get("everything"):
        return _beginning(known, incomplete)
    return _beginning(_timeframes(known, names), incomplete)


def complete_symbol(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Symbols."""
    return _beginning(_configured(), incomplete)


def complete_timeframe(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The timeframes of the symbol before, or all."""
    return _beginning(_timeframes(_configured(), _given(context)), incomplete)


def complete_provider(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Providers."""
    from fks_backfill_dagster.settings.sections import PROVIDER_NAMES

    return _beginning(PROVIDER_NAMES, incomplete)


def _given(context: click.Context) -> Sequence[str]:
    """The symbols and timeframes before the incomplete word."""
    given: Sequence[str] = context.params.get("names") or context.params.get("symbols") or ()
    symbol = context.params.get("symbol")
    return given or ([] if symbol is None else [symbol])


def _configured() -> dict[str, list[str]]:
    """The timeframes of each configured symbol; empty if the settings are invalid."""
    known: dict[str, list[str]] = {}
    with suppress(Exception):  # of any kind: an error would appear in the middle of the line that is edited
        from fks_backfill_dagster.settings.catalog import Catalog
        from fks_backfill_dagster.settings.load import load_settings

        for one in Catalog(load_settings()).series:
            known.setdefault(one.symbol, []).append(one.timeframe.value)
    return known


def _timeframes(known: dict[str, list[str]], names: Sequence[str]) -> list[str]:
    """Those of the symbol that was given, those of all symbols if none was; every one if it is not configured."""
    from fks_backfill_dagster.domain.series import identifier
    from fks_backfill_dagster.domain.timeframe import Timeframe

    wanted = {identifier(name).upper() for name in names}
    found = {
        frame
        for symbol, frames in known.items()
        if not wanted or identifier(symbol).upper() in wanted
        for frame in frames
    }
    return [one.value for one in Timeframe if not found or one.value in found]


def _beginning(names: Sequence[str] | dict[str, list[str]], incomplete: str) -> list[str]:
    """The names that begin with the incomplete word, in its notation: `BTC/USDT` or `BTC_USDT`, in any case."""
    written = (name.replace("/", "_") if "_" in incomplete else name for name in names)
    return [name for name in written if name.lower().startswith(incomplete.lower())]
