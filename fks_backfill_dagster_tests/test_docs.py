"""The documents quote the program's actual output."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest

from fks_backfill_dagster.settings.model import CHECKOUT


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """The module docs/generate.py, which is outside of packages."""
    spec = importlib.util.spec_from_file_location("generate", CHECKOUT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_of_the_command_line(generate: ModuleType) -> None:
    assert generate.REFERENCE.read_text() == generate.reference(), "run `make docs`"


@pytest.mark.server
def test_the_session_of_the_tutorial(generate: ModuleType) -> None:
    """Except for figures, which depend on the day and the machine, and the widths that follow from them."""
    written = generate.TUTORIAL.read_text()
    assert without_figures(generate.tutorial(written)) == without_figures(written), "run `make docs`"


def without_figures(text: str) -> list[str]:
    return [re.sub(r"[ \d,.:-]+", " ", line).strip() for line in text.splitlines()]


LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
DOCUMENTS = sorted([*CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/*.md"), *CHECKOUT.glob("docs/adr/*.md")])


def anchor(heading: str) -> str:
    """The anchor that common renderers generate for a heading."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_every_link_leads_somewhere(document) -> None:
    for place, heading in LINK.findall(document.read_text()):
        target = (document.parent / place).resolve() if place else document
        assert target.exists(), f"{document.name}: {place}"
        if heading:
            found = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert heading in {anchor(one) for one in found}, f"{document.name}: {place}#{heading}"
