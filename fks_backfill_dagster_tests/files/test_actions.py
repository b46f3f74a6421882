"""CSV files of corporate actions: what is read, and every problem with its line."""

from __future__ import annotations

import csv
import io
from contextlib import suppress
from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fks_backfill_dagster.domain.actions import Action, ActionKind
from fks_backfill_dagster.domain.series import AssetClass, Instrument
from fks_backfill_dagster.files.actions import LARGEST_FILE, InvalidFile, Problem, read_actions
from fks_backfill_dagster_tests.examples import examples

KNOWN = {
    name: Instrument(name, AssetClass.STOCKS if "/" not in name else AssetClass.CRYPTO)
    for name in ("AAPL", "MSFT", "BTC/USDT")
}
HEADER = "symbol,kind,ex_date,ratio\n"


def find(symbol: str) -> Instrument:
    if symbol.upper() not in KNOWN:
        raise ValueError(f"symbol {symbol} is neither configured nor stored")
    return KNOWN[symbol.upper()]


def read(text: str, only: str | None = None) -> list[Action]:
    found = read_actions(text.encode(), find, None if only is None else KNOWN[only])
    return [action for actions in found.values() for action in actions]


def problems(text: str | bytes, only: str | None = None) -> list[str]:
    content = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(InvalidFile) as raised:
        read_actions(content, find, None if only is None else KNOWN[only])
    return [str(one) for one in raised.value.problems]


def split(symbol: str, day: str, ratio: float) -> Action:
    return Action(symbol, ActionKind.SPLIT, date.fromisoformat(day), ratio)


def test_actions_of_several_symbols() -> None:
    text = HEADER + "MSFT,split,2003-02-18,2\naapl,split,2020-08-31,4\n\nAAPL,split,2014-06-09,7\n"
    assert read(text) == [
        split("AAPL", "2020-08-31", 4),
        split("AAPL", "2014-06-09", 7),
        split("MSFT", "2003-02-18", 2),
    ]


def test_the_forms_in_which_spreadsheets_write() -> None:
    """A byte order mark, CRLF, columns in another order, capitals in the header, quotes, empty optional columns."""
    text = '\ufeffRatio,Ex_Date,Kind,Symbol,amount,currency\r\n"0.1",2020-08-31,split,"AAPL",,\r\n'
    assert read(text) == [split("AAPL", "2020-08-31", 0.1)]


def test_the_symbol_of_the_command() -> None:
    assert read("kind,ex_date,ratio\nsplit,2020-08-31,4\n", "AAPL") == [split("AAPL", "2020-08-31", 4)]
    assert read(HEADER + "AAPL,split,2020-08-31,4\n", "AAPL") == [split("AAPL", "2020-08-31", 4)]
    assert problems(HEADER + "MSFT,split,2020-08-31,4\n", "AAPL") == [
        "line 2: symbol MSFT is another one than AAPL, which the command names"
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("AAPL,split,2020-08-31,0", "ratio 0 is not the new shares per old share of a split"),
        ("AAPL,split,2020-08-31,-4", "ratio -4 is not"),
        ("AAPL,split,2020-08-31,nan", "ratio nan is not"),
        ("AAPL,split,2020-08-31,inf", "ratio inf is not"),
        ("AAPL,split,2020-08-31,1e300", "ratio 1e[+]300 is not"),
        ("AAPL,split,2020-08-31,4:1", "ratio '4:1' is not a number, such as 4 for 4:1"),
        ("AAPL,split,2020-08-31,", "ratio '' is not a number"),
        ("AAPL,split,31.08.2020,4", "ex_date '31.08.2020' is not a date such as 2020-08-31"),
        ("AAPL,split,2020-W36-1,4", "ex_date '2020-W36-1' is not a date"),
        ("AAPL,split,20200831,4", "ex_date '20200831' is not a date"),
        ("AAPL,split,2020-02-30,4", "ex_date '2020-02-30' is not a date"),
        ("AAPL,split,1020-02-03,4", "ex_date 1020-02-03 is not between 1900-01-01 and 2100-01-01"),
        ("AAPL,Split,2020-08-31,4", "kind 'Split' is unknown: it is split"),
        ("AAPL,dividend,2020-08-31,4", "kind dividend cannot be stored yet: remove the line"),
        ("AAPL,split,2020-08-31,4,9", "it has 5 cells, the header 4"),
        ("AAPL,split,2020-08-31", "it has 3 cells, the header 4"),
        (",split,2020-08-31,4", "symbol is empty"),
        ("APPL,split,2020-08-31,4", "symbol APPL is neither configured nor stored"),
        ("BTC/USDT,split,2020-08-31,4", "BTC/USDT is crypto, and only stocks have splits"),
        ("AAPL,split,2014-06-09,7", "line 2 has this date of AAPL too: keep one of them"),
    ],
)
def test_a_bad_line_is_named(line: str, reason: str) -> None:
    (found,) = problems(f"{HEADER}AAPL,split,2014-06-09,7\n{line}\n")
    assert found.startswith("line 3: ")
    assert reason.replace("[+]", "+") in found


