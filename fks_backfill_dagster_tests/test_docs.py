"""The documents quote the program's actual output, and name what exists."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import psycopg
import pytest
import yaml
from pydantic import BaseModel, Field

from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.ledger.records import Evidence, Outcome
from fks_backfill_dagster.settings.model import CHECKOUT
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.postgres import database, database_url, server_url, template
from fks_backfill_dagster_tests.store.builders import MIDNIGHT, Shelf, brought, candles_at, execute

__all__ = ["database", "database_url", "server_url", "template"]

PACKAGES = (CHECKOUT / "fks_backfill_dagster", CHECKOUT / "fks_backfill_dagster_tests")


@pytest.fixture(scope="module")
def generate() -> Iterator[ModuleType]:
    """The module docs/generate.py, which is outside of packages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(CHECKOUT / "docs"))
        yield importlib.import_module("generate")


def test_the_reference_of_the_command_line(generate: ModuleType) -> None:
    assert generate.REFERENCE.read_text() == generate.reference(), "run `make docs`"


def test_the_tables_of_the_settings(generate: ModuleType) -> None:
    written = generate.SETTINGS.read_text()
    assert generate.with_tables(written) == written, "run `make docs`"


def test_a_setting_without_a_description_is_reported(generate: ModuleType) -> None:
    tables = importlib.import_module("settings_tables")

    class Described(BaseModel):
        key: int = Field(default=1, description="A key.")

    class Same(Described):
        key: int = 2
        other: int = 3

    assert tables.meaning(Same, "key") == "A key."
    with pytest.raises(tables.Undocumented, match=r"^other of Same has no Field\(description"):
        tables.meaning(Same, "other")


def test_a_section_without_a_table_is_reported(generate: ModuleType) -> None:
    text = generate.SETTINGS.read_text().replace("<!-- table: alerts -->", "")
    tables = importlib.import_module("settings_tables")
    with pytest.raises(tables.Undocumented, match=r"no table of: alerts$"):
        tables.with_tables(text)


@pytest.mark.server
def test_the_session_of_the_tutorial(generate: ModuleType) -> None:
    """Except for figures, which depend on the day and the machine, and the widths that follow from them."""
    written = generate.TUTORIAL.read_text()
    assert without_figures(generate.tutorial(written)) == without_figures(written), "run `make docs`"


def without_figures(text: str) -> list[str]:
    return [re.sub(r"[ \d,.:-]+", " ", line).strip() for line in text.splitlines()]


