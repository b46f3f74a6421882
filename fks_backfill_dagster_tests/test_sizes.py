"""Files and functions of the package stay readable: at most 450 lines in a file, 50 in a function.

A function counts from `def` to its last line, without decorators: the options of a command are a list.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "fks_backfill_dagster"
LONGEST_FILE, LONGEST_FUNCTION = 450, 50


def too_long(root: Path) -> list[str]:
    """The files and functions below `root` with too many lines."""
    files = sorted(root.rglob("*.py"))
    assert files, f"{root} has no file to measure"
    return [fault for path in files for fault in faults_of(path, path.relative_to(root))]


def faults_of(path: Path, name: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    if (lines := len(text.splitlines())) > LONGEST_FILE:
        yield f"{name}: {lines} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            if (lines := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION:
                yield f"{name}:{node.lineno}: {node.name} has {lines} lines"


def test_files_and_functions_are_short() -> None:
    assert too_long(ROOT) == []


def function(lines: int, head: str = "def f():") -> str:
    return "\n".join([head, *["    pass"] * (lines - 1)])


def indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n" * 450, []),
        ("\n" * 451, ["part/a.py: 451 lines"]),
        (function(50), []),
        (function(51), ["part/a.py:1: f has 51 lines"]),
        (function(51, "async def f():"), ["part/a.py:1: f has 51 lines"]),
        ("class A:\n" + indented(function(51)), ["part/a.py:2: f has 51 lines"]),
        ("def outer():\n" + indented(function(30)), []),
        ("@one\n@two\n" + function(50), []),
        (f"{function(51)}\n\n{function(51, 'def g():')}", [f"part/a.py:{n}" for n in ("1: f", "53: g")]),
    ],
)
def test_a_violation_is_found_with_its_place(text: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part/a.py").write_text(text, encoding="utf-8")
    found = too_long(tmp_path)
    assert len(found) == len(expected)
    assert all(fault.startswith(start) for fault, start in zip(found, expected, strict=True))


def test_nothing_to_measure_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="has no file to measure"):
        too_long(tmp_path)