def test_a_reason_controls_no_terminal() -> None:
    assert problems(HEADER + "A\x1b[2J,split,2020-08-31,4\n") == [
        "line 2: symbol A?[2J is neither configured nor stored"
    ]


def test_every_bad_line_is_named() -> None:
    found = problems(HEADER + "AAPL,split,x,7\nAAPL,split,2014-06-09,7\nMSFT,split,2014-06-09,0\n")
    assert [line.partition(":")[0] for line in found] == ["line 2", "line 4"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the header lacks the column symbol, lacks the column kind"),
        (b"symbol;kind;ex_date;ratio\n", "line 1: the header lacks the column symbol"),
        (b"symbol,kind,ex_date,ratio,note\n", "line 1: the header has the unknown column 'note'"),
        (b"symbol,kind,ex_date,ratio,ratio\n", "line 1: the header has the column ratio twice"),
        (HEADER.encode(), "the file has no actions below its header"),
        (HEADER.encode() + b"AAPL,split,2020-08-31,4\n\xff\xfe,,,\n", "line 3: it is not UTF-8 text"),
        (HEADER.encode() + b'"AAPL,split,2020-08-31,4\n', "it is not CSV"),
        (b" " * (LARGEST_FILE + 1), "the file is larger than 16 MB: split it"),
    ],
)
def test_a_file_that_is_no_file_of_actions(content: bytes, reason: str) -> None:
    (found,) = problems(content)
    assert reason in found


def test_an_amount_belongs_to_a_dividend() -> None:
    text = "symbol,kind,ex_date,ratio,amount,currency\nAAPL,split,2020-08-31,4,0.82,USD\n"
    assert problems(text) == ["line 2: a split has neither amount nor currency"]
    assert Problem(None, "x") != Problem(1, "x")


_SPLITS = st.dictionaries(
    st.tuples(st.sampled_from(["AAPL", "MSFT"]), st.dates(date(1900, 1, 1), date(2099, 12, 31))),
    st.floats(1e-6, 1e6),
    min_size=1,
    max_size=20,
)


@given(splits=_SPLITS)
@settings(max_examples=examples(200), deadline=None)
def test_what_is_written_is_read(splits: dict[tuple[str, date], float]) -> None:
    file = io.StringIO()
    csv.writer(file).writerows([HEADER.strip().split(",")])
    csv.writer(file).writerows((s, "split", day, repr(ratio)) for (s, day), ratio in splits.items())
    assert {(one.symbol, one.ex_date): one.ratio for one in read(file.getvalue())} == splits


@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: (HEADER + text).encode()))
@settings(max_examples=examples(400), deadline=None)
def test_any_other_content_is_refused_and_not_a_crash(content: bytes) -> None:
    with suppress(InvalidFile):
        assert all(read_actions(content, find).values())
