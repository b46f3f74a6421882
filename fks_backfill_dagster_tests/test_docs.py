"""The documents quote the program's actual output."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from pydantic.fields import FieldInfo

from fks_backfill_dagster.settings.model import CHECKOUT


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
    with pytest.raises(tables.Undocumented, match=r"the setting gap_detection\.new has no Field\(desc"):
        tables.meaning(FieldInfo(annotation=int), ("gap_detection", "new"))


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
