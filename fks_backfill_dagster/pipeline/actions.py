"""Corporate actions: imported from a person's file, or requested from the providers that list them.

Belongs here: which provider is requested for which stock, and the report. Does not belong here: the actions in the
responses of a sync (`sync`), their validity (`domain.actions`), the write (`store.writer.actions`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fks_backfill_dagster.domain.actions import FILE, Action, ReportedActions, described
from fks_backfill_dagster.domain.series import Instrument
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.providers.base import (
    ActionSource,
    Cancelled,
    NotEntitled,
    Provider,
    ProviderError,
    UnknownSymbol,
)
from fks_backfill_dagster.store.actions import stored_actions
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import repeated
from fks_backfill_dagster.store.writer.actions import WrittenActions, write_actions


@repeated
def import_actions(
    database: Database,
    actions: Mapping[Instrument, Sequence[Action]],
    priority: Callable[[Instrument], Sequence[str]],
    now: int,
) -> WrittenActions:
    """Stores the actions of a file, all of them or none. Importing them twice changes nothing."""
    done = WrittenActions()
    with database.begin() as connection:
        for instrument in sorted(actions, key=lambda one: one.symbol):
            reported = ReportedActions(FILE, now, tuple(actions[instrument]))
            done += write_actions(connection, instrument, reported, priority(instrument))
    return done


# Failures of a provider in a row after which the rest of a refresh does without it, as a sync does.
_MOST_FAILURES = 2


@dataclass(frozen=True, slots=True)
class RefreshedActions:
    """The response of one provider about one stock.

    listed: its valid actions. refused: a sentence for each invalid row. gone: a sentence for each action in use that it
    no longer lists. error: why there is no response; then nothing was changed.
    """

    instrument: Instrument
    provider: str
    listed: int = 0
    written: WrittenActions = WrittenActions()  # noqa: RUF009 - frozen
    refused: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ActionSources:
    """The providers to request, in order, and a warning for each that is skipped."""

    names: tuple[str, ...]
    warnings: tuple[str, ...]


def action_sources(providers: Mapping[str, Provider], names: Iterable[str]) -> ActionSources:
    """Those of `names` that list actions and have their key."""
    found, warnings = list[str](), list[str]()
    for name in dict.fromkeys(names):
        provider = providers.get(name)
        if not isinstance(provider, ActionSource):
            continue
        key = provider.missing_key()
        if key is None:
            found.append(name)
        else:
            warnings.append(f"{name} is skipped: {key} is not set")
    return ActionSources(tuple(found), tuple(warnings))


def refresh_actions(
    context: Context, wanted: Sequence[tuple[Instrument, Sequence[str]]]
) -> Iterator[RefreshedActions]:
    """Requests every action of each stock from each of its sources, and stores it; one result after the other.

    `wanted`: stocks with the names of their sources (`action_sources`). A provider that fails twice in a row is not
    requested again. Errors of providers are part of the results; StoreError is raised.
    """
    failures = Counter[str]()
    for instrument, names in wanted:
        for name in names:
            if failures[name] >= _MOST_FAILURES:
                error = f"{name}: not requested, because it failed {_MOST_FAILURES} times in a row"
                yield RefreshedActions(instrument, name, error=error)
                continue
            try:
                reported = _requested(context, instrument, name)
            except Cancelled:
                raise
            except ProviderError as error:
                # What it says about one symbol says nothing about the next one.
                failures[name] += not isinstance(error, UnknownSymbol | NotEntitled)
                yield RefreshedActions(instrument, name, error=str(error))
                continue
            failures[name] = 0
            yield _stored(context, instrument, reported)


def _requested(context: Context, instrument: Instrument, name: str) -> ReportedActions:
    provider = context.providers[name]
    assert isinstance(provider, ActionSource)
    return provider.fetch_actions(instrument.at(Timeframe.D1))


@repeated
def _stored(context: Context, instrument: Instrument, reported: ReportedActions) -> RefreshedActions:
    priority = context.action_priority(instrument)
    with context.database.begin() as connection:
        written = write_actions(connection, instrument, reported, priority)
    listed = {(one.kind, one.ex_date) for one in reported.actions}
    gone = [
        f"{reported.provider}: {instrument.symbol}: {described(one.action)} is stored, and no longer listed: it is"
        " kept; import it with the ratio 1 if it did not happen"
        for one in stored_actions(context.database, [instrument.symbol])
        if one.provider == reported.provider
        and one.used  # else it changes no price: another provider or a file has decided
        and (one.action.kind, one.action.ex_date) not in listed
    ]
    return RefreshedActions(
        instrument, reported.provider, len(reported.actions), written, reported.refused, tuple(gone)
    )
