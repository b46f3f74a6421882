"""The words of the project (docs/glossary.md): file names are nouns, and prose avoids the words that it replaces."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from fks_backfill_dagster.settings.model import CHECKOUT

PACKAGE = CHECKOUT / "fks_backfill_dagster"

# Programs do not talk, hear or rest, and are no persons; and two archaisms.
# Names of code, as in `nobody` (the account) and g.heard (a column), are no prose.
DROPPED = re.compile(
    r"(?<![`.\"])\b(nobody|somebody|anybody|anew|for ever|by itself|by themselves|left alone|errands?|lodg\w+"
    r"|hears?|heard|told|tells?)\b",
    re.IGNORECASE,
)

# Gerunds and riddles, as files were called once.
FILE_NAMES = re.compile(
    r"(asking|telling|speaking|choosing|watching|serving|settling|judging|lodging|lending|errands|\bstory\b)"
)


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a document; comments and texts of more than one word in a module."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and " " in token.string):
            yield token.start[0], token.string


def dropped(path: Path) -> list[str]:
    return [
        f"{path.name}:{number}: {found[0]}"
        for number, text in prose(path)
        for found in DROPPED.finditer(text)
    ]


FILES = [
    path
    for path in (
        *PACKAGE.rglob("*.py"),
        *CHECKOUT.glob("*.md"),
        *CHECKOUT.glob("docs/*.md"),
        *CHECKOUT.glob("docs/*.py"),
        *CHECKOUT.glob("bench/*.py"),
        CHECKOUT / "config" / "backfill.yaml",
    )
    if "migrations" not in path.parts
]


def test_prose_uses_the_words_of_the_glossary() -> None:
    assert [one for path in sorted(FILES) for one in dropped(path)] == []


def test_a_dropped_word_is_found_with_its_place(tmp_path: Path) -> None:
    module = tmp_path / "a.py"
    module.write_text(
        '"""Returns rows."""\nx = "told"\n# `nobody` owns it, and nobody is told of it\ny = f"it tells {x}"\n'
    )
    assert dropped(module) == ["a.py:3: nobody", "a.py:3: told", "a.py:4: tells"]
    document = tmp_path / "a.md"
    document.write_text("Rows are read\nanew.\n")
    assert dropped(document) == ["a.md:2: anew"]


@pytest.mark.parametrize("name", ["settling", "story", "asking_all"])
def test_a_file_name_that_is_a_gerund_is_found(name: str) -> None:
    assert FILE_NAMES.search(name)


def test_file_names_are_nouns() -> None:
    assert [path.name for path in PACKAGE.rglob("*.py") if FILE_NAMES.search(path.stem)] == []
