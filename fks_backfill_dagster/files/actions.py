"""Corporate actions as CSV: columns symbol, kind, ex_date, ratio, and optionally amount, currency.

Belongs here: the format, and every problem of a file with its line. Does not belong here: which symbols are known
(the caller passes a function), storing.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fks_backfill_dagster.domain.actions import Action, ActionKind, has_actions, split_of
from fks_backfill_dagster.domain.series import Instrument

_NEEDED = ("symbol", "kind", "ex_date", "ratio")
_KNOWN = (*_NEEDED, "amount", "currency")
LARGEST_FILE = 16 * 1024 * 1024
"""Bytes. A hundred thousand actions: all splits of all stocks."""

FindInstrument = Callable[[str], Instrument]
"""The known instrument of a symbol in any notation. Raises ValueError with the reason."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a file is invalid. `line`: from 1; None: the whole file."""

    line: int | None
    reason: str

    def __str__(self) -> str:
        return self.reason if self.line is None else f"line {self.line}: {self.reason}"


class InvalidFile(ValueError):
    """The file as a whole is refused; `problems` names every bad line."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(map(str, problems)))
        self.problems = tuple(problems)


def read_actions(
    content: bytes, find: FindInstrument, only: Instrument | None = None
) -> dict[Instrument, tuple[Action, ...]]:
    """The actions of a file by instrument, ordered by symbol.

    `only`: the instrument of a file without the column symbol; in one with it every line must name this one.
    Raises InvalidFile.
    """
    lines = _rows(content, needs_symbol=only is None)
    problems: list[Problem] = []
    found: dict[Instrument, dict[Action, int]] = {}
    first_lines: dict[tuple[object, ...], int] = {}
    for number, row in lines:
        try:
            instrument = _instrument(row, find, only)
            action = _action(row, instrument)
            key = (action.symbol, action.kind, action.ex_date)
            if first_lines.setdefault(key, number) != number:
                raise ValueError(
                    f"line {first_lines[key]} has this date of {action.symbol} too: keep one of them"
                )
        except ValueError as error:
            # A reason quotes the file, whose characters must not control a terminal.
            problems.append(Problem(number, "".join(c if c.isprintable() else "?" for c in str(error))))
            continue
        found.setdefault(instrument, {})[action] = number
    if problems:
        raise InvalidFile(problems)
    if not found:
        raise InvalidFile([Problem(None, "the file has no actions below its header")])
    return {one: tuple(found[one]) for one in sorted(found, key=lambda one: one.symbol)}


def _rows(content: bytes, *, needs_symbol: bool) -> Iterator[tuple[int, dict[str, str]]]:
    """The lines below the header, with their numbers; the header is checked at once."""
    if len(content) > LARGEST_FILE:
        raise InvalidFile([Problem(None, f"the file is larger than {LARGEST_FILE // 1024**2} MB: split it")])
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InvalidFile([Problem(line, "it is not UTF-8 text")]) from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise InvalidFile([Problem(reader.line_num, f"it is not CSV ({error})")]) from None
    header = [name.strip().lower() for name in rows[0][1]] if rows else []
    needed = _NEEDED if needs_symbol else _NEEDED[1:]
    wrong = [f"lacks the column {name}" for name in needed if name not in header]
    wrong += [f"has the unknown column {name!r}" for name in header if name not in _KNOWN]
    wrong += [f"has the column {name} twice" for name in dict.fromkeys(header) if header.count(name) > 1]
    if wrong:
        reason = f"the header {', '.join(wrong)}: the columns are {', '.join(_NEEDED)} [, amount, currency]"
        raise InvalidFile([Problem(rows[0][0] if rows else None, reason)])
    return ((number, _named(header, cells)) for number, cells in rows[1:])


def _named(header: Sequence[str], cells: Sequence[str]) -> dict[str, str]:
    """The cells by column; a surplus or a missing one is an empty name, which `_action` refuses."""
    if len(cells) != len(header):
        return {"": f"it has {len(cells)} cells, the header {len(header)}"}
    return dict(zip(header, (cell.strip() for cell in cells), strict=True))


def _instrument(row: dict[str, str], find: FindInstrument, only: Instrument | None) -> Instrument:
    if "" in row:
        raise ValueError(row[""])
    if "symbol" not in row:
        assert only is not None
        return only
    if not row["symbol"]:
        raise ValueError("symbol is empty")
    found = find(row["symbol"])
    if only is not None and found != only:
        raise ValueError(f"symbol {row['symbol']} is another one than {only.symbol}, which the command names")
    return found


def _action(row: dict[str, str], instrument: Instrument) -> Action:
    if not has_actions(instrument):
        raise ValueError(f"{instrument.symbol} is {instrument.asset_class}, and only stocks have splits")
    if row["kind"] == ActionKind.DIVIDEND:
        raise ValueError("kind dividend cannot be stored yet: remove the line")
    if row["kind"] != ActionKind.SPLIT:
        raise ValueError(f"kind {row['kind']!r} is unknown: it is split")
    if row.get("amount") or row.get("currency"):
        raise ValueError("a split has neither amount nor currency")
    try:
        ratio = float(row["ratio"])
    except ValueError:
        raise ValueError(
            f"ratio {row['ratio']!r} is not a number, such as 4 for 4:1 and 0.1 for 1:10"
        ) from None
    return split_of(instrument.symbol, row["ex_date"], ratio)
