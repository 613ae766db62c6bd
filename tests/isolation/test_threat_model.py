"""The threat model names a test for each control: all of them exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.isolation.mutant_table import MUTANTS

ROOT = Path(__file__).parents[2]
_REFERENCE = re.compile(r"`([a-z0-9_/]+\.py)::([A-Za-z0-9_:]+)`")
_MUTANT = re.compile(r"\*([a-z0-9]+(?:_[a-z0-9]+)+)\*")


def document() -> str:
    return (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")


def exists(path: str, name: str) -> bool:
    body: list[ast.stmt] = ast.parse((ROOT / "tests" / path).read_text(encoding="utf-8")).body
    for part in name.split("::"):
        found = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part]
        if not found:
            return False
        body = found[0].body
    return True


def test_every_test_that_the_threat_model_names_exists() -> None:
    named = _REFERENCE.findall(document())
    assert len(named) > 50
    assert [f"{path}::{name}" for path, name in named if not exists(path, name)] == []


def test_every_mutant_that_the_threat_model_names_exists() -> None:
    named = set(_MUTANT.findall(document()))
    assert len(named) > 30
    assert named - {mutant.name for mutant in MUTANTS} == set()
