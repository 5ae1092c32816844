"""How the tests are laid out: as the package is, with short names, and each file by itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from helpers import ROOT

TESTS = ROOT / "tests"
FILES = sorted(TESTS.rglob("test_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(TESTS).as_posix())
def test_a_file_has_a_room_short_names_and_no_other_file(file: Path) -> None:
    """Its folder is one of the package's, names have at most 60 characters, and it imports from no test file."""
    assert (ROOT / "surgery" / file.parent.relative_to(TESTS)).is_dir()
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    names = [node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    assert [name for name in names if len(name) > 60] == []
    assert len(names) == len(set(names)), "one of them never runs"
    imported = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    imported += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    assert [name for name in imported if name.split(".")[-1].startswith("test_")] == []