LINK = re.compile(r"""(?:\]\(|(?:src|srcset)=")(?!https?:)([^)"#]*)(?:#([^)"]*))?[)"]""")
DOCUMENTS = sorted([*CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/*.md"), *CHECKOUT.glob("docs/adr/*.md")])
each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(CHECKOUT))
)


def anchor(heading: str) -> str:
    """The anchor that common renderers generate for a heading."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


@each_document
def test_every_link_leads_somewhere(document: Path) -> None:
    for place, heading in LINK.findall(document.read_text()):
        target = (document.parent / place).resolve() if place else document
        assert target.exists(), f"{document.name}: {place}"
        if heading:
            found = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert heading in {anchor(one) for one in found}, f"{document.name}: {place}#{heading}"


def test_every_picture_is_shown() -> None:
    shown = {place for document in DOCUMENTS for place, _ in LINK.findall(document.read_text())}
    names = [path.name for path in (CHECKOUT / "docs" / "pictures").iterdir()]
    assert [name for name in names if not any(place.endswith(f"pictures/{name}") for place in shown)] == []


def test_the_months_of_the_picture_of_coverage(
    generate: ModuleType, database: Database, database_url: str
) -> None:
    """Read from the public views: a late beginning, a fallback, a gap without a source, and one to be requested."""
    picture = importlib.import_module("coverage_picture")
    days = Shelf.of(database, Series("ETH/USDT", Timeframe.D1, AssetClass.CRYPTO))
    days.put(0, 40)  # 2024-01-01 to 2024-02-10
    days.put(40, 45, provider="polygon")
    absent = tuple(Evidence(name, MIDNIGHT, Outcome.ABSENT) for name in ("binance", "polygon"))
    days.commit(
        days.span(60, 91), brought(candles_at(days.opens(63, 91))), evidence=absent
    )  # from 2024-03-01
    execute(database, "UPDATE fks.gap SET status = 'unavailable'")
    days.commit(days.span(91, 93), evidence=(Evidence("binance", MIDNIGHT, Outcome.ERROR, "returned 503"),))
    with psycopg.connect(database_url) as connection:
        (row,) = picture.read(connection)
    states = {f"{month:%Y-%m}": row.state(month) for month in row.months}
    assert states["2023-12"] == (picture.State.BEFORE, 0)
    assert states["2024-01"] == (picture.State.COMPLETE, 31)
    assert states["2024-02"] == (picture.State.FALLBACK, 5)
    assert states["2024-03"] == (picture.State.EXPLAINED, 3)
    assert states["2024-04"] == (picture.State.OPEN, 2)
    assert states["2024-05"] == (picture.State.UNKNOWN, 0)
    assert [gap.outcomes for gap in row.gaps] == [
        {"binance": "absent", "polygon": "absent"},
        {"binance": "error"},
    ]
    html = picture.page([row])
    assert html.count('class="cell before"') == 12 + 1  # and the legend's
    assert "<td>open, 2 missing</td><td>binance: error</td>" in html
    assert "93.58 %" in html  # 73 of 78, rounded down


# --- files and names of code ---

FILE = re.compile(r"(?<![\w./-])((?:\w+/)*)(\w+\.py)\b")
DOTTED = re.compile(r"\bfks_backfill_dagster(?:\.\w+)+")
IMPORT = re.compile(r"from (fks_backfill_dagster[\w.]*) import (\w+(?:, \w+)*)")
MEMBER = re.compile(r"`([A-Z]\w+)\.(\w+)(?:\(.*?\))?`")
IN_FILE = re.compile(r"`(\w+)(?:\(\))?` in `((?:\w+/)*\w+\.py)`")


def wrong_names(text: str, *, decision: bool = False) -> list[str]:
    """The files, modules, functions and classes of this repository that the text names and that do not exist.

    A `decision` (docs/adr) describes what was: there, files count only with the name of their package. Names with
    `example` are those of a worked example.
    """
    wrong = [
        folder + name
        for folder, name in FILE.findall(text)
        if not (files_called(folder, name) or (decision and not folder.startswith("fks_backfill_dagster")))
    ]
    wrong += [name for name in DOTTED.findall(text) if not (name.endswith(".py") or resolves(name))]
    for module, names in IMPORT.findall(text):
        wrong += [f"{module}.{name}" for name in names.split(", ") if not resolves(f"{module}.{name}")]
    for name, path in IN_FILE.findall(text):
        folder, _, file_name = path.rpartition("/")
        found = files_called(folder and f"{folder}/", file_name)
        if found and not any(name in defined_in(file) for file in found):
            wrong.append(f"{name} in {path}")
    for name, member in MEMBER.findall(text):
        if member not in members().get(name, {member}):
            wrong.append(f"{name}.{member}")
    return [name for name in wrong if "example" not in name.lower()]


def files_called(folder: str, name: str) -> list[Path]:
    """Files below the checkout or a package; without a folder those of that name anywhere."""
    if not folder:
        return [path for path in sources() if path.name == name]
    return [path for root in (CHECKOUT, *PACKAGES) if (path := root / folder / name).is_file()]


@cache
def sources() -> list[Path]:
    places = (*PACKAGES, CHECKOUT / "docs", CHECKOUT / "bench")
    return [path for place in places for path in place.rglob("*.py")]


@cache
def defined_in(path: Path) -> frozenset[str]:
    """Functions, classes and constants of a module, methods included."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    named = {one.name for one in nodes if isinstance(one, ast.FunctionDef | ast.ClassDef)}
    return frozenset(
        named | {one.id for one in nodes if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}
    )


@cache
def members() -> dict[str, set[str]]:
    """Methods and fields of each class; of classes with one name together."""
    found: dict[str, set[str]] = {}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                inside = ast.walk(ast.Module(node.body, []))
                names = {getattr(one, "name", getattr(one, "id", None)) for one in inside}
                found.setdefault(node.name, set()).update(filter(None, names))
    return found


@cache
def resolves(dotted: str) -> bool:
    """Whether a module, or a name in one, exists."""
    try:
        return bool(importlib.import_module(dotted))
    except ModuleNotFoundError:
        module, _, name = dotted.rpartition(".")
        return resolves(module) and hasattr(importlib.import_module(module), name)


@each_document
def test_every_named_file_and_function_exists(document: Path) -> None:
    assert wrong_names(document.read_text(), decision=document.parent.name == "adr") == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("see `pipeline/planing.py`", ["pipeline/planing.py"]),
        ("see `planing.py`", ["planing.py"]),
        ("`providers/example.py`", []),
        ("from fks_backfill_dagster.domain import EXAMPLE", []),
        ("pipeline/plan.py and `plan.py`, `store/conftest.py`, `docs/generate.py`", []),
        ("`fks_backfill_dagster.simulators`", ["fks_backfill_dagster.simulators"]),
        ("`fks_backfill_dagster.simulator.LocalMarket`", []),
        ("from fks_backfill_dagster import read_candles, write", ["fks_backfill_dagster.write"]),
        ("(`BackOf` in `ledger/back_off.py`)", ["BackOf in ledger/back_off.py"]),
        ("(`BackOff` in `ledger/back_off.py`)", []),
        ("`TimeRange.intersects(other)`", ["TimeRange.intersects"]),
        ("`TimeRange.intersect(other)` and `Unknown.name`", []),
    ],
)
def test_a_wrong_name_is_found(text: str, wrong: list[str]) -> None:
    assert wrong_names(text) == wrong


def test_a_decision_may_name_former_files() -> None:
    assert wrong_names("`store/checking.py`", decision=True) == []
    assert wrong_names("`fks_backfill_dagster/store/checking.py`", decision=True) != []


def test_the_hooks_before_a_commit_are_those_of_make_lint() -> None:
    hooks = yaml.safe_load((CHECKOUT / ".pre-commit-config.yaml").read_text())
    assert [one["repo"] for one in hooks["repos"]] == ["local"]
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (CHECKOUT / "Makefile").read_text(), re.MULTILINE)
    assert lint is not None
    commands = [line.removeprefix("\t@$(BIN)/") for line in lint[1].splitlines()]
    assert [one["entry"] for one in hooks["repos"][0]["hooks"]] == [f".venv/bin/{one}" for one in commands]
